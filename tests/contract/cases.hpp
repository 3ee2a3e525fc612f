// The gradient contract, case by case, for any team of ranks.
//
// A team runs `body(comm)` on each of `ranks` ranks and adds up what they return: SplitResult team.run(ranks, body).
#pragma once

#include <doctest/doctest.h>

#include <vector>

#include "contract/reference.hpp"
#include "contract/run_split.hpp"

namespace steelyard::testing::contract {

inline constexpr double tolerance = 1e-12;
inline constexpr LoadBalancingLoss strong{.coefficient = 3.0};

template <class Team, class BalanceT>
SplitResult run(Team& team, const BalanceT& balance, const Split& split, const Options& options = {}) {
    CAPTURE(split.name);
    SplitResult result =
        team.run(split.ranks(), [&](const auto& comm) { return run_rank(comm, balance, split, options); });
    for (const RankResult& rank : result.ranks) CHECK(rank.message == "ok");
    return result;
}

inline void check_equal(const SplitResult& came, const SplitResult& expected) {
    CHECK(relative_difference(came.grads(), expected.grads()) <= tolerance);
    CHECK(relative_difference(came.dx(), expected.dx()) <= tolerance);
    CHECK(std::abs(came.loss() - expected.loss()) <= tolerance * (1 + std::abs(expected.loss())));
    CHECK(came.choices == expected.choices);
}

/// Splits that keep everything in one micro-step: even, uneven, a rank without tokens, padding.
inline std::vector<Split> rank_splits() {
    return {even(1, 2), even(1, 3), even(1, 4), uneven(1, 4, 1), cut("an idle rank", 1, 4, {20, 20, 41}),
            cut("one rank has all", 1, 3, {0, 48}), padded(even(1, 2), 1), padded(uneven(1, 4, 2), 2),
            padded(cut("an idle rank", 1, 3, {30, 30}), 3)};
}

/// Splits over micro-steps too, one of them with a micro-step that holds nothing, or nothing but padding.
inline std::vector<Split> all_splits() {
    std::vector<Split> splits = rank_splits();
    for (const Split& split :
         {even(2, 1), even(6, 1), even(2, 4), even(4, 3), uneven(3, 4, 5), uneven(6, 2, 6),
          cut("an empty micro-step", 3, 2, {10, 30, 30, 30, 31}),
          padded(cut("a micro-step of padding", 3, 2, {10, 30, 30, 30, 31}), 4), padded(uneven(4, 4, 7), 5)})
        splits.push_back(split);
    return splits;
}

inline Split whole() { return cut("one call", 1, 1, {}); }

/// The gradient of the task, plus what the formulas say of the balance.
template <class Team>
class TaskAnd {
public:
    TaskAnd(Team& team, std::int64_t steps = 1)
        : steps_(steps), task_(run(team, NoBalance{}, whole(), {.steps = steps})) {
        auto rig = make_rig<NoBalance, SelfComm>({}, {});
        const auto weight = rig.params.router.weight;
        router_.assign(weight.data, weight.data + weight.size());
        router_at_ = static_cast<std::size_t>(weight.data - rig.param_values().data());
    }

