// Defects of scale: the gradient, not the logged value, tells.
#include "contract/cases.hpp"
#include "contract/thread_team.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;
using namespace steelyard::testing::contract;

ThreadTeam team;

/// The balance's part of the gradient: the whole without the task's.
std::vector<double> balance_part(const SplitResult& with, const SplitResult& without) {
    std::vector<double> part(with.grads().begin(), with.grads().end());
    for (std::size_t i = 0; i < part.size(); ++i) part[i] -= without.grads()[i];
    return part;
}

constexpr LayerShape small{.tokens = 12, .width = 5, .experts = 6, .sequences = 3, .micro_steps = 2};

template <class BalanceT>
using SmallLayer = MoE<double, TopK, SwiGlu, BalanceT>;

template <class BalanceT>
Rig<SmallLayer<BalanceT>> small_rig(const BalanceT& balance) {
    return Rig<SmallLayer<BalanceT>>({.shape = small, .router = {.k = 2}, .expert = {3}, .balance = balance});
}

Batch<double> silent_batch(index_t tokens, std::uint64_t seed, StepInfo at = {}) {
    Batch<double> batch(tokens, 5, seed, at);
    std::fill(batch.dy.begin(), batch.dy.end(), 0.0);  // nothing but the balance pulls
    return batch;
}

double norm2(std::span<const double> values) {
    double sum = 0;
    for (const double v : values) sum += v * v;
    return sum;
}

/// The loss reaches the router: along the gradient it changes as the gradient says.
template <class BalanceT>
void check_gradient_arrives(const BalanceT& balance) {
    auto rig = small_rig(balance);
    REQUIRE(rig.forward(silent_batch(12, 1)).ok());
    REQUIRE(rig.end_step(0).ok());
    const auto past = rig.state_bytes();
    const auto batch = silent_batch(12, 2, {.step = 1});
    REQUIRE(rig.forward(batch).ok());
    CHECK(rig.balance_loss() > 0.5);
    REQUIRE(rig.backward(batch).ok());
    const std::vector<double> grads(rig.grad_values().begin(), rig.grad_values().end());
    const std::vector<double> params(rig.param_values().begin(), rig.param_values().end());
    const double steepness = norm2(grads);
    CHECK(steepness > 1e-6);
    CHECK(norm2(rig.dx) > 1e-6);
    const auto loss_at = [&](double along) {
        for (std::size_t i = 0; i < params.size(); ++i) rig.param_values()[i] = params[i] + along * grads[i];
        rig.restore(past);
        REQUIRE(rig.forward(batch).ok());
        return rig.balance_loss();
    };
    const double h = 1e-5;
    CHECK((loss_at(h) - loss_at(-h)) / (2 * h) == doctest::Approx(steepness).epsilon(1e-6));
}

/// A call without valid tokens gives nothing and disturbs nothing.
template <class BalanceT>
void check_nothing(const BalanceT& balance) {
    for (const bool all_padding : {false, true}) {
        CAPTURE(all_padding);
        auto rig = small_rig(balance);
        REQUIRE(rig.forward(silent_batch(12, 1)).ok());
        REQUIRE(rig.end_step(0).ok());
        Batch<double> nothing = silent_batch(all_padding ? 12 : 0, 3, {.step = 1});
        nothing.width = 5;
        if (all_padding) nothing.mask.assign(12, 0);
        CHECK(rig.forward(nothing).message() == "ok");
        CHECK(rig.balance_loss() == 0.0);
        CHECK(rig.backward(nothing).message() == "ok");
        CHECK(norm2(rig.grad_values()) == 0.0);
        CHECK(norm2(rig.dx) == 0.0);
        CHECK(rig.end_step(1).message() == "ok");
    }
}

}  // namespace

TEST_CASE("defect 1: the gradient of the synchronised loss does not shrink with the number of ranks") {
    const SynchronizedLoss balance{{}, strong};
    const SplitResult task = run(team, NoBalance{}, whole());
    const SplitResult one = run(team, balance, whole());
    const auto expected = balance_part(one, task);
    for (const Split& split : {even(1, 2), even(1, 4), uneven(1, 3, 1)}) {
        CAPTURE(split.name);
        const SplitResult ranks = run(team, balance, split);
        const auto part = balance_part(ranks, task);
        CHECK(std::sqrt(norm2(part) / norm2(expected)) == doctest::Approx(1.0).epsilon(1e-10));
        CHECK(relative_difference(std::span<const double>(part), std::span<const double>(expected)) <= 1e-10);
        CHECK(ranks.loss() == doctest::Approx(one.loss()).epsilon(1e-12));
    }
}

