// Objectives on means through a whole router: finite differences, and the same total gradient however a step is split.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "steelyard/balance/policy.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/balance.hpp"
#include "steelyard/cpu/router.hpp"
#include "steelyard/router/top_k.hpp"
#include "support/finite_differences.hpp"

namespace {

using namespace steelyard;
using Values = std::vector<double>;

constexpr index_t tokens = 24, width = 4, experts = 5, sequence_length = 4;
constexpr LayerShape shape{.tokens = 30, .width = width, .experts = experts, .sequences = 8, .micro_steps = 3,
                           .ranks = 3};

/// One call's tokens, as places in the global batch; -1 is padding.
using Cell = std::vector<index_t>;
using Split = std::vector<std::vector<Cell>>;  // [A][R]

/// The global order cut at the given places, and every cell padded where `padded`.
Split cut(int micro_steps, int ranks, const std::vector<index_t>& cuts, bool padded = false) {
    Split split(static_cast<std::size_t>(micro_steps), std::vector<Cell>(static_cast<std::size_t>(ranks)));
    std::size_t c = 0;
    index_t next = 0;
    for (auto& of_ranks : split)
        for (Cell& cell : of_ranks) {
            const index_t end = c < cuts.size() ? cuts[c++] : tokens;
            while (next < end) {
                if (padded && next % 5 == 0) cell.push_back(-1);
                cell.push_back(next++);
            }
            if (padded) cell.push_back(-1);
        }
    return split;
}

/// What the ranks of one step add up to.
struct Sums {
    Values weight = Values(experts * width), dx = Values(tokens * width);  // [E, d], [T, d]
    double loss = 0;
    std::vector<float> bias;

    [[nodiscard]] double distance(const Sums& other) const {
        double most = std::abs(loss - other.loss), scale = std::abs(other.loss);
        const auto compare = [&](const Values& a, const Values& b) {
            for (std::size_t i = 0; i < a.size(); ++i) {
                const double apart = std::abs(a[i] - b[i]);
                if (!(apart <= most)) most = apart;  // a NaN stays
                scale = std::max(scale, std::abs(b[i]));
            }
        };
        compare(weight, other.weight), compare(dx, other.dx);
        return most / scale;
    }
};

/// Ranks that route and balance without experts. The smooth load of this test is the square of the probabilities.
template <class B>
class Team {
public:
    Team(const B& policy, const TopK& router) : policy_(policy), router_(router) {
        const Philox random(7, Stream::user);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = random.normal(i);
        for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = random.normal(1000 + i);
    }

    /// The sums of the last of `steps` steps. Every step has the same tokens, in another order of the widths.
    Sums run(const Split& split, std::int64_t steps = 1, bool two_passes = false) {
        std::vector<Rank> ranks;
        for (std::size_t r = 0; r < split[0].size(); ++r) ranks.emplace_back(policy_);
        Sums sums;
        for (std::int64_t step = 0; step < steps; ++step) {
            sums = {};
            for (const bool backward : {false, true}) {
                if (!backward && !two_passes) continue;
                for (std::size_t m = 0; m < split.size(); ++m)
                    call(ranks, split[m], {.step = step, .micro_step = static_cast<std::int64_t>(m),
                                           .total_tokens = tokens},
                         backward ? &sums : nullptr);
            }
            end_step(ranks, step);
        }
        if constexpr (B::has_bias)
            sums.bias.assign(ranks[0].state.bias.data, ranks[0].state.bias.data + experts);
        return sums;
    }

