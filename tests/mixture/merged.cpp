#include "steelyard/mixture/merged.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "layer/gradient_case.hpp"
#include "steelyard/cpu/merge.hpp"
#include "steelyard/router/causality.hpp"
#include "support/rig.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

template <class ExpertT = SwiGlu, class Retention = KeepActivations>
using Layer = MoE<double, MergeExperts, ExpertT, NoBalance, SelfComm, Dropless, Retention>;

constexpr LayerShape shape{.tokens = 9, .width = 5, .experts = 3, .sequences = 3};

template <class LayerT>
Status causality(const MergeExperts& router) {
    Rig<LayerT> rig({.shape = {.tokens = 12, .width = 5, .experts = 3}, .router = router, .expert = {4}});
    const auto forward = [&](view<const double, 2> x, view<double, 2> y) {
        throw_if_refused(rig.layer.forward({}, {.x = x,
                                                .params = rig.layer.read_only_params(rig.params),
                                                .y = y,
                                                .context = rig.context,
                                                .workspace = rig.workspace,
                                                .state = rig.state}));
    };
    return check_causality(forward, 12, 5);
}

}  // namespace

TEST_CASE("Merged experts pass finite differences in full") {
    check_gradients<Layer<>>({.shape = shape, .expert = {4}}, {.padded = true});
    check_gradients<Layer<Mlp, RecomputeActivations>>(
        {.shape = shape, .expert = {.hidden = 4, .activation = Activation::gelu, .bias = true}});
    check_gradients<Layer<>>({.shape = shape, .router = {.segment = 2, .first = FirstSegment::uniform}, .expert = {4}},
                             {.padded = true});
    check_gradients<MoE<double, MergeExperts, WithShared<SwiGlu>>>({.shape = shape, .expert = {{4}, {3}}});
}

TEST_CASE("A one-hot gate computes that expert; equal experts compute themselves") {
    Rig<Layer<>> rig({.shape = {.tokens = 6, .width = 5, .experts = 3}, .expert = {4}});
    const Batch<double> batch(6, 5, 2);
    // Logits of +-1e4 along the pooled vector: expert 1 takes all.
    REQUIRE(rig.forward(batch).ok());
    std::vector<double> mean(5), y(30);
    for (std::size_t i = 0; i < 30; ++i) mean[i % 5] += batch.x[i] / 6;
    double centre = 0;
    for (const double m : mean) centre += m / 5;
    for (index_t e = 0; e < 3; ++e)
        for (index_t j = 0; j < 5; ++j)
            rig.params.router.weight(e, j) = (e == 1 ? 1e4 : -1e4) * (mean[static_cast<std::size_t>(j)] - centre);
    REQUIRE(rig.forward(batch).ok());
    Rig<MoE<double, TopK, SwiGlu>> alone(
        {.shape = {.tokens = 6, .width = 5, .experts = 1}, .router = {.k = 1}, .expert = {4}});
    std::copy_n(rig.params.experts.gate[1].data, 20, alone.params.experts.gate.data);
    std::copy_n(rig.params.experts.up[1].data, 20, alone.params.experts.up.data);
    std::copy_n(rig.params.experts.down[1].data, 20, alone.params.experts.down.data);
    REQUIRE(alone.forward(batch).ok());
    for (std::size_t i = 0; i < 30; ++i) CHECK(rig.y[i] == doctest::Approx(alone.y[i]).epsilon(1e-12));

    for (const index_t e : {0, 2}) {
        std::copy_n(rig.params.experts.gate[1].data, 20, rig.params.experts.gate[e].data);
        std::copy_n(rig.params.experts.up[1].data, 20, rig.params.experts.up[e].data);
        std::copy_n(rig.params.experts.down[1].data, 20, rig.params.experts.down[e].data);
    }
    fill_random<double>({rig.params.router.weight.data, 15}, 77);
    REQUIRE(rig.forward(batch).ok());
    for (std::size_t i = 0; i < 30; ++i) CHECK(rig.y[i] == doctest::Approx(alone.y[i]).epsilon(1e-12));
}

TEST_CASE("Padding holds anything and changes nothing, and a sequence does not see another") {
    Rig<Layer<>> rig({.shape = shape, .expert = {4}});
    Batch<double> batch(9, 5, 11);
    batch.sequences = {0, 3, 3, 9};
    batch.mask = {1, 0, 1, 1, 1, 0, 1, 1, 1};
    REQUIRE(rig.forward(batch).ok());
    REQUIRE(rig.backward(batch).ok());
    const auto y = rig.y, dx = rig.dx;
    for (const index_t t : {1, 5})
        for (index_t j = 0; j < 5; ++j) {
            const auto at = static_cast<std::size_t>(t * 5 + j);
            CHECK(y[at] == 0.0);
            CHECK(dx[at] == 0.0);
            batch.x[at] = batch.dy[at] = std::numeric_limits<double>::quiet_NaN();
        }
    REQUIRE(rig.forward(batch).ok());
    REQUIRE(rig.backward(batch).ok());
    CHECK(rig.y == y);
    CHECK(rig.dx == dx);
    batch.x[0] += 1.0;
    REQUIRE(rig.forward(batch).ok());
    for (std::size_t i = 15; i < 45; ++i) CHECK(rig.y[i] == y[i]);
}

