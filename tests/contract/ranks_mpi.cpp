// The gradient contract on MPI ranks. Each case runs its splits on as many of the four ranks as it asks for.
#include <mpi.h>

#include "contract/cases.hpp"
#include "contract/stacked.hpp"
#include "steelyard/comm/mpi.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing::contract;

struct MpiTeam {
    /// Every rank of the world calls this; those beyond `ranks` only take part in adding up.
    template <class Body>
    SplitResult run(int ranks, Body body) {
        int rank = 0;
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm some = MPI_COMM_NULL;
        MPI_Comm_split(MPI_COMM_WORLD, rank < ranks ? 0 : MPI_UNDEFINED, rank, &some);
        SplitResult result;
        if (some != MPI_COMM_NULL) {
            result = body(MpiComm(some));
            MPI_Comm_free(&some);
        }
        std::int64_t count = static_cast<std::int64_t>(result.sums.size());
        MPI_Allreduce(MPI_IN_PLACE, &count, 1, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD);
        result.sums.resize(static_cast<std::size_t>(count));
        MPI_Allreduce(MPI_IN_PLACE, result.sums.data(), static_cast<int>(count), MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
        MPI_Allreduce(MPI_IN_PLACE, result.choices.data(), static_cast<int>(result.choices.size()), MPI_INT64_T,
                      MPI_SUM, MPI_COMM_WORLD);
        return result;
    }
};

MpiTeam team;

}  // namespace

TEST_CASE("over MPI, the synchronised gradient is the same for every split over ranks") {
    synchronized_is_free_of_ranks(team);
}
TEST_CASE("over MPI, the windowed gradient is the same for every split") { windowed_is_free_of_everything(team); }
TEST_CASE("over MPI, the gradient of a whole buffer is the same for every split") {
    whole_buffer_is_free_of_everything(team);
}
TEST_CASE("over MPI, the sequence gradient is the same for every split that keeps sequences whole") {
    sequence_is_free_of_everything_that_keeps_sequences(team);
}
TEST_CASE("over MPI, the gradient of the z-loss is the same for every split") { z_loss_is_free_of_everything(team); }
TEST_CASE("over MPI, the bias after a step is the same for every split") { bias_is_free_of_everything(team); }
TEST_CASE("over MPI, the shuffled gradient depends on the number of ranks alone") {
    shuffled_is_free_of_the_ranks_sizes(team);
}
TEST_CASE("over MPI, micro-batch and prefix buffer depend on the split as documented") {
    micro_and_prefix_differ_as_documented(team);
}
TEST_CASE("over MPI, the hybrid loss is the sum of its parts on every split") { hybrid_is_the_sum_of_its_parts(team); }
TEST_CASE("over MPI, jitter and noise are the same for every split") { noise_is_free_of_everything(team); }
TEST_CASE("over MPI, scopes agree where their definitions do") { scopes_agree_where_they_must(team); }

TEST_CASE("over MPI, a stacked reduction gives the bits of one for each layer, in one sum") {
    const MpiComm comm(MPI_COMM_WORLD);
    REQUIRE(comm.size() == 4);
    check_stacked(compare_stacked(comm, padded(uneven(2, 4, 3), 1)));
}
