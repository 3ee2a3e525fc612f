// Defects of precision, of checkpoints, and of memory.
#include <doctest/doctest.h>

#include <string>
#include <type_traits>
#include <vector>

#include "support/count_allocations.hpp"
#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{.tokens = 12, .width = 5, .experts = 4, .micro_steps = 2};

template <class BalanceT, class T = double>
Rig<MoE<T, TopK, SwiGlu, BalanceT>> make(const BalanceT& balance, const LayerShape& sizes = shape, int k = 2) {
    return Rig<MoE<T, TopK, SwiGlu, BalanceT>>(
        {.shape = sizes, .router = {.k = k}, .expert = {3}, .balance = balance});
}

/// Enters a load as if a micro-step had counted it.
template <class State>
void enter(const State& state, std::int64_t step, std::int64_t micro_step, const std::vector<std::int64_t>& load) {
    state.log.enter({.step = step, .micro_step = micro_step},
                    view<const std::int64_t, 1>(load.data(), static_cast<index_t>(load.size())));
}

/// A call of each of the layer's functions that read a state, on these bytes.
template <class RigT>
std::vector<std::string> answers(RigT& rig, std::span<std::byte> state) {
    const Batch<double> batch(12, 5, 1);
    auto args = rig.forward_args(batch);
    args.state = state;
    std::vector<std::int64_t> memory(64);
    const Stack stack(memory, 1, 64);
    const auto text = [](const Status& status) { return status.ok() ? std::string("ok") : status.message(); };
    return {text(rig.layer.forward({}, args)), text(rig.layer.end_step({}, 0, state, rig.workspace)),
            text(rig.layer.conclude(stack, 0, rig.context, rig.workspace, state)),
            text(rig.layer.end_step(stack, 0, 0, state)), text(rig.layer.check_state("load", state))};
}

template <class RigT>
void check_refused(RigT& rig, std::span<std::byte> state, const std::string& words) {
    const std::vector<std::byte> before(state.begin(), state.end());
    std::fill(rig.y.begin(), rig.y.end(), 77.0);
    for (const std::string& answer : answers(rig, state)) {
        CAPTURE(answer);
        CHECK(answer.find(words) != std::string::npos);
    }
    CHECK(rig.y == std::vector<double>(rig.y.size(), 77.0));
    CHECK(std::equal(before.begin(), before.end(), state.begin()));
}

}  // namespace

TEST_CASE("defect 18: counts are exact integers beyond 2^24 and 2^31, and so are their comparisons") {
    auto bias = make(LossFree{{}, {.rate = 0.5}});
    const std::int64_t many = std::int64_t{1} << 40;
    // bf16, float and 32 bits would all call these equal.
    enter(bias.balance_state(), 0, 0, {many, many, many - 1, many, 2 * many});
    enter(bias.balance_state(), 0, 1, {0, 1, 0, 0, 1});
    REQUIRE(bias.end_step(0).ok());
    const auto state = bias.balance_state();
    CHECK(state.step_load[1] == many + 1);
    CHECK(state.bias[1] == -0.5f);
    CHECK(state.bias[2] == 0.5f);
    CHECK(state.bias[0] == 0.0f);

    auto window = make(WindowedLoss<2>{});
    const std::int64_t odd = (std::int64_t{1} << 31) + 1;
    for (const std::int64_t step : {0, 1}) {
        enter(window.balance_state(), step, 0, {odd, 2, 3, 4, odd});
        enter(window.balance_state(), step, 1, {odd, 1, 1, 1, odd});
        REQUIRE(window.end_step(step).ok());
    }
    CHECK(window.balance_state().past[0] == 4 * odd);
    CHECK(window.balance_state().past[4] == 4 * odd);

    // One choice more or less in 2^25 tokens changes f, and so the loss.
    const auto loss = [](std::int64_t first) {
        const std::vector<std::int64_t> counts{first, (std::int64_t{1} << 25) + 1};
        const std::vector<double> sums{3.0, 1.0};
        std::vector<double> gradient(2);
        return LoadBalancingLoss{}.loss({{counts.data(), 2}, std::int64_t{1} << 26, {sums.data(), 2}, 4, 1},
                                        {gradient.data(), 2});
    };
    CHECK(loss((std::int64_t{1} << 25) + 1) != loss(std::int64_t{1} << 25));

    ThreadGroup group(2);
    std::vector<std::int64_t> sums(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        std::vector<std::int64_t> words{odd};
        if (comm.begin_sum(words).ok() && comm.end_sum(words).ok())
            sums[static_cast<std::size_t>(comm.rank())] = words[0];
    });
    CHECK(sums == std::vector<std::int64_t>{2 * odd, 2 * odd});
}