    [[nodiscard]] Reference reference(const Split& split) const {
        return {split, steps_, view<const double, 2>(router_.data(), experts, width)};
    }
    [[nodiscard]] SplitResult plus(const Expected& balance) const {
        SplitResult sum = task_;
        const std::size_t dx_at = sum.grads().size();
        for (std::size_t i = 0; i < balance.router.size(); ++i) sum.sums[router_at_ + i] += balance.router[i];
        for (std::size_t i = 0; i < balance.dx.size(); ++i) sum.sums[dx_at + i] += balance.dx[i];
        sum.sums.back() += balance.loss;
        return sum;
    }

private:
    std::int64_t steps_;
    SplitResult task_;
    std::vector<double> router_;
    std::size_t router_at_ = 0;
};

/// Every split gives the gradient that the scope's definition says, and meets the loads that it says.
template <class Team, class BalanceT>
void check_definition(Team& team, const BalanceT& balance, const Sees& sees, const std::vector<Split>& splits,
                      const Options& options = {}) {
    const TaskAnd<Team> task(team, options.steps);
    for (const Split& split : splits) {
        CAPTURE(split.name);
        const Reference reference = task.reference(split);
        Expected expected;
        reference.add_balance_loss(expected, balance.objective.coefficient, sees);
        const SplitResult came = run(team, balance, split, options);
        check_equal(came, task.plus(expected));
        for (const RankResult& rank : came.ranks)
            for (std::size_t m = 0; m < rank.loads.size(); ++m) {
                const Place own{options.steps - 1, static_cast<std::int64_t>(m), rank.rank, 0};
                CHECK(rank.loads[m] == reference.counts(own, sees));
            }
    }
}

/// Every split gives the same total gradient as the whole batch in one call.
template <class Team, class BalanceT>
void check_split_does_not_matter(Team& team, const BalanceT& balance, const std::vector<Split>& splits,
                                 const Options& options = {}) {
    const SplitResult expected = run(team, balance, whole(), options);
    for (const Split& split : splits) {
        CAPTURE(split.name);
        check_equal(run(team, balance, split, options), expected);
    }
}

template <class Team>
void synchronized_is_free_of_ranks(Team& team) {
    const SynchronizedLoss balance{{}, strong};
    check_split_does_not_matter(team, balance, rank_splits());
    check_definition(team, balance, of_micro_step, all_splits());
}

template <class Team>
void windowed_is_free_of_everything(Team& team) {
    const WindowedLoss<2> balance{{}, strong};
    check_split_does_not_matter(team, balance, all_splits(), {.steps = 3});
    check_definition(team, balance, of_last_two_steps, all_splits(), {.steps = 4});
}

template <class Team>
void whole_buffer_is_free_of_everything(Team& team) {
    const Balance<Buffered<Synchronized, Extent::whole>, LoadBalancingLoss> balance{{}, strong};
    check_split_does_not_matter(team, balance, all_splits(), {.steps = 2, .two_passes = true});
    check_definition(team, balance, same_step, all_splits(), {.steps = 2, .two_passes = true});
}

template <class Team>
void sequence_is_free_of_everything_that_keeps_sequences(Team& team) {
    const SequenceLoss balance{{}, strong};
    std::vector<Split> splits{even(1, 2), even(2, 4), even(4, 1), padded(even(2, 2), 1)};
    for (const std::uint64_t seed : {1, 2, 3}) {
        splits.push_back(uneven(2, 4, seed, sequence_length));
        splits.push_back(padded(uneven(3, 2, seed, sequence_length), seed));
    }
    check_split_does_not_matter(team, balance, splits);
    const TaskAnd<Team> task(team);
    Expected expected;
    task.reference(whole()).add_balance_loss(expected, strong.coefficient, of_sequence);
    for (const Split& split : splits) check_equal(run(team, balance, split), task.plus(expected));
}

template <class Team>
void z_loss_is_free_of_everything(Team& team) {
    const RouterZLoss balance{{}, {.coefficient = 0.7}};
    const TaskAnd<Team> task(team);
    Expected expected;
    task.reference(whole()).add_z_loss(expected, 0.7);
    for (const Split& split : all_splits()) check_equal(run(team, balance, split), task.plus(expected));
}

/// No loss; the bias that a step leaves, and the counts that it came from, are the same however the step was split.
template <class Team>
void bias_is_free_of_everything(Team& team) {
    for (const bool centred : {false, true}) {
        const LossFree balance{{}, {.rate = 0.05, .centred = centred}};
        const Options options{.steps = 3};
        const SplitResult expected = run(team, balance, whole(), options);
        const RankResult alone = run_rank(SelfComm{}, balance, whole(), options).ranks.front();
        CHECK(*std::max_element(alone.bias.begin(), alone.bias.end()) > 0.04f);
        for (const Split& split : all_splits()) {
            CAPTURE(split.name);
            const SplitResult came = run(team, balance, split, options);
            check_equal(came, expected);
            for (const RankResult& rank : came.ranks) {
                CHECK(rank.bias == alone.bias);
                CHECK(rank.step_load == alone.step_load);
            }
        }
    }
}

/// A random sample depends on the number of ranks (it has one rank's share of tokens) and on the order of the tokens,
/// not on how many tokens each rank brought. On one rank it is everything.
template <class Team>
void shuffled_is_free_of_the_ranks_sizes(Team& team) {
    const ShuffledLoss balance{Shuffled{5}, strong};
    for (const int ranks : {2, 4}) {
        const SplitResult expected = run(team, balance, even(1, ranks));
        for (const RankResult& rank : expected.ranks) CHECK(rank.loads[0].back() == tokens / ranks);
        const std::vector<index_t> first_idle = ranks == 2 ? std::vector<index_t>{0} : std::vector<index_t>{0, 11, 12};
        for (const Split& split : {uneven(1, ranks, 1), uneven(1, ranks, 2), padded(uneven(1, ranks, 3), 1),
                                   cut("an idle rank", 1, ranks, first_idle)}) {
            CAPTURE(split.name);
            const SplitResult came = run(team, balance, split);
            check_equal(came, expected);
            for (const RankResult& rank : came.ranks) CHECK(rank.loads == came.ranks.front().loads);
        }
    }
    check_definition(team, balance, of_micro_step, {whole(), padded(whole(), 1), even(3, 1)});
}

/// What depends on the split does so exactly as its definition says: each call, or each prefix, has its own f.
template <class Team>
void micro_and_prefix_differ_as_documented(Team& team) {
    check_definition(team, MicroBatchLoss{{}, strong}, of_micro_batch, all_splits());
    check_definition(team, BufferedLoss{{}, strong}, of_prefix, all_splits(), {.steps = 2});
    check_definition(team, Balance<Buffered<MicroBatch>, LoadBalancingLoss>{{}, strong}, of_own_prefix, all_splits());
    // The difference is there: splitting changes the gradient by far more than rounding.
    for (const Split& split : {even(2, 2), uneven(3, 4, 5)}) {
        CAPTURE(split.name);
        CHECK(relative_difference(run(team, MicroBatchLoss{{}, strong}, split).grads(),
                                  run(team, MicroBatchLoss{{}, strong}, whole()).grads()) > 1e-4);
        CHECK(relative_difference(run(team, BufferedLoss{{}, strong}, split).grads(),
                                  run(team, BufferedLoss{{}, strong}, whole()).grads()) > 1e-4);
    }
}

/// The paper's hybrid: the sum of its two parts.
template <class Team>
void hybrid_is_the_sum_of_its_parts(Team& team) {
    const TaskAnd<Team> task(team);
    for (const Split& split : all_splits()) {
        CAPTURE(split.name);
        Expected expected;
        task.reference(split).add_balance_loss(expected, 3.0, of_prefix);
        task.reference(split).add_balance_loss(expected, 0.6, of_micro_batch);
        check_equal(run(team, hybrid_loss(3.0, 0.2), split), task.plus(expected));
    }
}

/// Noise belongs to a token's place in the global batch, so it does not depend on the split either.
template <class Team>
void noise_is_free_of_everything(Team& team) {
    const Options options{.router = {.k = top_k, .jitter = 0.2, .noise = 0.5, .seed = 4}, .steps = 3};
    const std::vector<Split> splits{even(1, 4), even(2, 3), even(6, 1), uneven(3, 4, 5), uneven(2, 2, 8)};
    check_split_does_not_matter(team, WindowedLoss<2>{{}, strong}, splits, options);
    const SplitResult noisy = run(team, NoBalance{}, whole(), options);
    const SplitResult plain = run(team, NoBalance{}, whole(), {.steps = 3});
    CHECK(relative_difference(noisy.grads(), plain.grads()) > 1e-3);
}

/// `Synchronized` on R ranks is `MicroBatch` on the concatenation; a buffer of one micro-step is its inner scope.
template <class Team>
void scopes_agree_where_they_must(Team& team) {
    // Gradients bit by bit. The reported loss is a sum of products, which each compiled policy may round its own way.
    const auto same_sums = [](const SplitResult& a, const SplitResult& b) {
        return same_bits(a.grads(), b.grads()) && same_bits(a.dx(), b.dx()) &&
               std::abs(a.loss() - b.loss()) <= 1e-14 * std::abs(b.loss());
    };
    const SplitResult concatenated = run(team, MicroBatchLoss{{}, strong}, whole());
    using WholeLoss = Balance<Buffered<Synchronized, Extent::whole>, LoadBalancingLoss>;
    for (const Split& split : rank_splits()) {
        CAPTURE(split.name);
        const SplitResult synchronized = run(team, SynchronizedLoss{{}, strong}, split);
        const SplitResult micro = run(team, MicroBatchLoss{{}, strong}, split);
        const SplitResult shuffled = run(team, ShuffledLoss{Shuffled{2}, strong}, split);
        check_equal(synchronized, concatenated);
        CHECK(same_sums(run(team, BufferedLoss{{}, strong}, split), synchronized));
        CHECK(same_sums(run(team, WholeLoss{{}, strong}, split), synchronized));
        CHECK(same_sums(run(team, Balance<Buffered<MicroBatch>, LoadBalancingLoss>{{}, strong}, split), micro));
        CHECK(same_sums(run(team, Balance<Buffered<Shuffled>, LoadBalancingLoss>{{Shuffled{2}}, strong}, split),
                        shuffled));
    }
}

}  // namespace steelyard::testing::contract
