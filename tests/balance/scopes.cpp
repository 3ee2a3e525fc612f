// Scopes and their composition on made-up routings: counts, samples, prefixes, windows, and what travels.
#include <doctest/doctest.h>

#include <set>
#include <vector>

#include "steelyard/balance/laws.hpp"
#include "steelyard/cpu/balance.hpp"

namespace {

using namespace steelyard;

constexpr LayerShape shape{.tokens = 12, .width = 1, .experts = 4, .sequences = 4, .micro_steps = 3, .ranks = 4};

template <class B>
struct Trial : detail::BalanceTrial<Cpu, B> {
    explicit Trial(const B& policy, std::uint64_t seed = 1)
        : detail::BalanceTrial<Cpu, B>(Cpu{}, policy, shape, 2, seed) {}

    /// Routes anew, observes, and returns the load that the objective saw.
    std::vector<std::int64_t> load(std::int64_t step, std::int64_t micro_step, std::uint64_t seed) {
        this->seen.tokens.step.step = step;
        this->seen.tokens.step.micro_step = micro_step;
        this->route(seed);
        this->observe();
        return {this->record.load.data, this->record.load.data + this->record.load.size()};
    }
    /// The plain count of the routing of a seed.
    std::vector<std::int64_t> plain(std::uint64_t seed) {
        this->route(seed);
        std::vector<std::int64_t> counts(5);
        for (index_t t = 0; t < shape.tokens; ++t)
            for (index_t k = 0; k < 2; ++k) ++counts[static_cast<std::size_t>(this->seen.routing.expert(t, k))];
        counts[4] = shape.tokens;
        return counts;
    }
};

std::vector<std::int64_t> operator+(std::vector<std::int64_t> a, const std::vector<std::int64_t>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
}

}  // namespace

TEST_CASE("a micro-batch counts its own choices and tokens") {
    Trial trial{MicroBatchLoss{}};
    const auto expected = trial.plain(5);
    CHECK(trial.load(0, 0, 5) == expected);
}

TEST_CASE("a prefix buffer shows micro-steps 0 to m, whatever came in between, and forgets the step before") {
    Trial trial{BufferedLoss{}};
    const auto a = trial.plain(1), b = trial.plain(2), c = trial.plain(3), d = trial.plain(4);
    CHECK(trial.load(0, 0, 1) == a);
    CHECK(trial.load(0, 1, 2) == a + b);
    CHECK(trial.load(0, 2, 3) == a + b + c);
    CHECK(trial.load(0, 0, 1) == a);  // a replay sees what it saw, although later micro-steps were counted
    CHECK(trial.load(0, 1, 2) == a + b);
    CHECK(trial.load(1, 0, 4) == d);
}

TEST_CASE("a whole buffer shows everything on the second pass") {
    Trial trial{Balance<Buffered<Synchronized, Extent::whole>, LoadBalancingLoss>{}};
    const auto a = trial.plain(1), b = trial.plain(2), c = trial.plain(3);
    trial.load(0, 0, 1), trial.load(0, 1, 2), trial.load(0, 2, 3);
    for (const std::int64_t m : {2, 0, 1}) CHECK(trial.load(0, m, static_cast<std::uint64_t>(m) + 1) == a + b + c);
}

TEST_CASE("a window shows the last steps, not this one, and nothing on the first") {
    Trial trial{WindowedLoss<2>{}};
    const std::vector<std::int64_t> nothing(5);
    const auto a = trial.plain(1), b = trial.plain(2), c = trial.plain(3), d = trial.plain(4);
    CHECK(trial.load(0, 0, 1) == nothing);
    CHECK(trial.load(0, 1, 2) == nothing);
    trial.end_step(0);
    CHECK(trial.load(1, 0, 3) == a + b);
    trial.end_step(1);
    trial.end_step(1);
    CHECK(trial.load(2, 0, 4) == a + b + c);
    trial.end_step(2);
    CHECK(trial.load(3, 0, 1) == c + d);
    trial.end_step(3);
    trial.end_step(4);  // a step in which nothing was routed counts as a step
    CHECK(trial.load(5, 0, 1) == a);
}