TEST_CASE("defect 19: the bias is float and keeps its small steps") {
    auto rig = make<LossFree, float>(LossFree{{}, {.rate = 1e-3}});
    static_assert(std::is_same_v<std::remove_cvref_t<decltype(rig.balance_state().bias[0])>, float>);
    const auto bias = rig.balance_state().bias;
    for (index_t e = 0; e < 4; ++e) bias[e] = 8.0f;  // bf16 steps by 1/32 here
    for (std::int64_t step = 0; step < 1000; ++step) {
        enter(rig.balance_state(), step, 0, {9, 1, 5, 5, 10});
        REQUIRE(rig.end_step(step).ok());
    }
    CHECK(bias[0] == doctest::Approx(7.0).epsilon(1e-3));
    CHECK(bias[1] == doctest::Approx(9.0).epsilon(1e-3));
    CHECK(bias[2] == 8.0f);

    // A difference of one step decides between equal scores.
    for (index_t e = 0; e < 4; ++e) bias[e] = e == 2 ? 8.001f : 8.0f;
    for (float& w : rig.param_values()) w = 0.0f;
    REQUIRE(rig.forward(Batch<float>(12, 5, 1, {.step = 2000})).ok());
    for (index_t t = 0; t < 12; ++t) CHECK(rig.routing().expert(t, 0) == 2);
}

TEST_CASE("defect 20: a state that is missing, zeroed or another layer's is refused, not trained on") {
    auto rig = make(AllOf{BufferedLoss{}, LossFree{}});
    REQUIRE(rig.forward(Batch<double>(12, 5, 1)).ok());
    check_refused(rig, {}, "state: expected at least " + std::to_string(rig.layer.state_bytes()) + " bytes, came 0");

    Bytes zeroed(rig.layer.state_bytes());
    check_refused(rig, zeroed, "state: expected version 1, 4 experts, 2 micro-steps");
    check_refused(rig, zeroed, "came bytes that init_state has not written");

    LayerShape more_experts = shape, more_steps = shape;
    more_experts.experts = 6;
    more_steps.micro_steps = 3;
    auto other = make(AllOf{BufferedLoss{}, LossFree{}}, more_experts);
    check_refused(rig, other.state, "came version 1, 6 experts, 2 micro-steps");
    auto longer = make(AllOf{BufferedLoss{}, LossFree{}}, more_steps);
    check_refused(rig, longer.state, "came version 1, 4 experts, 3 micro-steps");

    Bytes newer(rig.layer.state_bytes());
    std::copy_n(rig.state.data(), rig.state.size(), newer.data());
    reinterpret_cast<StateHeader*>(newer.data())->version = 2;
    check_refused(rig, newer, "came version 2");

    // Another policy of as many experts has another number of bytes.
    auto policy = make(AllOf{BufferedLoss{}, WindowedLoss<4>{}, LossFree{}});
    check_refused(rig, policy.state, "came version 1, 4 experts, 2 micro-steps, " +
                                         std::to_string(policy.layer.state_bytes()) + " bytes");
}

TEST_CASE("defect 21: memory holds no [tokens, experts] counts or one-hot masks") {
    constexpr index_t experts = 256, k = 8, width = 64, hidden = 32;
    using BalanceT = AllOf<BufferedLoss, MicroBatchLoss, LossFree, RouterZLoss>;
    using Layer = MoE<float, TopK, SwiGlu, BalanceT>;
    const auto layer = [](index_t tokens) {
        return Layer({.shape = {.tokens = tokens, .width = width, .experts = experts},
                      .router = {.k = static_cast<int>(k)},
                      .expert = {hidden}});
    };
    const index_t few = 1 << 10, many = 1 << 17;  // 128 Ki tokens
    const auto per_token = [&](auto bytes) {
        return static_cast<double>(bytes(layer(many)) - bytes(layer(few))) / static_cast<double>(many - few);
    };
    // Logits and probabilities are [T, E] floats, once in the context and once as gradients; the rest is [T, K] or
    // rows of experts. A one-hot of [T, E] integers would take 2048 bytes a token more, one of [T, K, E] bits 256.
    const double probs = 2 * 4 * experts, choices = k * (4 + 4 + 4 + 4), kept = k * 2 * hidden * 4;
    CHECK(per_token([](const Layer& l) { return l.context_bytes(); }) <= probs + choices + kept + 8);
    const double rows = k * 4 * (width + 3 * hidden), sums = 8.0 * experts / 256;
    CHECK(per_token([](const Layer& l) { return l.workspace_bytes(); }) <= probs + 4 * k + rows + sums + 64);
    CHECK(per_token([](const Layer& l) { return l.state_bytes(); }) == 0.0);

    // And none is made on the way.
    Rig<Layer> rig(layer(few).config());
    const Batch<float> batch(few, width, 1);
    const std::size_t before = allocations();
    const bool ok = rig.forward(batch).ok() && rig.backward(batch).ok() && rig.end_step(0).ok();
    CHECK(allocations() - before == 0);
    CHECK(ok);
}
