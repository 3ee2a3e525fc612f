// Gradients of the whole layer under each balance strategy.
#include "layer/gradient_case.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LoadBalancingLoss strong{.coefficient = 2.0};

template <class BalanceT, class Retention = KeepActivations>
void check(const BalanceT& balance, const GradientCase& options = {}) {
    using Layer = MoE<double, TopK, SwiGlu, BalanceT, SelfComm, Dropless, Retention>;
    check_gradients<Layer>({.shape = gradient_shape, .router = {.k = 2}, .expert = {.hidden = 4}, .balance = balance},
                           options);
}

}  // namespace

TEST_CASE("gradients of the whole layer without balance") { check(NoBalance{}); }

TEST_CASE("gradients of the whole layer with the balance loss by sequence, with and without padding") {
    check(SequenceLoss{{}, strong});
    check(SequenceLoss{{}, strong}, {.padded = true});
}

TEST_CASE("gradients of the whole layer with the balance loss by micro-batch, of both normalisations") {
    check(MicroBatchLoss{{}, strong}, {.padded = true});
    check(MicroBatchLoss{{}, {2.0, LoadNormalization::by_token}});
}

TEST_CASE("gradients of the whole layer with the synchronised balance loss") {
    check(SynchronizedLoss{{}, strong});
    check(SynchronizedLoss{{}, strong}, {.padded = true});
}

TEST_CASE("gradients of the whole layer with buffers that show the prefix, or the whole step") {
    check(BufferedLoss{{}, strong}, {.padded = true});
    check(Balance<Buffered<MicroBatch>, LoadBalancingLoss>{{}, strong});
    check(Balance<Buffered<Synchronized, Extent::whole>, LoadBalancingLoss>{{}, strong});
}

TEST_CASE("gradients of the whole layer with the load of a random sample") {
    check(ShuffledLoss{Shuffled{3}, strong}, {.padded = true});
}

TEST_CASE("gradients of the whole layer with the load of past steps") { check(WindowedLoss<2>{{}, strong}); }

TEST_CASE("gradients of the whole layer with the hybrid loss, activations kept and recomputed") {
    check(hybrid_loss(2.0, 0.5), {.padded = true});
    check<HybridLoss, RecomputeActivations>(hybrid_loss(2.0, 0.5), {.padded = true});
}

TEST_CASE("gradients of the whole layer with a selection bias") {
    check(LossFree{{}, {.rate = 0.02}});
    check(LossFree{{}, {.rate = 0.02, .centred = true}}, {.padded = true});
}

TEST_CASE("gradients of the whole layer with the z-loss") {
    check(RouterZLoss{{}, {.coefficient = 0.5}});
    check(RouterZLoss{{}, {.coefficient = 0.5}}, {.padded = true});
}

TEST_CASE("gradients of the whole layer before and after a scheduled switch") {
    using Switch = Scheduled<MicroBatchLoss, BufferedLoss>;
    check(Switch{1, {{}, strong}, {{}, strong}});
    check(Switch{5, {{}, strong}, {{}, strong}});
}