    Values x = Values(tokens * width), weight = Values(experts * width);

private:
    struct Rank {
        explicit Rank(const B& policy)
            : state_memory(bytes_of<typename B::template State<>>(policy, shape)),
              record_memory(bytes_of<typename B::template Record<>>(policy, shape)),
              routing_memory(bytes_of<Routing<double>>(shape.tokens, experts, index_t{2}, true)),
              grad_memory(bytes_of<RoutingGrad<double>>(shape.tokens, experts, index_t{2}, true)),
              words(static_cast<std::size_t>(std::max(policy.wire_words(shape), policy.step_words(shape)))) {
            state = place<typename B::template State<>>(state_memory.data(), policy, shape);
            record = place<typename B::template Record<>>(record_memory.data(), policy, shape);
            policy.init(state);
        }
        Bytes state_memory, record_memory, routing_memory, grad_memory;
        typename B::template State<> state;
        typename B::template Record<> record;
        std::vector<std::int64_t> words;
        Values x;
        std::vector<std::uint8_t> mask;
        std::vector<index_t> sequences;
        std::vector<std::int32_t> ids;
        Observation<double> seen;

        Wire<> wire() { return Wire<>(view<std::int64_t, 1>(words.data(), static_cast<index_t>(words.size()))); }
    };

    /// Every rank's words become the sum of all.
    static void sum(std::vector<Rank>& ranks) {
        for (std::size_t w = 0; w < ranks[0].words.size(); ++w) {
            std::int64_t total = 0;
            for (const Rank& rank : ranks) total += rank.words[w];
            for (Rank& rank : ranks) rank.words[w] = total;
        }
    }

    void call(std::vector<Rank>& ranks, const std::vector<Cell>& cells, const StepInfo& at, Sums* sums) {
        const TopK::Params<const double> params{{weight.data(), experts, width}};
        Bytes scratch(std::max(router_.scratch_bytes<double>(device_, shape),
                               balance_ops<Cpu>::scratch_bytes(device_, shape)));
        for (std::size_t r = 0; r < ranks.size(); ++r) {
            Rank& rank = ranks[r];
            const RouterInput<double> input = bring(rank, cells[r], at);
            REQUIRE(router_.route<double>(device_, params, input, rank.seen.routing, scratch.data()).ok());
            for (index_t i = 0; i < rank.seen.routing.probs.size(); ++i)
                rank.seen.routing.smooth_load.data[i] = std::pow(rank.seen.routing.probs.data[i], 2);
            Wire<> out = rank.wire();
            policy_.observe(device_, rank.seen, rank.state, rank.record, scratch.data());
            policy_.post(rank.seen, rank.state, rank.record, out);
        }
        if (policy_.exchanges(ranks[0].state, at)) sum(ranks);
        for (std::size_t r = 0; r < ranks.size(); ++r) {
            Rank& rank = ranks[r];
            Wire<> in = rank.wire();
            policy_.conclude(rank.seen, rank.state, rank.record, in);
            if (sums == nullptr) continue;
            sums->loss += policy_.loss(rank.record, at);
            backward(rank, cells[r], params, *sums, scratch.data());
        }
    }

    RouterInput<double> bring(Rank& rank, const Cell& cell, const StepInfo& at) {
        const auto count = static_cast<index_t>(cell.size());
        rank.x.clear(), rank.mask.clear(), rank.ids.clear(), rank.sequences = {0};
        std::int64_t valid = 0;
        index_t sequence = -1;
        for (std::size_t row = 0; row < cell.size(); ++row) {
            const index_t g = cell[row];
            for (index_t j = 0; j < width; ++j)
                rank.x.push_back(g < 0 ? std::numeric_limits<double>::quiet_NaN()
                                       : x[static_cast<std::size_t>(g * width + (j + at.step) % width)]);
            rank.mask.push_back(g >= 0), rank.ids.push_back(static_cast<std::int32_t>(g < 0 ? 0 : g % 3));
            valid += g >= 0;
            if (g >= 0 && g / sequence_length != sequence) {
                if (sequence >= 0) rank.sequences.push_back(static_cast<index_t>(row));
                sequence = g / sequence_length;
            }
        }
        rank.sequences.push_back(count);
        Observation<double>& seen = rank.seen;
        seen = {};
        seen.routing = place<Routing<double>>(rank.routing_memory.data(), shape.tokens, experts, index_t{2}, true)
                           .first(count);
        seen.tokens.mask = {rank.mask.data(), count};
        seen.tokens.ids = {rank.ids.data(), count};
        seen.tokens.sequences = {rank.sequences.data(), static_cast<index_t>(rank.sequences.size())};
        seen.tokens.step = at;
        seen.valid_tokens = valid;
        RouterInput<double> input{.x = {rank.x.data(), count, width}, .tokens = seen.tokens};
        if constexpr (B::has_bias) input.selection_bias = policy_.selection_bias(rank.state, at);
        return input;
    }

