// The gradient contract on ranks that are threads.
#include "contract/cases.hpp"
#include "contract/stacked.hpp"
#include "contract/thread_team.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing::contract;

ThreadTeam team;

}  // namespace

TEST_CASE("the synchronised gradient is the same for every split over ranks") { synchronized_is_free_of_ranks(team); }
TEST_CASE("the windowed gradient is the same for every split") { windowed_is_free_of_everything(team); }
TEST_CASE("the gradient of a whole buffer is the same for every split") { whole_buffer_is_free_of_everything(team); }
TEST_CASE("the sequence gradient is the same for every split that keeps sequences whole") {
    sequence_is_free_of_everything_that_keeps_sequences(team);
}
TEST_CASE("the gradient of the z-loss is the same for every split") { z_loss_is_free_of_everything(team); }
TEST_CASE("the bias after a step is the same for every split") { bias_is_free_of_everything(team); }
TEST_CASE("the shuffled gradient depends on the number of ranks alone") { shuffled_is_free_of_the_ranks_sizes(team); }
TEST_CASE("micro-batch and prefix buffer depend on the split as documented") {
    micro_and_prefix_differ_as_documented(team);
}
TEST_CASE("the hybrid loss is the sum of its parts on every split") { hybrid_is_the_sum_of_its_parts(team); }
TEST_CASE("jitter and noise are the same for every split") { noise_is_free_of_everything(team); }
TEST_CASE("scopes agree where their definitions do") { scopes_agree_where_they_must(team); }

TEST_CASE("a stacked reduction gives the bits of one for each layer, in one sum") {
    ThreadGroup group(4);
    std::vector<StackOutcome> outcomes(4);
    const Split split = padded(uneven(2, 4, 3), 1);
    run_ranks(group, [&](const ThreadComm& comm) {
        outcomes[static_cast<std::size_t>(comm.rank())] = compare_stacked(comm, split);
    });
    for (const StackOutcome& outcome : outcomes) check_stacked(outcome);
}
