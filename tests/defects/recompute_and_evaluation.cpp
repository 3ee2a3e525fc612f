// Defects of activation recompute, of evaluation, and of when a bias moves.
#include <doctest/doctest.h>

#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{.tokens = 12, .width = 5, .experts = 6, .micro_steps = 3};

using Everything = AllOf<BufferedLoss, WindowedLoss<2>, LossFree>;
const Everything everything{BufferedLoss{{}, {1.0}}, WindowedLoss<2>{{}, {1.0}}, LossFree{{}, {.rate = 0.25}}};

template <class Retention = KeepActivations>
using Layer = MoE<double, TopK, SwiGlu, Everything, SelfComm, Dropless, Retention>;

template <class Retention = KeepActivations>
Rig<Layer<Retention>> make() {
    return Rig<Layer<Retention>>({.shape = shape, .router = {.k = 2}, .expert = {3}, .balance = everything});
}

Batch<double> batch_at(std::int64_t step, std::int64_t micro_step) {
    return {12, 5, static_cast<std::uint64_t>(10 * step + micro_step),
            {.step = step, .micro_step = micro_step, .total_tokens = 36}};
}

/// Two steps; `forwards` is how often each forward runs before its backward.
template <class Retention>
std::vector<std::byte> train(int forwards, std::vector<double>& grads) {
    auto rig = make<Retention>();
    for (std::int64_t step = 0; step < 2; ++step) {
        for (std::int64_t m = 0; m < 3; ++m) {
            for (int n = 0; n < forwards; ++n) REQUIRE(rig.forward(batch_at(step, m)).ok());
            REQUIRE(rig.backward(batch_at(step, m)).ok());
        }
        REQUIRE(rig.end_step(step).ok());
    }
    grads.assign(rig.grad_values().begin(), rig.grad_values().end());
    return rig.state_bytes();
}

}  // namespace

TEST_CASE("defect 12: recomputing a forward counts nothing twice and sees the same f") {
    std::vector<double> once, thrice, recomputed;
    const auto state = train<KeepActivations>(1, once);
    CHECK(train<KeepActivations>(3, thrice) == state);
    CHECK(train<RecomputeActivations>(1, recomputed) == state);
    CHECK(same_bits(thrice, once));
    CHECK(same_bits(recomputed, once));

    // All micro-steps first, as with a pipeline, then each again before its backward.
    auto rig = make();
    std::vector<double> losses;
    for (std::int64_t m = 0; m < 3; ++m) {
        REQUIRE(rig.forward(batch_at(0, m)).ok());
        losses.push_back(rig.balance_loss());
    }
    for (const std::int64_t m : {2, 0, 1}) {
        REQUIRE(rig.forward(batch_at(0, m)).ok());
        CHECK(rig.balance_loss() == losses[static_cast<std::size_t>(m)]);
    }
    REQUIRE(rig.end_step(0).ok());
    const auto windowed = std::get<1>(rig.balance_state().of);
    CHECK(windowed.past[6] == 36);  // tokens of the step, each once
}

TEST_CASE("defect 13: evaluation leaves no trace in the training") {
    const auto train_and = [](bool evaluate) {
        auto rig = make();
        std::vector<double> all;
        for (std::int64_t step = 0; step < 3; ++step) {
            for (std::int64_t m = 0; m < 3; ++m) {
                if (evaluate) {  // other tokens, under the key that the training comes to next
                    Batch<double> held_out = batch_at(7, m);
                    held_out.step = batch_at(step, m).step;
                    REQUIRE(rig.forward(held_out, Mode::evaluate).ok());
                }
                REQUIRE(rig.forward(batch_at(step, m)).ok());
                REQUIRE(rig.backward(batch_at(step, m)).ok());
                all.insert(all.end(), rig.y.begin(), rig.y.end());
                if (evaluate) REQUIRE(rig.forward(batch_at(step, m), Mode::evaluate).ok());
            }
            REQUIRE(rig.end_step(step).ok());
            if (evaluate) REQUIRE(rig.forward(batch_at(step + 1, 0), Mode::evaluate).ok());
        }
        all.insert(all.end(), rig.grad_values().begin(), rig.grad_values().end());
        return std::pair(all, rig.state_bytes());
    };
    CHECK(train_and(true) == train_and(false));
}

TEST_CASE("defect 14: the bias moves once for each optimizer step, not for each micro-batch") {
    auto rig = make();
    const auto bias = std::get<2>(rig.balance_state().of).bias;
    std::vector<std::int64_t> counts(6);
    for (std::int64_t m = 0; m < 3; ++m) {
        REQUIRE(rig.forward(batch_at(0, m)).ok());
        count_choices(rig.routing(), std::span(counts));
        REQUIRE(rig.backward(batch_at(0, m)).ok());
        for (index_t e = 0; e < 6; ++e) CHECK(bias[e] == 0.0f);
    }
    REQUIRE(rig.end_step(0).ok());
    for (index_t e = 0; e < 6; ++e) {
        const std::int64_t starved = 72 - 6 * counts[static_cast<std::size_t>(e)];
        CHECK(bias[e] == 0.25f * static_cast<float>((starved > 0) - (starved < 0)));
    }
}
