// Defects of padding and packing.
#include <doctest/doctest.h>

#include "defects/first_come.hpp"
#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{.tokens = 20, .width = 5, .experts = 6, .sequences = 3};

/// The same tokens with padding between them; padding looks like the first token.
Batch<double> pad(const Batch<double>& compact) {
    Batch<double> padded = compact;
    padded.x.clear(), padded.dy.clear();
    for (index_t t = 0; t < 20; ++t) {
        const bool valid = t % 5 < 3;  // 12 of 20
        const auto from = static_cast<std::size_t>(valid ? (t / 5 * 3 + t % 5) * 5 : 0);
        padded.mask.push_back(valid);
        for (std::size_t j = 0; j < 5; ++j) {
            padded.x.push_back(compact.x[from + j]);
            padded.dy.push_back(compact.dy[from + j]);
        }
    }
    return padded;
}

}  // namespace

TEST_CASE("defect 10: padding counts in no loss, no bias and no capacity") {
    const AllOf balance{SynchronizedLoss{{}, {1.0}}, SequenceLoss{{}, {1.0}}, LossFree{}, RouterZLoss{{}, {0.3}}};
    using Layer = MoE<double, TopK, SwiGlu, std::remove_cv_t<decltype(balance)>, SelfComm, FirstCome>;
    const typename Layer::Config config{
        .shape = shape, .router = {.k = 2}, .expert = {3}, .balance = balance, .overflow = {3}};
    Rig<Layer> compact(config), padded(config);
    const Batch<double> tokens(12, 5, 1), with_padding = pad(tokens);
    REQUIRE(compact.forward(tokens).ok());
    REQUIRE(padded.forward(with_padding).ok());
    REQUIRE(compact.backward(tokens).ok());
    REQUIRE(padded.backward(with_padding).ok());

    CHECK(padded.balance_loss() == doctest::Approx(compact.balance_loss()).epsilon(1e-14));
    const auto seen = std::get<0>(padded.record().of);
    CHECK(seen.load(0, 6) == 12);
    for (index_t e = 0; e <= 6; ++e) CHECK(seen.load(0, e) == std::get<0>(compact.record().of).load(0, e));
    const auto plan = padded.layer.plan(padded.context), expected = compact.layer.plan(compact.context);
    for (index_t e = 0; e <= 6; ++e) CHECK(plan.offsets[e] == expected.offsets[e]);
    CHECK(relative_difference<double>(padded.grad_values(), compact.grad_values()) <= 1e-13);
    for (index_t t = 0; t < 20; ++t)
        for (index_t j = 0; j < 5; ++j) {
            const double y = padded.y[static_cast<std::size_t>(5 * t + j)];
            CHECK(y == (t % 5 < 3 ? compact.y[static_cast<std::size_t>((t / 5 * 3 + t % 5) * 5 + j)] : 0.0));
        }
    REQUIRE(compact.end_step(0).ok());
    REQUIRE(padded.end_step(0).ok());
    CHECK(padded.state_bytes() == compact.state_bytes());
}

TEST_CASE("defect 11: packed sequences have an f and a P each") {
    using Layer = MoE<double, TopK, SwiGlu, SequenceLoss>;
    const typename Layer::Config config{.shape = shape, .router = {.k = 2}, .expert = {3}, .balance = {{}, {1.0}}};
    Batch<double> packed(20, 5, 2);
    std::fill(packed.dy.begin(), packed.dy.end(), 0.0);
    packed.sequences = {0, 4, 13, 20};

    Rig<Layer> together(config), apart(config), as_one(config);
    REQUIRE(together.forward(packed).ok());
    REQUIRE(together.backward(packed).ok());
    double loss = 0;
    for (std::size_t s = 0; s < 3; ++s) {
        Batch<double> one;
        one.width = 5;
        one.step.total_tokens = 20;
        one.x.assign(packed.x.begin() + 5 * packed.sequences[s], packed.x.begin() + 5 * packed.sequences[s + 1]);
        one.dy.assign(one.x.size(), 0.0);
        REQUIRE(apart.forward(one).ok());
        REQUIRE(apart.backward(one).ok());
        loss += apart.balance_loss();
    }
    CHECK(together.balance_loss() == doctest::Approx(loss).epsilon(1e-14));
    CHECK(relative_difference<double>(together.grad_values(), apart.grad_values()) <= 1e-12);

    packed.sequences.clear();
    REQUIRE(as_one.forward(packed).ok());
    CHECK(std::abs(as_one.balance_loss() - loss) > 1e-3);  // the defect would show
}
