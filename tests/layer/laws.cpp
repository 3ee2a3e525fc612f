// Laws that a layer keeps whatever the sizes: perfect balance, linearity, evaluation, checkpoints, selection bias.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

/// A backend of two ranks that counts calls and sums nothing.
struct CountingComm {
    int* calls = nullptr;
    int rank() const { return 0; }
    int size() const { return 2; }
    Status begin_sum(std::span<std::int64_t>) const { return ++*calls, Status{}; }
    Status end_sum(std::span<std::int64_t>) const { return ++*calls, Status{}; }
};

template <class BalanceT, class CommT = SelfComm>
using Layer = MoE<double, TopK, SwiGlu, BalanceT, CommT>;

constexpr LayerShape shape{.tokens = 16, .width = 6, .experts = 5, .sequences = 2, .micro_steps = 2, .ranks = 2};

template <class BalanceT, class CommT = SelfComm>
Rig<Layer<BalanceT, CommT>> make(const BalanceT& balance, const TopK& router = {.k = 2}) {
    return Rig<Layer<BalanceT, CommT>>({.shape = shape, .router = router, .expert = {3}, .balance = balance});
}

/// A layer of four experts in which token t, along axis t mod 4, takes experts t and t + 1 mod 4.
template <class BalanceT>
struct Balanced {
    Rig<Layer<BalanceT>> rig;
    Batch<double> batch{8, 4, 1};

    explicit Balanced(const BalanceT& balance)
        : rig({.shape = {.tokens = 8, .width = 4, .experts = 4},
               .router = {.k = 2},
               .expert = {3},
               .balance = balance}) {
        const double ring[] = {1.0, 0.5, -0.3, -1.0};
        for (index_t e = 0; e < 4; ++e)
            for (index_t j = 0; j < 4; ++j) rig.params.router.weight(e, j) = ring[(e - j + 4) % 4];
        for (index_t t = 0; t < 8; ++t)
            for (index_t j = 0; j < 4; ++j) {
                const auto at = static_cast<std::size_t>(t * 4 + j);
                batch.x[at] = j == t % 4 ? 0.5 + 0.3 * static_cast<double>(t) : 0.0;  // P is not uniform, f is
                batch.dy[at] = 0;
            }
    }
};

double largest(std::span<const double> values) {
    double most = 0;
    for (const double v : values) most = std::max(most, std::abs(v));
    return most;
}

}  // namespace

TEST_CASE("at perfect balance the loss is 1, or K by token, and nothing pulls") {
    for (const auto normalization : {LoadNormalization::by_choice, LoadNormalization::by_token}) {
        const double expected = normalization == LoadNormalization::by_choice ? 1.0 : 2.0;
        Balanced balanced{MicroBatchLoss{{}, {1.0, normalization}}};
        REQUIRE(balanced.rig.forward(balanced.batch).ok());
        REQUIRE(balanced.rig.backward(balanced.batch).ok());
        CHECK(balanced.rig.balance_loss() == doctest::Approx(expected).epsilon(1e-15));
        for (index_t i = 0; i < 4; ++i) CHECK(balanced.rig.record().slopes(0, i) == expected);
        CHECK(largest(balanced.rig.grad_values()) <= 1e-15);
        CHECK(largest(balanced.rig.dx) <= 1e-15);
    }
}

TEST_CASE("off balance the loss is above 1 and pulls") {
    Balanced balanced{MicroBatchLoss{{}, {1.0}}};
    for (index_t j = 0; j < 4; ++j) balanced.rig.params.router.weight(0, j) += 3;
    REQUIRE(balanced.rig.forward(balanced.batch).ok());
    REQUIRE(balanced.rig.backward(balanced.batch).ok());
    CHECK(balanced.rig.balance_loss() > 1.1);
    CHECK(largest(balanced.rig.grad_values()) > 1e-3);
}