TEST_CASE("Lory routes a segment by the one before it: causal with a uniform first segment, not with its own mean") {
    CHECK(causality<Layer<>>({.segment = 4, .first = FirstSegment::uniform}).message() == "ok");
    CHECK(!causality<Layer<>>({.segment = 4, .first = FirstSegment::own_mean}).ok());
    CHECK(!causality<Layer<>>({}).ok());  // SMEAR
}

TEST_CASE("The first segment's own mean routes it, but no gradient of the routing reaches its tokens") {
    // With one segment the gate sees x, so dx must be that of the experts alone: the one with a frozen gate.
    const Batch<double> batch(4, 5, 5);
    Rig<Layer<>> own({.shape = {.tokens = 4, .width = 5, .experts = 3}, .router = {.segment = 4}, .expert = {4}});
    REQUIRE(own.forward(batch).ok());
    REQUIRE(own.backward(batch).ok());
    Rig<Layer<>> through({.shape = {.tokens = 4, .width = 5, .experts = 3}, .expert = {4}});
    REQUIRE(through.forward(batch).ok());
    REQUIRE(through.backward(batch).ok());
    CHECK(own.y == through.y);
    CHECK(own.dx != through.dx);
    CHECK(std::equal(own.grad_values().begin(), own.grad_values().end(), through.grad_values().begin()));
    // A later run learns through the one before it.
    Batch<double> two(8, 5, 5);
    for (std::size_t i = 0; i < 20; ++i) two.dy[i] = 0.0;  // only the second run's outputs count
    Rig<Layer<>> runs({.shape = {.tokens = 8, .width = 5, .experts = 3}, .router = {.segment = 4}, .expert = {4}});
    REQUIRE(runs.forward(two).ok());
    REQUIRE(runs.backward(two).ok());
    double first = 0;
    for (std::size_t i = 0; i < 20; ++i) first += std::abs(runs.dx[i]);
    CHECK(first > 0.0);
}

TEST_CASE("Merged experts give the same bits for any number of threads") {
    std::vector<float> y, dx, grads;
    for (const int threads : {1, 2, 3}) {
        Rig<MoE<float, MergeExperts, SwiGlu>> rig({.shape = {.tokens = 300, .width = 70, .experts = 5, .sequences = 3},
                                                   .router = {.segment = 40},
                                                   .expert = {33},
                                                   .device = {threads}});
        Batch<float> batch(300, 70, 4);
        batch.sequences = {0, 101, 220, 300};
        REQUIRE(rig.forward(batch).ok());
        REQUIRE(rig.backward(batch).ok());
        if (threads == 1) y = rig.y, dx = rig.dx, grads.assign(rig.grad_values().begin(), rig.grad_values().end());
        CHECK(rig.y == y);
        CHECK(rig.dx == dx);
        CHECK(std::equal(grads.begin(), grads.end(), rig.grad_values().begin()));
    }
}

TEST_CASE("Merged experts with no tokens; refusals") {
    Rig<Layer<>> rig({.shape = shape, .expert = {4}});
    Batch<double> none(0, 5, 1);
    CHECK(rig.forward(none).ok());
    CHECK(rig.backward(none).ok());
    CHECK(MergeExperts{.segment = -1}.check(shape).message() ==
          "steelyard: router: segment: expected 0 (a sequence is a segment) or a number of tokens, came -1");
    Batch<double> batch(3, 5, 1);
    batch.x[1] = std::numeric_limits<double>::quiet_NaN();
    CHECK(rig.forward(batch).tensor() == "logits of segment 0");
}

TEST_CASE("Packed experts are not merged: what cannot be read is refused, and a copy beside the matrices changes no bit") {
    using Single = MoE<float, MergeExperts, SwiGlu, NoBalance>;
    const SwiGlu expert{4};
    Rig<Single> rig({.shape = shape, .expert = expert}), plain({.shape = shape, .expert = expert});
    const Batch<float> batch(9, 5, 2);
    auto args = rig.forward_args(batch);
    auto& experts = args.params.experts;
    const Bytes bytes(expert.packed_bytes<float>(Cpu{}, shape));
    REQUIRE(expert.pack<float>(Cpu{}, shape, experts, bytes.span()).ok());
    experts.packed = {bytes.data(), bytes.size()};
    REQUIRE(plain.forward(batch).ok());
    REQUIRE(rig.layer.forward({}, args).message() == "ok");
    CHECK(same_bits(rig.y, plain.y));
    experts.down.data = nullptr;
    CHECK(rig.layer.forward({}, args).message() ==
          "steelyard: layer.forward: params.experts.down: expected a tensor of [3, 5, 4], came a null pointer");
}
