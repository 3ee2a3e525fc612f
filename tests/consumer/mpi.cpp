// Compiles and links only with what steelyard::mpi brings.
#include <mpi.h>
#include <steelyard/core/view.hpp>

#ifndef STEELYARD_HAS_MPI
#error "steelyard::mpi defines STEELYARD_HAS_MPI"
#endif

int main() {
    int version = 0, subversion = 0;
    return MPI_Get_version(&version, &subversion);
}