TEST_CASE("the gradient of the balance is linear in the coefficient, and in grad_scale") {
    const auto grads = [](double coefficient, double grad_scale) {
        auto rig = make(AllOf{SynchronizedLoss{{}, {coefficient}}, RouterZLoss{{}, {coefficient / 8}}});
        Batch<double> batch(16, 6, 3, {.grad_scale = grad_scale});
        std::fill(batch.dy.begin(), batch.dy.end(), 0.0);
        REQUIRE(rig.forward(batch).ok());
        REQUIRE(rig.backward(batch).ok());
        std::vector<double> all(rig.grad_values().begin(), rig.grad_values().end());
        all.insert(all.end(), rig.dx.begin(), rig.dx.end());
        return std::pair(all, rig.balance_loss());
    };
    const auto [one, loss] = grads(1.0, 1.0);
    CHECK(largest(one) > 1e-3);
    for (const double factor : {0.0, 0.25, 2.0, 3.0, -1.5}) {
        CAPTURE(factor);
        std::vector<double> expected(one);
        for (double& g : expected) g *= factor;
        const std::span<const double> linear(expected);
        CHECK(relative_difference(std::span<const double>(grads(factor, 1.0).first), linear) <= 1e-14);
        CHECK(relative_difference(std::span<const double>(grads(1.0, factor).first), linear) <= 1e-14);
        CHECK(grads(factor, 1.0).second == doctest::Approx(factor * loss).epsilon(1e-14));
        CHECK(grads(1.0, factor).second == loss);  // the reported loss is not scaled
    }
}

TEST_CASE("a starved expert's bias rises until it is chosen") {
    auto rig = make(LossFree{{}, {.rate = 0.05}}, {.k = 1});
    const Batch<double> batch(16, 6, 5);
    const auto chosen_of = [&](index_t expert) {
        index_t count = 0;
        const auto routing = rig.routing();
        for (index_t t = 0; t < 16; ++t) count += routing.expert(t, 0) == expert;
        return count;
    };
    REQUIRE(rig.forward(batch).ok());
    index_t starved = 0, heavy = 0;
    for (index_t e = 1; e < 5; ++e) {
        if (chosen_of(e) < chosen_of(starved)) starved = e;
        if (chosen_of(e) > chosen_of(heavy)) heavy = e;
    }
    const index_t before = chosen_of(starved), heavy_before = chosen_of(heavy);
    REQUIRE(before < 3);
    REQUIRE(heavy_before > 4);
    REQUIRE(rig.end_step(0).ok());
    CHECK(rig.balance_state().bias[starved] == 0.05f);
    CHECK(rig.balance_state().bias[heavy] == -0.05f);
    for (std::int64_t step = 1; step < 12; ++step) {
        Batch<double> again = batch;
        again.step.step = step;
        REQUIRE(rig.forward(again).ok());
        REQUIRE(rig.end_step(step).ok());
    }
    CHECK(chosen_of(starved) > before);
    CHECK(chosen_of(heavy) < heavy_before);
}

TEST_CASE("combine weights contain no bias") {
    for (const Score score : {Score::softmax, Score::sigmoid})
        for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized}) {
            auto rig = make(LossFree{}, {.k = 2, .score = score, .weight = weight, .scale = 2.5});
            const Batch<double> batch(16, 6, 6);
            REQUIRE(rig.forward(batch).ok());
            const auto routing = rig.routing();
            const std::vector<expert_t> unbiased(routing.expert.data, routing.expert.data + routing.expert.size());
            rig.balance_state().bias[3] = 10.0f;
            rig.balance_state().bias[1] = -10.0f;
            REQUIRE(rig.forward(batch).ok());
            CHECK_FALSE(std::equal(unbiased.begin(), unbiased.end(), routing.expert.data));
            for (index_t t = 0; t < 16; ++t) {
                CHECK(routing.expert(t, 0) == 3);
                CHECK(routing.expert(t, 1) != 1);
                const auto score_of = [&](index_t e) {
                    return score == Score::sigmoid ? 1 / (1 + std::exp(-routing.logits(t, e))) : routing.probs(t, e);
                };
                double sum = 1;
                if (weight == GateWeight::renormalized)
                    sum = score_of(routing.expert(t, 0)) + score_of(routing.expert(t, 1));
                for (index_t k = 0; k < 2; ++k)
                    CHECK(routing.weight(t, k) ==
                          doctest::Approx(2.5 * score_of(routing.expert(t, k)) / sum).epsilon(1e-13));
            }
        }
}

