// Compiles and links with what steelyard::mpi brings; a program of one rank needs no mpirun.
#include <mpi.h>
#include <steelyard/comm/mpi.hpp>

#ifndef STEELYARD_HAS_MPI
#error "steelyard::mpi defines STEELYARD_HAS_MPI"
#endif

static_assert(steelyard::CommBackend<steelyard::MpiComm>);

int main() {
    int version = 0, subversion = 0;
    return MPI_Get_version(&version, &subversion);
}
