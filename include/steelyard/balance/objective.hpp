// Objectives: what acts on a load. The second half of a balance policy; the first is the scope.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>

#include "steelyard/ops/balance_ops.hpp"

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
        const double choices = static_cast<double>(top_k) * static_cast<double>(tokens);
        return tokens == 0 ? 0.0 : static_cast<double>(counts[i]) / choices;
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

/// One segment as a mean objective sees it: the scope's fixed-point sums of the objective's quantity.
struct SegmentMean {
    view<const std::int64_t, 1> sums;  // [E]  over the tokens of the scope, in units of FixedPoint::unit
    std::int64_t tokens = 0;           //      how many those are, above 0

    [[nodiscard]] constexpr index_t experts() const { return sums.extents[0]; }
    /// m_i = mean over the scope's tokens of the quantity.
    [[nodiscard]] constexpr double mean(index_t i) const {
        return static_cast<double>(sums[i]) * FixedPoint::unit / static_cast<double>(tokens);
    }
    /// The smallest mean above 0 that there is.
    [[nodiscard]] constexpr double least() const { return FixedPoint::unit / static_cast<double>(tokens); }
};

/// An objective on the mean, over the scope, of a differentiable quantity of each token. Unlike a load objective it may
/// be any function of that mean: the sums themselves travel, in fixed point. Contract:
///
/// 1. `quantity`, a constant, says which tensor of the routing is meant.
/// 2. `loss(segment, gradient)` returns the value for the segment before `coefficient` and writes (=) its derivative by
///    each m_i into `gradient` [E]. It is called for scopes with tokens only.
/// 3. Both are finite, and pure functions of the arguments.
template <class O>
concept MeanObjective = requires(const O& o, const SegmentMean& segment, view<double, 1> gradient) {
    { O::quantity } -> std::convertible_to<Quantity>;
    { o.coefficient } -> std::convertible_to<double>;
    { o.loss(segment, gradient) } -> std::same_as<double>;
};

/// Arithmetic on a row of logits by the C library. A device may have a faster one, for objectives that take it.
struct RowMath {
    /// exp(x) for x up to 0, or above it by no more than rounding.
    template <class T>
    static T exp(T x) {
        return std::exp(x);
    }
    /// out[i] += factor exp(row[i] - shift), where no row[i] is above the shift by more than rounding.
    template <class T>
    static void add_exp(view<const T, 1> row, T shift, T factor, view<T, 1> out) {
        for (index_t i = 0; i < row.extents[0]; ++i) out.data[i] += factor * std::exp(row.data[i] - shift);
    }
    template <class T>
    static T log_sum_exp(view<const T, 1> row) {
        T largest = row.data[0], sum = 0;
        for (index_t i = 1; i < row.extents[0]; ++i) largest = row.data[i] > largest ? row.data[i] : largest;
        for (index_t i = 0; i < row.extents[0]; ++i) sum += std::exp(row.data[i] - largest);
        return largest + std::log(sum);
    }
};

/// An objective on the logits of each token alone. Contract:
///
/// 1. `loss(logits)` is the token's value before `coefficient`.
/// 2. `gradient(logits, factor, dlogits)` adds (+=) factor times its derivative.
/// 3. Both are pure, and finite for every finite row.
/// 4. Both may take the arithmetic as a last argument, `math = RowMath{}`: a device then gives its own.
///
/// What it makes of the logits, such as their softmax, is its own: a router with sigmoid scores has other
/// probabilities.
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

/// An objective that steers selection by what each expert's tokens lack to be chosen (ops/balance_ops.hpp, Shortfalls)
/// rather than by how many there are. Contract:
///
/// 1. `bins` is how many bins a histogram has, `score` which scores the router adds the bias to.
/// 2. `update(histogram [E, bins], choices, bias)` changes the bias [E] (float) once for each optimizer step, given the
///    histograms of the whole step over the scope, in ShortfallBins(bias, bins), and the choices of their tokens.
template <class O>
concept ShortfallObjective =
    requires(const O& o, view<const std::int64_t, 2> histogram, std::int64_t choices, view<float, 1> bias) {
        { o.bins } -> std::convertible_to<index_t>;
        { o.score } -> std::convertible_to<Score>;
        { o.update(histogram, choices, bias) } -> std::same_as<void>;
    };

template <class O>
concept Objective =
    LoadObjective<O> || MeanObjective<O> || TokenObjective<O> || BiasObjective<O> || ShortfallObjective<O>;

}  // namespace steelyard
