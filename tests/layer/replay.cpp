// A forward that is run again for the same (step, micro-step), as activation recompute does, counts nothing twice.
#include <doctest/doctest.h>

#include <vector>

#include "contract/stacked.hpp"
#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;
using contract::Counted;
using contract::strong;

constexpr LayerShape shape{.tokens = 12, .width = 5, .experts = 6, .sequences = 2, .micro_steps = 4, .ranks = 2};

struct Outcome {
    bool same_results = true, same_state = true;
    int more_sums = 0, sums = 0;
    std::string message = "ok";
};

/// Micro-steps 0 to 3, then 2, 0, 3, 1 again, on one rank of two. A replay gives what the first pass gave, or, for
/// scopes that look ahead, what every other replay gives.
template <class BalanceT>
Outcome replay(const ThreadComm& plain, const BalanceT& balance, bool looks_ahead) {
    Outcome outcome;
    const Counted<ThreadComm> comm{plain, &outcome.sums};
    Rig<MoE<double, TopK, SwiGlu, BalanceT, Counted<ThreadComm>>> rig(
        {.shape = shape, .router = {.k = 2, .jitter = 0.1, .noise = 0.1}, .expert = {4}, .balance = balance});
    const auto keep = [&](Status status) {
        if (!status && outcome.message == "ok") outcome.message = status.message();
    };
    const auto once = [&](std::int64_t step, std::int64_t m) {
        const auto seed = static_cast<std::uint64_t>(100 * comm.rank() + 10 * step + m);
        Batch<double> batch(12 - 3 * comm.rank(), 5, seed,
                            {.step = step, .micro_step = m, .total_tokens = 84, .token_offset = 21 * m});
        rig.clear_grads();
        keep(rig.forward(comm, batch));
        keep(rig.backward(batch));
        std::vector<double> all(rig.y);
        all.insert(all.end(), rig.dx.begin(), rig.dx.end());
        all.insert(all.end(), rig.grad_values().begin(), rig.grad_values().end());
        all.push_back(rig.balance_loss());
        return all;
    };
    for (const std::int64_t step : {0, 1}) {
        std::vector<std::vector<double>> first;
        for (std::int64_t m = 0; m < 4; ++m) first.push_back(once(step, m));
        const auto state = rig.state_bytes();
        const int sums = outcome.sums;
        for (const std::int64_t m : {2, 0, 3, 1}) {
            const auto again = once(step, m);
            outcome.same_results = outcome.same_results &&
                                   same_bits(again, looks_ahead ? once(step, m) : first[static_cast<std::size_t>(m)]);
            outcome.same_state = outcome.same_state && rig.state_bytes() == state;
        }
        outcome.more_sums += outcome.sums - sums;
        keep(rig.end_step(comm, step));
    }
    return outcome;
}

template <class BalanceT>
void check_replay(const BalanceT& balance, bool looks_ahead = false) {
    ThreadGroup group(2);
    std::vector<Outcome> outcomes(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        outcomes[static_cast<std::size_t>(comm.rank())] = replay(comm, balance, looks_ahead);
    });
    for (const Outcome& outcome : outcomes) {
        CHECK(outcome.message == "ok");
        CHECK(outcome.same_results);
        CHECK(outcome.same_state);
        CHECK(outcome.more_sums == 0);
    }
}

}  // namespace

TEST_CASE("a replay under the synchronised loss sees the same f and sums nothing again") {
    check_replay(SynchronizedLoss{{}, strong});
}
TEST_CASE("a replay under a prefix buffer sees the prefix that it saw, also after later micro-steps") {
    check_replay(BufferedLoss{{}, strong});
    check_replay(Balance<Buffered<MicroBatch>, LoadBalancingLoss>{{}, strong});
}
TEST_CASE("every replay under a whole buffer sees the whole step") {
    check_replay(Balance<Buffered<Synchronized, Extent::whole>, LoadBalancingLoss>{{}, strong}, true);
}
TEST_CASE("a replay under a window, a random sample or a bias changes nothing") {
    check_replay(WindowedLoss<2>{{}, strong});
    check_replay(ShuffledLoss{Shuffled{1}, strong});
    check_replay(LossFree{{}, {.rate = 0.05}});
}
TEST_CASE("a replay under a composition or a schedule changes nothing") {
    check_replay(AllOf{hybrid_loss(3.0, 0.5), LossFree{{}, {.rate = 0.05}}, RouterZLoss{}});
    check_replay(Scheduled<MicroBatchLoss, SynchronizedLoss>{1, {{}, strong}, {{}, strong}});
}