    void backward(Rank& rank, const Cell& cell, const TopK::Params<const double>& params, Sums& sums,
                  std::byte* scratch) {
        const auto count = static_cast<index_t>(cell.size());
        std::fill_n(rank.grad_memory.data(), rank.grad_memory.size(), std::byte{0});
        const auto grad =
            place<RoutingGrad<double>>(rank.grad_memory.data(), shape.tokens, experts, index_t{2}, true).first(count);
        policy_.gradient(device_, rank.seen, rank.record, grad, scratch);
        for (index_t i = 0; i < grad.probs.size(); ++i)
            grad.probs.data[i] += 2 * rank.seen.routing.probs.data[i] * grad.smooth_load.data[i];
        Values dx(rank.x.size());
        const RouterInput<double> input{.x = {rank.x.data(), count, width}, .tokens = rank.seen.tokens};
        router_.backward<double>(device_, params, input, rank.seen.routing, grad,
                                 RouterInputGrad<double>{{dx.data(), count, width}},
                                 TopK::Params<double>{{sums.weight.data(), experts, width}}, scratch);
        const std::int64_t step = rank.seen.tokens.step.step;
        for (index_t row = 0; row < count; ++row)
            for (index_t j = 0; cell[static_cast<std::size_t>(row)] >= 0 && j < width; ++j)
                sums.dx[static_cast<std::size_t>(cell[static_cast<std::size_t>(row)] * width + (j + step) % width)] +=
                    dx[static_cast<std::size_t>(row * width + j)];
    }

    void end_step(std::vector<Rank>& ranks, std::int64_t step) {
        for (Rank& rank : ranks) {
            Wire<> out = rank.wire();
            policy_.collect_step(rank.state, step, out);
        }
        if (policy_.step_words(shape) > 0) sum(ranks);
        for (Rank& rank : ranks) {
            Wire<> in = rank.wire();
            policy_.end_step(rank.state, step, in);
        }
    }

    Cpu device_;
    B policy_;
    TopK router_;
};

const TopK softmax{.k = 2}, sigmoid{.k = 2, .score = Score::sigmoid, .weight = GateWeight::score, .scale = 2.5};

const Split whole = cut(1, 1, {});

/// Over ranks alone; uneven, one rank idle, padded.
std::vector<Split> rank_splits() {
    return {cut(1, 2, {12}), cut(1, 3, {3, 20}), cut(1, 3, {0, 11}, true), cut(1, 2, {24}, true)};
}
std::vector<Split> all_splits() {
    auto splits = rank_splits();
    for (const Split& split : {cut(3, 1, {8, 9}), cut(2, 3, {1, 5, 14, 14, 20}), cut(3, 2, {0, 0, 7, 13, 13}, true)})
        splits.push_back(split);
    return splits;
}

template <class B>
void check_differences(const B& policy, const TopK& router, const Split& split = whole) {
    Team<B> team(policy, router);
    const Sums sums = team.run(split);
    const auto loss = [&] { return team.run(split).loss; };
    CHECK(std::abs(sums.loss) > 1e-3);
    CHECK(testing::difference_error(team.weight, sums.weight, loss) < 1e-6);
    CHECK(testing::difference_error(team.x, sums.dx, loss) < 1e-6);
}

template <class B>
void check_splits(const B& policy, const std::vector<Split>& splits, std::int64_t steps = 1, bool two_passes = false) {
    for (const TopK& router : {softmax, sigmoid}) {
        Team<B> team(policy, router);
        const Sums expected = team.run(whole, steps, two_passes);
        CHECK(std::abs(*std::max_element(expected.weight.begin(), expected.weight.end())) > 1e-4);
        for (const Split& split : splits) CHECK(team.run(split, steps, two_passes).distance(expected) < 1e-12);
    }
}

template <class ScopeT>
auto all_of(double coefficient = 1.0, ScopeT scope = {}) {
    return AllOf{Balance<ScopeT, Importance>{scope, {coefficient}},
                 Balance<ScopeT, SmoothLoad>{scope, {coefficient, Variance::sample}},
                 Balance<ScopeT, GlobalEntropy>{scope, {coefficient}}};
}

}  // namespace