TEST_CASE("a step's bias is moved by all its micro-steps, once") {
    Trial trial{LossFree{{}, {.rate = 0.5}}};
    const auto total = trial.plain(1) + trial.plain(2);
    trial.load(0, 0, 1), trial.load(0, 1, 2), trial.load(0, 0, 1);
    CHECK(trial.state.bias[0] == 0.0f);
    trial.end_step(0);
    trial.end_step(0);
    for (index_t e = 0; e < 4; ++e) {
        const std::int64_t starved = 12 * 2 * 2 - 4 * total[static_cast<std::size_t>(e)];
        CHECK(trial.state.bias[e] == 0.5f * static_cast<float>((starved > 0) - (starved < 0)));
    }
}

TEST_CASE("each packed sequence has a load of its own; offsets say where it ends") {
    Trial trial{SequenceLoss{}};
    const std::vector<index_t> offsets{0, 5, 5, 12};
    trial.seen.tokens.sequences = {offsets.data(), 4};
    const auto load = trial.load(0, 0, 6);
    const auto count = [&](index_t begin, index_t end) {
        std::vector<std::int64_t> counts(5);
        for (index_t t = begin; t < end; ++t)
            for (index_t k = 0; k < 2; ++k) ++counts[static_cast<std::size_t>(trial.seen.routing.expert(t, k))];
        counts[4] = end - begin;
        return counts;
    };
    const std::vector<std::vector<std::int64_t>> expected{count(0, 5), count(5, 5), count(5, 12), count(0, 0)};
    for (std::size_t s = 0; s < 4; ++s)
        CHECK(std::vector<std::int64_t>(load.begin() + static_cast<std::ptrdiff_t>(5 * s),
                                        load.begin() + static_cast<std::ptrdiff_t>(5 * s + 5)) == expected[s]);
}

TEST_CASE("a sequence without offsets is the whole call") {
    Trial trial{SequenceLoss{}};
    auto expected = trial.plain(6);
    expected.resize(20);
    CHECK(trial.load(0, 0, 6) == expected);
}

TEST_CASE("a sample draws one rank's share, each token at most once, the same on every rank, anew each time") {
    const std::vector<std::int64_t> tokens_of_rank{5, 0, 12, 3};  // 20 tokens: 5 are drawn
    std::set<std::vector<std::int64_t>> different;
    for (const std::int64_t step : {0, 1, 2, 3, 4, 5}) {
        std::vector<std::int64_t> sum(5), whole(5);
        for (const int rank : {0, 1, 2, 3}) {
            Trial trial{ShuffledLoss{Shuffled{9}, {}}};
            trial.seen.tokens.step.step = step;
            trial.route(static_cast<std::uint64_t>(rank));
            std::vector<std::uint8_t> mask(12);
            std::fill_n(mask.begin(), tokens_of_rank[static_cast<std::size_t>(rank)], 1);
            trial.seen.tokens.mask = {mask.data(), 12};
            trial.seen.valid_tokens = tokens_of_rank[static_cast<std::size_t>(rank)];
            trial.seen.rank = rank;
            trial.seen.tokens_of_rank = {tokens_of_rank.data(), 4};
            trial.observe();
            const std::vector<std::int64_t> load(trial.record.load.data, trial.record.load.data + 5);
            CHECK(load[4] <= trial.seen.valid_tokens);
            CHECK(load[0] + load[1] + load[2] + load[3] == 2 * load[4]);
            sum = sum + load;
        }
        CHECK(sum[4] == 5);
        different.insert(sum);
    }
    CHECK(different.size() > 2);
}

TEST_CASE("every token is drawn equally often") {
    std::vector<std::int64_t> drawn(12);
    Trial trial{ShuffledLoss{Shuffled{2}, {}}};
    const std::vector<std::int64_t> tokens_of_rank{12, 0, 0, 0};
    trial.seen.tokens_of_rank = {tokens_of_rank.data(), 4};
    for (index_t t = 0; t < 12; ++t)  // the two experts of a token name it, by fours
        for (index_t k = 0; k < 2; ++k) trial.seen.routing.expert(t, k) = static_cast<expert_t>(t % 4);
    const int steps = 4000;
    for (int step = 0; step < steps; ++step) {
        trial.seen.tokens.step.step = step;
        trial.observe();
        for (std::size_t e = 0; e < 4; ++e) drawn[e] += trial.record.load.data[e];
    }
    // 3 of 12 tokens each time; an expert stands for 3 tokens of 2 choices: 1.5 choices a step.
    for (std::size_t e = 0; e < 4; ++e)
        CHECK(static_cast<double>(drawn[e]) / steps == doctest::Approx(1.5).epsilon(0.06));
}

