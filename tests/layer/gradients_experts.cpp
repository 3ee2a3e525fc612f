// Gradients of the whole layer for each expert, with activations kept and recomputed.
#include "layer/gradient_case.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

template <class ExpertT>
void check(const ExpertT& expert, const GradientCase& options = {}) {
    const SynchronizedLoss balance{{}, {.coefficient = 2.0}};
    check_gradients<MoE<double, TopK, ExpertT, SynchronizedLoss>>(
        {.shape = gradient_shape, .router = {.k = 2}, .expert = expert, .balance = balance}, options);
    using Recomputing = MoE<double, TopK, ExpertT, SynchronizedLoss, SelfComm, Dropless, RecomputeActivations>;
    check_gradients<Recomputing>({.shape = gradient_shape, .router = {.k = 2}, .expert = expert, .balance = balance},
                                 options);
}

}  // namespace

TEST_CASE("gradients of the whole layer with SwiGlu experts") {
    check(SwiGlu{4});
    check(SwiGlu{4}, {.padded = true});
}

TEST_CASE("gradients of the whole layer with Mlp experts of each activation, with and without bias") {
    for (const Activation activation : {Activation::relu, Activation::relu2, Activation::gelu, Activation::silu})
        for (const bool bias : {false, true}) {
            CAPTURE(static_cast<int>(activation));
            CAPTURE(bias);
            // Seed 3: no pre-activation is so near 0 that a difference would step over the kink of ReLU.
            check(Mlp{4, activation, bias}, {.seed = 3, .padded = bias});
        }
}

TEST_CASE("gradients of the whole layer with a shared expert beside the routed ones") {
    check(WithShared{SwiGlu{4}, SwiGlu{7}}, {.padded = true});
    check(WithShared{Mlp{4, Activation::gelu, true}, SwiGlu{3}});
    check(WithShared{SwiGlu{4}, Mlp{3, Activation::silu, true}}, {.padded = true});
}
