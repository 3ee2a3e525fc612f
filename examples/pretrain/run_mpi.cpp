#include "run_mpi.hpp"

#include "training.hpp"

#ifdef STEELYARD_HAS_MPI

#include <mpi.h>

#include <thread>

#include "run_rank.hpp"
#include "steelyard/comm/mpi.hpp"

namespace pretrain {

Ranks::Ranks(Settings& settings) : mpi_(settings.comm == CommKind::mpi) {
    if (!mpi_) return;
    int granted = 0, rank = 0, size = 0;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &granted) != MPI_SUCCESS)
        throw UserError("--comm mpi: MPI did not start");
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    first_ = rank == 0;
    if (settings.ranks_given && settings.ranks != size) {
        MPI_Finalize();
        throw UserError("--ranks " + std::to_string(settings.ranks) + ", but mpirun started " + std::to_string(size) +
                        " processes: leave --ranks away or make them agree");
    }
    settings.ranks = size;
}

Ranks::~Ranks() {
    if (mpi_) MPI_Finalize();
}

void Ranks::give_up(int exit_code) {
    if (!mpi_) return;
    if (!first_) std::this_thread::sleep_for(std::chrono::seconds(2));  // the first process says why, then ends us
    MPI_Abort(MPI_COMM_WORLD, exit_code);
}

RunRecord run_mpi(Shared<float>& shared, double patience) {
    const steelyard::MpiComm comm(MPI_COMM_WORLD, {.timeout = patience});
    try {
        run_rank(shared, comm, {});
    } catch (const std::exception& error) {
        comm.abort("rank " + std::to_string(comm.rank()) + ": " + error.what());
        throw;
    }
    return std::move(shared.record);
}

}  // namespace pretrain

#else

namespace pretrain {

Ranks::Ranks(Settings& settings) {
    if (settings.comm == CommKind::mpi) throw UserError("--comm mpi: this build of pretrain has no MPI");
}
Ranks::~Ranks() = default;
void Ranks::give_up(int) {}

RunRecord run_mpi(Shared<float>&, double) { throw UserError("--comm mpi: this build of pretrain has no MPI"); }

}  // namespace pretrain

#endif
