// Defects of definition: what f and P are made of.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "defects/first_come.hpp"
#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{.tokens = 12, .width = 5, .experts = 6};

/// E * sum_i f_i P_i from the routing's own choices and probabilities, in plain loops.
template <class T>
double loss_of(const Routing<T>& routing) {
    const index_t tokens = routing.probs.extents[0], experts = routing.probs.extents[1], k = routing.expert.extents[1];
    double loss = 0;
    for (index_t i = 0; i < experts; ++i) {
        double choices = 0, probs = 0;
        for (index_t t = 0; t < tokens; ++t) {
            probs += static_cast<double>(routing.probs(t, i));
            for (index_t c = 0; c < k; ++c) choices += routing.expert(t, c) == i;
        }
        loss += choices / static_cast<double>(k * tokens) * probs / static_cast<double>(tokens);
    }
    return static_cast<double>(experts) * loss;
}

}  // namespace

TEST_CASE("defect 6: imbalances of different layers do not cancel, also in one stacked reduction") {
    // Layer 0 sends everything to expert 0, layer 1 everything to expert 1: together they would look balanced.
    using Layer = MoE<double, TopK, SwiGlu, SynchronizedLoss>;
    const typename Layer::Config config{.shape = {.tokens = 8, .width = 3, .experts = 2},
                                        .router = {.k = 1, .weight = GateWeight::score},
                                        .expert = {2},
                                        .balance = {{}, {1.0}}};
    Rig<Layer> rigs[] = {Rig<Layer>(config), Rig<Layer>(config)};
    Batch<double> batch(8, 3, 1);
    for (double& x : batch.x) x = std::abs(x) + 0.1;
    std::vector<std::int64_t> memory(static_cast<std::size_t>(2 * rigs[0].layer.wire_words()));
    Stack stack(memory, 2, rigs[0].layer.wire_words());
    for (index_t l = 0; l < 2; ++l) {
        for (index_t e = 0; e < 2; ++e)
            for (index_t j = 0; j < 3; ++j) rigs[l].params.router.weight(e, j) = e == l ? 3.0 : -3.0;
        auto args = rigs[l].forward_args(batch);
        args.stack = &stack;
        args.row = l;
        REQUIRE(rigs[l].layer.forward({}, args).ok());
    }
    REQUIRE(stack.begin(SelfComm{}).ok());
    REQUIRE(stack.end(SelfComm{}).ok());
    for (index_t l = 0; l < 2; ++l) {
        auto& rig = rigs[l];
        REQUIRE(rig.layer.conclude(stack, l, rig.context, rig.workspace, rig.state).ok());
        CHECK(rig.record().load(0, l) == 8);
        CHECK(rig.record().load(0, 1 - l) == 0);
        CHECK(rig.balance_loss() > 1.5);
    }
}

TEST_CASE("defect 7: P is the mean of all scores, not of the weights of the chosen") {
    for (const Score score : {Score::softmax, Score::sigmoid})
        for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized}) {
            Rig<MoE<double, TopK, SwiGlu, MicroBatchLoss>> rig({.shape = shape,
                                                                .router = {.k = 2, .score = score, .weight = weight},
                                                                .expert = {3},
                                                                .balance = {{}, {1.0}}});
            Batch<double> batch(12, 5, 2);
            for (double& x : batch.x) x = std::abs(x);
            std::fill(batch.dy.begin(), batch.dy.end(), 0.0);
            for (index_t j = 0; j < 5; ++j) rig.params.router.weight(4, j) = -2;  // expert 4 is never chosen
            REQUIRE(rig.forward(batch).ok());
            REQUIRE(rig.backward(batch).ok());
            const auto routing = rig.routing();
            CHECK(rig.record().load(0, 4) == 0);
            for (index_t t = 0; t < 12; ++t) {
                double sum = 0;
                for (index_t i = 0; i < 6; ++i) sum += routing.probs(t, i);
                CHECK(sum == doctest::Approx(1.0).epsilon(1e-14));
                CHECK(routing.probs(t, 4) > 0.0);
            }
            CHECK(rig.balance_loss() == doctest::Approx(loss_of(routing)).epsilon(1e-13));
            double pull = 0;
            for (index_t j = 0; j < 5; ++j) pull += std::abs(rig.grads.router.weight(4, j));
            CHECK(pull > 1e-4);  // a dead expert's score has a gradient
        }
}