TEST_CASE("only policies that ask for it have words on the wire") {
    CHECK(MicroBatchLoss{}.wire_words(shape) == 0);
    CHECK(SequenceLoss{}.wire_words(shape) == 0);
    CHECK(RouterZLoss{}.wire_words(shape) == 0);
    CHECK(WindowedLoss<2>{}.wire_words(shape) == 0);
    CHECK(WindowedLoss<2>{}.step_words(shape) == 5);
    CHECK(SynchronizedLoss{}.wire_words(shape) == 5);
    CHECK(SynchronizedLoss{}.step_words(shape) == 0);
    CHECK(hybrid_loss().wire_words(shape) == 5);
    CHECK(AllOf{SynchronizedLoss{}, LossFree{}, RouterZLoss{}}.wire_words(shape) == 10);
    CHECK(Scheduled<MicroBatchLoss, SynchronizedLoss>{}.wire_words(shape) == 5);
    static_assert(!MicroBatchLoss::communicates && !SequenceLoss::communicates && !RouterZLoss::communicates);
    static_assert(!NoBalance::communicates && !NoBalance::remembers && !MicroBatchLoss::remembers);
    static_assert(!Scheduled<MicroBatchLoss, SequenceLoss>::communicates);
    static_assert(!AllOf<MicroBatchLoss, RouterZLoss>::communicates);
}

TEST_CASE("nothing is exchanged for a micro-step that the state holds, or by the inactive half of a schedule") {
    Trial trial{SynchronizedLoss{}};
    CHECK(SynchronizedLoss{}.exchanges(trial.state, {.step = 0}));
    trial.load(0, 0, 1);
    CHECK_FALSE(SynchronizedLoss{}.exchanges(trial.state, {.step = 0}));
    CHECK(SynchronizedLoss{}.exchanges(trial.state, {.step = 1}));

    const Scheduled<MicroBatchLoss, SynchronizedLoss> schedule{3, {}, {}};
    Trial scheduled{schedule};
    CHECK_FALSE(schedule.exchanges(scheduled.state, {.step = 2}));
    CHECK(schedule.exchanges(scheduled.state, {.step = 3}));
}

TEST_CASE("a composition adds losses and gradients of its parts") {
    Trial both{AllOf{MicroBatchLoss{{}, {1.0}}, RouterZLoss{{}, {0.5}}}};
    Trial balance{MicroBatchLoss{{}, {1.0}}};
    Trial z{RouterZLoss{{}, {0.5}}};
    CHECK(both.observe() == doctest::Approx(balance.observe() + z.observe()).epsilon(1e-14));
    both.differentiate(), balance.differentiate(), z.differentiate();
    for (index_t i = 0; i < both.grad.probs.size(); ++i) {
        CHECK(both.grad.probs.data[i] == balance.grad.probs.data[i]);
        CHECK(both.grad.logits.data[i] == z.grad.logits.data[i]);
    }
}

TEST_CASE("a schedule is its first policy before the step and its second from it on") {
    const MicroBatchLoss weak{{}, {1.0}};
    const MicroBatchLoss stronger{{}, {4.0}};
    Trial scheduled{Scheduled<MicroBatchLoss, MicroBatchLoss>{2, weak, stronger}};
    Trial plain{weak};
    for (const std::int64_t step : {0, 1, 2, 3}) {
        scheduled.seen.tokens.step.step = plain.seen.tokens.step.step = step;
        CHECK(scheduled.observe() == doctest::Approx((step < 2 ? 1.0 : 4.0) * plain.observe()).epsilon(1e-14));
    }
}
