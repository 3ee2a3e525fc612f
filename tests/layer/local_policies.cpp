// A layer whose policy is local to its rank contains no call into the comm backend: otherwise this would not link.
#include <doctest/doctest.h>

#include "support/rig.hpp"
#include "support/untouchable_comm.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

template <class BalanceT>
void trains(const BalanceT& balance) {
    Rig<MoE<float, TopK, SwiGlu, BalanceT, UntouchableComm>> rig(
        {.shape = {.tokens = 8, .width = 4, .experts = 4, .sequences = 2, .micro_steps = 2},
         .router = {.k = 2},
         .expert = {3},
         .balance = balance});
    const Batch<float> batch(8, 4, 1);
    std::vector<std::int64_t> memory(10);
    Stack stack(memory, 2, 5);
    auto args = rig.forward_args(batch);
    CHECK(rig.forward(UntouchableComm{}, batch).ok());
    CHECK(rig.backward(batch).ok());
    CHECK(rig.end_step(UntouchableComm{}, 0).ok());
    args.stack = &stack;
    CHECK(rig.layer.forward(UntouchableComm{}, args).ok());
    CHECK(rig.layer.conclude(stack, 0, rig.context, rig.workspace, rig.state).ok());
    CHECK(rig.backward(batch).ok());
    CHECK(rig.forward(UntouchableComm{}, batch, Mode::evaluate).ok());
}

}  // namespace

TEST_CASE("a layer with a rank-local policy links against a backend without sums") {
    trains(NoBalance{});
    trains(MicroBatchLoss{});
    trains(SequenceLoss{});
    trains(RouterZLoss{});
    trains(Balance<Buffered<MicroBatch>, LoadBalancingLoss>{});
    trains(Balance<MicroBatch, LossFreeBias>{});
    trains(AllOf{MicroBatchLoss{}, SequenceLoss{}, RouterZLoss{}});
    trains(Scheduled<MicroBatchLoss, AllOf<SequenceLoss, RouterZLoss>>{1, {}, {}});
}
