// Nothing is allocated inside a layer's calls: not by malloc, nor by operator new.
#include "support/count_allocations.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{
    .tokens = 300, .width = 40, .experts = 8, .sequences = 3, .micro_steps = 2, .ranks = 2};

using Everything = AllOf<BufferedLoss, SequenceLoss, ShuffledLoss, WindowedLoss<2>, LossFree, RouterZLoss>;

template <class T, class Retention>
void check(int threads) {
    using Layer = MoE<T, TopK, WithShared<SwiGlu, Mlp>, Everything, SelfComm, Dropless, Retention>;
    Rig<Layer> rig({.shape = shape,
                    .router = {.k = 3, .groups = 4, .kept_groups = 2, .jitter = 0.1, .noise = 0.1},
                    .expert = {SwiGlu{24}, Mlp{16, Activation::gelu, true}},
                    .device = {.threads = threads}});
    Batch<T> batch(300, 40, 1);
    batch.mask.assign(300, 1);
    batch.mask[17] = 0;
    batch.sequences = {0, 100, 220, 300};
    std::vector<std::int64_t> memory(200);
    Stack stack(memory, 2, 100);
    auto forward = rig.forward_args(batch);
    const auto backward = rig.backward_args(batch);
    const auto train = [&](std::int64_t step) {
        forward.tokens.step.step = step;
        forward.tokens.step.total_tokens = 598;
        forward.tokens.step.micro_step = 0;
        forward.stack = nullptr;
        bool ok = rig.layer.forward({}, forward).ok() && rig.layer.backward(backward).ok();
        forward.tokens.step.micro_step = 1;
        forward.stack = &stack;
        stack.clear();
        ok = ok && rig.layer.forward({}, forward).ok() && stack.begin(SelfComm{}).ok() && stack.end(SelfComm{}).ok();
        ok = ok && rig.layer.conclude(stack, 0, rig.context, rig.workspace, rig.state).ok();
        ok = ok && rig.layer.backward(backward).ok();
        forward.stack = nullptr;
        forward.tokens.mode = Mode::evaluate;
        ok = ok && rig.layer.forward({}, forward).ok();
        forward.tokens.mode = Mode::train;
        return ok && rig.layer.end_step({}, step, rig.state, rig.workspace).ok();
    };
    // With more threads than one, OpenMP sets its team up on the first call.
    if (threads > 1) REQUIRE(train(0));
    const std::size_t before = allocations();
    const bool ok = train(1) && train(2);
    const std::size_t made = allocations() - before;
    CHECK(ok);
    CHECK(made == 0);
}

}  // namespace

TEST_CASE("the counter counts") {
    const std::size_t before = allocations();
    int* volatile one = new int(1);  // volatile: an allocation that nobody sees may be left out
    delete one;
    const Bytes block(100);
    CHECK(allocations() - before == 2);
}

TEST_CASE("forward, backward, conclude, evaluation and the end of a step allocate nothing") {
    check<double, KeepActivations>(1);
    check<float, RecomputeActivations>(1);
}

// Plain threads are started in every call, which allocates.
#if defined(STEELYARD_CPU_PLAIN_THREADS)
constexpr bool threads_allocate = true;
#else
constexpr bool threads_allocate = false;
#endif

TEST_CASE("on several threads they allocate nothing either" * doctest::skip(threads_allocate)) { check<float, KeepActivations>(2); }