TEST_CASE("defect 8: choices are counted before any drop") {
    const LoadBalancingLoss one{.coefficient = 1.0};
    using Dropping = MoE<double, TopK, SwiGlu, AllOf<SynchronizedLoss, LossFree>, SelfComm, FirstCome>;
    using Keeping = MoE<double, TopK, SwiGlu, AllOf<SynchronizedLoss, LossFree>>;
    const AllOf balance{SynchronizedLoss{{}, one}, LossFree{}};
    Rig<Dropping> dropping({.shape = shape, .router = {.k = 2}, .expert = {3}, .balance = balance, .overflow = {4}});
    Rig<Keeping> keeping({.shape = shape, .router = {.k = 2}, .expert = {3}, .balance = balance});
    Batch<double> batch(12, 5, 3);
    for (double& x : batch.x) x = std::abs(x);
    for (auto* weight : {&dropping.params.router.weight, &keeping.params.router.weight})
        for (index_t j = 0; j < 5; ++j) (*weight)(2, j) = 2;  // everybody wants expert 2
    REQUIRE(dropping.forward(batch).ok());
    REQUIRE(keeping.forward(batch).ok());

    const auto plan = dropping.layer.plan(dropping.context);
    CHECK(plan.offsets[3] - plan.offsets[2] == 4);  // its capacity
    const auto seen = std::get<0>(dropping.record().of);
    CHECK(seen.load(0, 2) == 12);                   // what the loss saw
    CHECK(dropping.balance_loss() == doctest::Approx(keeping.balance_loss()).epsilon(1e-14));
    CHECK(dropping.balance_loss() > 1.5);
    REQUIRE(dropping.end_step(0).ok());
    REQUIRE(keeping.end_step(0).ok());
    CHECK(dropping.state_bytes() == keeping.state_bytes());  // and what the bias saw
}

TEST_CASE("defect 9: sigmoid scores far below any epsilon still count, in float") {
    // sigmoid(z) is about e^z there; its sum is as small as 1e-30, and p is softmax(z).
    Rig<MoE<float, TopK, SwiGlu, MicroBatchLoss>> rig({.shape = shape,
                                                       .router = {.k = 2, .score = Score::sigmoid},
                                                       .expert = {3},
                                                       .balance = {{}, {1.0}}});
    Batch<float> batch(12, 5, 4);
    for (const float depth : {0.0f, -20.0f, -70.0f, -120.0f}) {
        CAPTURE(depth);
        for (index_t t = 0; t < 12; ++t) batch.x[static_cast<std::size_t>(5 * t)] = 1.0f;
        for (index_t e = 0; e < 6; ++e) rig.params.router.weight(e, 0) = depth - static_cast<float>(e == 0);
        std::fill(batch.dy.begin(), batch.dy.end(), 0.0f);
        rig.clear_grads();
        REQUIRE(rig.forward(batch).ok());
        REQUIRE(rig.backward(batch).ok());
        const auto routing = rig.routing();
        for (index_t t = 0; t < 12; ++t) {
            double sum = 0, weights = 0;
            for (index_t i = 0; i < 6; ++i) sum += static_cast<double>(routing.probs(t, i));
            for (index_t k = 0; k < 2; ++k) weights += static_cast<double>(routing.weight(t, k));
            CHECK(sum == doctest::Approx(1.0).epsilon(1e-5));
            CHECK(weights == doctest::Approx(1.0).epsilon(1e-5));
        }
        CHECK(rig.balance_loss() == doctest::Approx(loss_of(routing)).epsilon(1e-5));
        CHECK(rig.balance_loss() > 0.9);
        double pull = 0;
        for (const float g : rig.grad_values()) pull += std::abs(static_cast<double>(g));
        CHECK(pull > 1e-3);
    }
}
