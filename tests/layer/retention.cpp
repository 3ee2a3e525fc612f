#include <doctest/doctest.h>

#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

template <class T, class Retention>
using Layer = MoE<T, TopK, WithShared<SwiGlu, Mlp>, SynchronizedLoss, SelfComm, Dropless, Retention>;

template <class T, class Retention>
Rig<Layer<T, Retention>> make() {
    return Rig<Layer<T, Retention>>({.shape = {.tokens = 150, .width = 70, .experts = 7},
                                     .router = {.k = 3},
                                     .expert = {SwiGlu{50}, Mlp{33, Activation::gelu, true}},
                                     .balance = {{}, {1.0}},
                                     .device = {.threads = 2}});
}

template <class T>
void check() {
    auto keeping = make<T, KeepActivations>();
    auto recomputing = make<T, RecomputeActivations>();
    Batch<T> batch(150, 70, 3);
    batch.mask.assign(150, 1);
    batch.mask[7] = batch.mask[149] = 0;
    REQUIRE(keeping.forward(batch).ok());
    REQUIRE(keeping.backward(batch).ok());
    REQUIRE(recomputing.forward(batch).ok());
    // The workspace is dead between the calls.
    std::fill_n(recomputing.workspace.data(), recomputing.workspace.size(), std::byte{0xFF});
    REQUIRE(recomputing.backward(batch).ok());
    CHECK(same_bits(keeping.y, recomputing.y));
    CHECK(same_bits(keeping.dx, recomputing.dx));
    CHECK(same_bits(std::span<const T>(keeping.grad_values()), std::span<const T>(recomputing.grad_values())));
    CHECK(keeping.balance_loss() == doctest::Approx(recomputing.balance_loss()).epsilon(1e-14));
    CHECK(keeping.state_bytes() == recomputing.state_bytes());

    const auto inner = static_cast<index_t>(sizeof(T)) * (150 * 3 * 2 * 50 + 150 * 33);
    CHECK(keeping.layer.context_bytes() - recomputing.layer.context_bytes() >= inner);
    CHECK(keeping.layer.context_bytes() - recomputing.layer.context_bytes() < inner + 3 * 64);
}

}  // namespace

TEST_CASE("recomputing activations gives the bits of keeping them, in a context without them") {
    check<double>();
    check<float>();
}