TEST_CASE("gradients of mean objectives through a router are those of differences") {
    for (const TopK& router : {softmax, sigmoid}) {
        check_differences(Balance<MicroBatch, Importance>{{}, {1.0}}, router);
        check_differences(Balance<Synchronized, ProbImportance>{{}, {1.0, Variance::sample}}, router, cut(1, 2, {9}));
        check_differences(Balance<Sequence, SmoothLoad>{{}, {1.0}}, router);
        check_differences(Balance<OfId<MicroBatch>, GlobalEntropy>{OfId<MicroBatch>(1), {1.0, 1.609}}, router);
    }
}

TEST_CASE("the gradient of mutual information through a softmax router is that of differences") {
    check_differences(mutual_information_loss<MicroBatch>(1.0), softmax, cut(1, 1, {}, true));
    check_differences(mutual_information_loss<Synchronized>(1.0), softmax, cut(1, 3, {3, 20}));
}

TEST_CASE("synchronised means give the same total gradient and loss for every split over ranks") {
    check_splits(all_of<Synchronized>(), rank_splits());
    check_splits(all_of(1.0, OfId<Synchronized>(2)), rank_splits());
}

TEST_CASE("means of a whole buffer give the same total gradient and loss for every split") {
    check_splits(all_of<Buffered<Synchronized, Extent::whole>>(), all_splits(), 2, true);
}

TEST_CASE("windowed means give the same total gradient and loss for every split") {
    check_splits(all_of<Windowed<2>>(), all_splits(), 3);
}

TEST_CASE("means of sequences give the same total gradient for every split that keeps sequences whole") {
    check_splits(all_of<Sequence>(), {cut(1, 2, {12}), cut(2, 2, {4, 8, 20}, true), cut(3, 1, {0, 16})});
}

TEST_CASE("the local entropy gives the same total gradient for every split") {
    check_splits(Balance<PerToken, LocalEntropy>{{}, {1.0}}, all_splits());
    check_splits(Balance<OfId<PerToken>, LocalEntropy>{OfId<PerToken>(1), {1.0}}, all_splits());
}

TEST_CASE("the loss of a synchronised mean is that of all tokens in one micro-batch") {
    Team<Balance<Synchronized, Importance>> synchronized({{}, {1.0}}, softmax);
    Team<Balance<MicroBatch, Importance>> micro({{}, {1.0}}, softmax);
    const Sums expected = micro.run(whole);
    for (const Split& split : rank_splits()) CHECK(synchronized.run(split).distance(expected) < 1e-12);
    CHECK(micro.run(cut(1, 2, {9})).distance(expected) > 1e-2);  // a micro-batch has a mean of its own
}

TEST_CASE("the quantile bias is the same, bit for bit, for every split") {
    for (const TopK& router : {softmax, sigmoid}) {
        Team<QuantileBalance> team({{}, {.score = router.score, .bins = 50}}, router);
        const auto expected = team.run(whole, 4).bias;
        CHECK(*std::max_element(expected.begin(), expected.end()) > 0.01f);
        for (const Split& split : all_splits()) CHECK(team.run(split, 4).bias == expected);
    }
}