TEST_CASE("evaluation touches no state, makes no sum and has no noise") {
    int calls = 0;
    const AllOf balance{SynchronizedLoss{}, WindowedLoss<2>{}, LossFree{}, ShuffledLoss{}, RouterZLoss{}};
    auto rig = make<decltype(balance), CountingComm>(balance, {.k = 2, .jitter = 0.3, .noise = 0.5});
    const CountingComm comm{&calls};
    Batch<double> batch(16, 6, 7);
    REQUIRE(rig.forward(comm, batch).ok());
    REQUIRE(rig.end_step(comm, 0).ok());
    const auto state = rig.state_bytes();
    const auto trained = rig.y;
    const int before = calls;
    CHECK(before > 0);

    batch.step.step = 1;
    REQUIRE(rig.forward(comm, batch, Mode::evaluate).ok());
    CHECK(calls == before);
    CHECK(rig.state_bytes() == state);
    CHECK(rig.balance_loss() == 0.0);
    CHECK_FALSE(same_bits(rig.y, trained));

    auto quiet = make<decltype(balance), CountingComm>(balance);
    quiet.restore(state);
    REQUIRE(quiet.forward(comm, batch).ok());
    CHECK(same_bits(rig.y, quiet.y));
}

TEST_CASE("a state that is saved and restored, between steps or within one, goes on with the same bits") {
    const AllOf balance{BufferedLoss{{}, {1.0}}, WindowedLoss<2>{{}, {1.0}}, LossFree{{}, {.rate = 0.05}}};
    using Bits = std::vector<std::vector<double>>;
    struct Saved {
        std::vector<std::byte> state;
        std::int64_t step, micro_step;
    };
    const auto train = [&](std::vector<Saved>* saves, const Saved* from, Bits& bits) {
        auto rig = make(balance);
        if (from != nullptr) rig.restore(from->state);
        for (std::int64_t step = 0; step < 4; ++step) {
            for (std::int64_t m = 0; m < 2; ++m) {
                if (from != nullptr && (step < from->step || (step == from->step && m < from->micro_step))) continue;
                if (saves != nullptr) saves->push_back({rig.state_bytes(), step, m});
                const Batch<double> batch(16, 6, static_cast<std::uint64_t>(10 * step + m),
                                          {.step = step, .micro_step = m, .total_tokens = 32});
                rig.clear_grads();
                REQUIRE(rig.forward(batch).ok());
                REQUIRE(rig.backward(batch).ok());
                bits.push_back(rig.y);
                bits.push_back(rig.dx);
                bits.emplace_back(rig.grad_values().begin(), rig.grad_values().end());
                bits.push_back({rig.balance_loss()});
            }
            if (from == nullptr || step >= from->step) REQUIRE(rig.end_step(step).ok());
        }
        return rig.state_bytes();
    };
    std::vector<Saved> saves;
    Bits whole;
    const auto last = train(&saves, nullptr, whole);
    for (const Saved& save : saves) {
        Bits rest;
        CHECK(train(nullptr, &save, rest) == last);
        CHECK(std::equal(rest.rbegin(), rest.rend(), whole.rbegin()));
    }
}

TEST_CASE("padding holds what it likes: outputs, gradients and statistics of the others stay the same") {
    const AllOf balance{BufferedLoss{{}, {1.0}}, SequenceLoss{{}, {1.0}}, RouterZLoss{{}, {0.3}}, LossFree{}};
    const auto run = [&](double padding) {
        auto rig = make(balance);
        Batch<double> batch(16, 6, 8);
        batch.mask = {1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0};
        batch.sequences = {0, 6, 16};
        for (index_t t = 0; t < 16; ++t)
            for (index_t j = 0; !batch.valid(t) && j < 6; ++j)
                batch.x[static_cast<std::size_t>(6 * t + j)] = batch.dy[static_cast<std::size_t>(6 * t + j)] = padding;
        REQUIRE(rig.forward(batch).message() == "ok");
        REQUIRE(rig.backward(batch).message() == "ok");
        REQUIRE(rig.end_step(0).ok());
        std::vector<double> all(rig.y);
        all.insert(all.end(), rig.dx.begin(), rig.dx.end());
        all.insert(all.end(), rig.grad_values().begin(), rig.grad_values().end());
        all.push_back(rig.balance_loss());
        for (index_t t = 0; t < 16; ++t)
            for (index_t j = 0; !batch.valid(t) && j < 6; ++j) {
                CHECK(rig.y[static_cast<std::size_t>(6 * t + j)] == 0.0);
                CHECK(rig.dx[static_cast<std::size_t>(6 * t + j)] == 0.0);
            }
        return std::pair(all, rig.state_bytes());
    };
    const auto zero = run(0.0);
    CHECK(run(1e300) == zero);
    CHECK(run(std::nan("")) == zero);
}