TEST_CASE("defect 2: accumulated counts are divided by accumulated tokens") {
    auto rig = small_rig(BufferedLoss{{}, {1.0}});
    std::int64_t before = 0;
    for (const auto& [m, tokens] : {std::pair<std::int64_t, index_t>{0, 12}, {1, 3}}) {
        REQUIRE(rig.forward(silent_batch(tokens, 1, {.micro_step = m, .total_tokens = 15})).ok());
        const auto record = rig.record();
        std::int64_t choices = 0;
        double fractions = 0;
        for (index_t i = 0; i < 6; ++i) choices += record.load(0, i), fractions += record.slopes(0, i) / 6;
        CHECK(record.load(0, 6) == before + tokens);
        CHECK(choices == 2 * record.load(0, 6));
        CHECK(fractions == doctest::Approx(1.0).epsilon(1e-14));  // sum_i f_i
        before = record.load(0, 6);
    }
    check_definition(team, BufferedLoss{{}, strong}, of_prefix, {cut("40, 6 and 2 tokens", 3, 1, {40, 46})});
}

TEST_CASE("defect 3: the scale is the same under accumulation, on unequal ranks, summed or averaged") {
    check_split_does_not_matter(team, WindowedLoss<2>{{}, strong}, all_splits(), {.steps = 2});
    check_split_does_not_matter(team, SynchronizedLoss{{}, strong}, rank_splits());

    // A framework that averages its two calls' gradients says so in grad_scale.
    const auto grads = [](double grad_scale) {
        auto rig = small_rig(SequenceLoss{{}, {1.0}});
        for (const std::int64_t m : {0, 1}) {
            const auto batch = silent_batch(m == 0 ? 9 : 4, static_cast<std::uint64_t>(m),
                                            {.micro_step = m, .total_tokens = 13, .grad_scale = grad_scale});
            REQUIRE(rig.forward(batch).ok());
            REQUIRE(rig.backward(batch).ok());
        }
        return std::vector<double>(rig.grad_values().begin(), rig.grad_values().end());
    };
    auto averaged = grads(2.0);
    for (double& g : averaged) g /= 2;
    CHECK(same_bits(averaged, grads(1.0)));
}

TEST_CASE("defect 4: every balance loss that is computed reaches the router's gradient") {
    const LoadBalancingLoss one{.coefficient = 1.0};
    check_gradient_arrives(MicroBatchLoss{{}, one});
    check_gradient_arrives(SequenceLoss{{}, one});
    check_gradient_arrives(SynchronizedLoss{{}, one});
    check_gradient_arrives(BufferedLoss{{}, one});
    check_gradient_arrives(ShuffledLoss{Shuffled{1}, one});
    check_gradient_arrives(WindowedLoss<2>{{}, one});
    check_gradient_arrives(hybrid_loss(1.0, 0.5));
    check_gradient_arrives(RouterZLoss{{}, {.coefficient = 0.5}});
    check_gradient_arrives(Scheduled<MicroBatchLoss, SynchronizedLoss>{1, {{}, one}, {{}, one}});
}

TEST_CASE("defect 5: no tokens on a rank or in a micro-step contribute nothing, and no NaN") {
    const LoadBalancingLoss one{.coefficient = 1.0};
    check_nothing(MicroBatchLoss{{}, one});
    check_nothing(SequenceLoss{{}, one});
    check_nothing(SynchronizedLoss{{}, one});
    check_nothing(AllOf{hybrid_loss(1.0, 0.5), ShuffledLoss{Shuffled{1}, one}, WindowedLoss<2>{{}, one}, LossFree{},
                        RouterZLoss{{}, {.coefficient = 0.5}}});
    check_split_does_not_matter(team, SynchronizedLoss{{}, strong},
                                {cut("idle ranks", 1, 4, {0, 48, 48}), padded(cut("idle", 1, 4, {0, 48, 48}), 1)});
}
