// Defects of many ranks: hangs, wrong groups, too many collectives.
#include <chrono>

#include "contract/stacked.hpp"
#include "contract/thread_team.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;
using namespace steelyard::testing::contract;

constexpr double limit = 0.3;  // seconds that a rank waits

struct Ending {
    std::string message = "ok";
    Code code = Code::ok;
    bool untouched = false;
    double seconds = 0;
};

/// Runs body(comm, ending) on `ranks` ranks, each of which ends in time, whatever happens.
template <class Body>
std::vector<Ending> end_on(int ranks, Body body) {
    ThreadGroup group(ranks, {.timeout = limit});
    std::vector<Ending> endings(static_cast<std::size_t>(ranks));
    run_ranks(group, [&](const ThreadComm& comm) {
        auto& ending = endings[static_cast<std::size_t>(comm.rank())];
        const auto start = std::chrono::steady_clock::now();
        body(comm, ending);
        ending.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    });
    return endings;
}

void keep(Ending& ending, const Status& status) {
    if (status || ending.code != Code::ok) return;
    ending.message = status.message();
    ending.code = status.code();
}

using SyncLayer = MoE<double, TopK, SwiGlu, SynchronizedLoss, ThreadComm>;

Rig<SyncLayer> sync_rig(index_t expert_count) {
    return Rig<SyncLayer>({.shape = {.tokens = 8, .width = 4, .experts = expert_count, .micro_steps = 4},
                           .router = {.k = 1},
                           .expert = {2}});
}

}  // namespace

TEST_CASE("defect 15: ranks with different numbers of experts are told so, and nothing of theirs is written") {
    const auto endings = end_on(3, [](const ThreadComm& comm, Ending& ending) {
        auto rig = sync_rig(comm.rank() == 1 ? 6 : 5);
        const Batch<double> batch(8, 4, 1);
        std::fill(rig.y.begin(), rig.y.end(), 77.0);
        const auto state = rig.state_bytes();
        keep(ending, rig.forward(comm, batch));
        ending.untouched = rig.y == std::vector<double>(rig.y.size(), 77.0) && rig.state_bytes() == state &&
                           !rig.backward(batch);
    });
    for (const Ending& ending : endings) {
        CAPTURE(ending.message);
        CHECK(ending.code == Code::comm_mismatch);
        CHECK(ending.message.find("ranks 0, 2: a sum of 10 int64; rank 1: a sum of 11 int64") != std::string::npos);
        CHECK(ending.untouched);
        CHECK(ending.seconds < limit + 5);
    }
}

TEST_CASE("defect 15: ranks with different numbers of collectives end in an error within the set time") {
    const auto endings = end_on(3, [](const ThreadComm& comm, Ending& ending) {
        auto rig = sync_rig(5);
        for (std::int64_t m = 0; m < (comm.rank() == 0 ? 3 : 2); ++m)  // rank 0 has one micro-step more
            keep(ending, rig.forward(comm, Batch<double>(8, 4, 1, {.micro_step = m, .total_tokens = 48})));
    });
    CHECK(endings[0].code == Code::comm_timeout);
    CHECK(endings[0].message.find("rank 0, without ranks 1, 2") != std::string::npos);
    CHECK(endings[0].seconds < limit + 5);
    CHECK(endings[1].code == Code::ok);
}

TEST_CASE("defect 15: a rank that stops leaves the others with an error, in forward or at the end of a step") {
    using Windows = MoE<double, TopK, SwiGlu, WindowedLoss<2>, ThreadComm>;
    const auto endings = end_on(3, [](const ThreadComm& comm, Ending& ending) {
        Rig<Windows> rig({.shape = {.tokens = 8, .width = 4, .experts = 5}, .router = {.k = 1}, .expert = {2}});
        keep(ending, rig.forward(comm, Batch<double>(8, 4, 1)));
        if (comm.rank() == 2) return;
        const auto state = rig.state_bytes();
        keep(ending, rig.end_step(comm, 0));
        ending.untouched = rig.state_bytes() == state;
    });
    for (const int r : {0, 1}) {
        const auto& ending = endings[static_cast<std::size_t>(r)];
        CHECK(ending.code == Code::comm_timeout);
        CHECK(ending.untouched);
        CHECK(ending.seconds < limit + 5);
    }
}

TEST_CASE("defect 16: the sum is over the group that the layer is given, not over all ranks") {
    // Four ranks: pairs (0, 1) and (2, 3) hold the same tokens, as tensor-parallel ranks do. The data group of each
    // rank is one member of each pair.
    std::vector<std::unique_ptr<ThreadGroup>> data_groups;
    for (int g = 0; g < 2; ++g) data_groups.push_back(std::make_unique<ThreadGroup>(2));
    const Split split = even(1, 2);
    const SynchronizedLoss balance{{}, strong};
    std::vector<SplitResult> results(4);
    ThreadGroup world(4);
    run_ranks(world, [&](const ThreadComm& comm) {
        const ThreadComm data = data_groups[static_cast<std::size_t>(comm.rank() % 2)]->comm(comm.rank() / 2);
        results[static_cast<std::size_t>(comm.rank())] = run_rank(data, balance, split, {});
    });
    ThreadTeam team;
    const SplitResult expected = run(team, balance, whole());
    const Counts load = run_rank(SelfComm{}, balance, whole(), {}).ranks[0].loads[0];
    for (std::size_t r = 0; r < 4; ++r) {
        CHECK(results[r].ranks[0].message == "ok");
        CHECK(results[r].ranks[0].loads[0] == load);
        CHECK(results[r].ranks[0].loads[0].back() == tokens);
    }
    for (const std::size_t first : {0, 1}) {
        SplitResult sum = results[first];
        for (std::size_t i = 0; i < sum.sums.size(); ++i) sum.sums[i] += results[first + 2].sums[i];
        for (std::size_t i = 0; i < sum.choices.size(); ++i) sum.choices[i] += results[first + 2].choices[i];
        check_equal(sum, expected);
    }
}

TEST_CASE("defect 17: all layers share one reduction for each micro-step, and one for the end of a step") {
    ThreadGroup group(2);
    std::vector<StackOutcome> outcomes(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        outcomes[static_cast<std::size_t>(comm.rank())] = compare_stacked(comm, uneven(2, 2, 3));
    });
    for (const StackOutcome& outcome : outcomes) {
        check_stacked(outcome);
        CHECK(outcome.stacked_sums * layers == outcome.single_sums);
    }
}
