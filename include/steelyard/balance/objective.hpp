// Objectives: what acts on a load. The second half of a balance policy; the first is the scope.
#pragma once

#include <concepts>
#include <cstdint>

#include "steelyard/core/view.hpp"

namespace steelyard {

/// One segment as a load objective sees it: the scope's load, and this call's own probabilities.
struct SegmentLoad {
    view<const std::int64_t, 1> counts;  // [E]  c_i: choices of expert i over the scope
    std::int64_t tokens = 0;             //      tokens that made them, over the scope
    view<const double, 1> prob_sums;     // [E]  sum of p_ti over this call's valid tokens of the segment
    std::int64_t own_tokens = 0;         //      how many those are
    index_t top_k = 1;                   //      K

    [[nodiscard]] constexpr index_t experts() const { return counts.extents[0]; }
    /// f_i = c_i / (K * tokens); 0 for a scope without tokens.
    [[nodiscard]] constexpr double fraction(index_t i) const {
        return tokens == 0 ? 0.0 : static_cast<double>(counts[i]) / (static_cast<double>(top_k) * static_cast<double>(tokens));
    }
    /// P_i = mean over this call's tokens of p_ti; 0 for a segment without tokens.
    [[nodiscard]] constexpr double mean_prob(index_t i) const {
        return own_tokens == 0 ? 0.0 : prob_sums[i] / static_cast<double>(own_tokens);
    }
};

/// An objective on the load of each segment. Contract:
///
/// 1. `loss(segment, gradient)` returns the value for the segment *before* `coefficient`, as a mean over the
///    segment's own tokens, and writes (=) its derivative by each P_i into `gradient` [E]. The load is a count:
///    it has no derivative.
/// 2. A segment without tokens, or a scope without any, has loss 0 and gradient 0.
/// 3. `coefficient` scales both; the policy applies it together with the token normalisation.
/// 4. It is a pure function of its arguments.
template <class O>
concept LoadObjective = requires(const O& o, const SegmentLoad& segment, view<double, 1> gradient) {
    { o.coefficient } -> std::convertible_to<double>;
    { o.loss(segment, gradient) } -> std::same_as<double>;
};

/// An objective on the logits of each token alone. Contract:
///
/// 1. `loss(logits)` is the token's value before `coefficient`.
/// 2. `gradient(logits, factor, dlogits)` adds (+=) factor times its derivative.
/// 3. Both are pure, and finite for every finite row.
template <class O>
concept TokenObjective =
    requires(const O& o, view<const double, 1> logits, double factor, view<double, 1> dlogits) {
        { o.coefficient } -> std::convertible_to<double>;
        { o.loss(logits) } -> std::same_as<double>;
        { o.gradient(logits, factor, dlogits) } -> std::same_as<void>;
    };

/// An objective that steers selection by a bias for each expert and has no loss. Contract:
///
/// 1. `update(counts, bias)` changes the bias [E] (float) once for each optimizer step, given the choices of the
///    whole step over the scope.
/// 2. The bias acts on the selection of *later* steps only, and never enters the combine weights.
template <class O>
concept BiasObjective = requires(const O& o, view<const std::int64_t, 1> counts, view<float, 1> bias) {
    { o.update(counts, bias) } -> std::same_as<void>;
};

template <class O>
concept Objective = LoadObjective<O> || TokenObjective<O> || BiasObjective<O>;

}  // namespace steelyard
