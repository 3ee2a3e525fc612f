// What a device does for balance policies: count choices, sum probabilities, add gradients.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "steelyard/core/random.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard {

/// What one call routed, as a balance policy sees it: after selection, before any drop.
template <class T, class Space = HostSpace>
struct Observation {
    Routing<T, Space> routing;
    TokenInfo<Space> tokens;
    std::int64_t valid_tokens = 0;  // of this call, padding left out
    std::uint32_t layer = 0;
    int rank = 0;                                // of the data group
    view<const std::int64_t, 1> tokens_of_rank;  // [R] valid tokens of each rank; only for scopes that ask
    std::int32_t only_id = -1;                   // not below 0: a scope sees the tokens of this id alone

    [[nodiscard]] index_t count() const { return routing.probs.extents[0]; }
    [[nodiscard]] index_t experts() const { return routing.probs.extents[1]; }
    [[nodiscard]] index_t top_k() const { return routing.expert.extents[1]; }
    [[nodiscard]] bool valid(index_t t) const { return !tokens.mask.present() || tokens.mask[t] != 0; }
    /// Whether the scope sees token t: valid, and of the id that it asks for. Without ids there is no such token.
    [[nodiscard]] bool counts(index_t t) const {
        return valid(t) && (only_id < 0 || (tokens.ids.present() && tokens.ids[t] == only_id));
    }
};

/// A differentiable [T, E] tensor of a routing, whose column sums a loss may be made of.
enum class Quantity {
    probs,        ///< the probabilities over all experts
    gates,        ///< the combine weights, 0 for experts that were not chosen
    smooth_load,  ///< the differentiable chance of each choice, of routers that have one
};

/// Fixed-point numbers in units of 2^-40: sums of them are exact, so that they depend neither on the order nor on how
/// tokens are split over ranks and micro-steps. Values beyond +-1024 count as +-1024; a sum holds 2^23 tokens of value
/// 1.
struct FixedPoint {
    static constexpr double unit = 0x1.0p-40, largest = 1024.0;

    /// The nearest multiple of the unit to a value within +-1024. Adding 1.5 * 2^52 leaves the integer in the low bits
    /// of the mantissa: no branch and no call, so that a loop over it is vectorised.
    [[nodiscard]] static constexpr std::int64_t from_small(double value) {
        constexpr double shift = 0x1.8p52;
        return std::bit_cast<std::int64_t>(value * 0x1.0p40 + shift) - std::bit_cast<std::int64_t>(shift);
    }
    [[nodiscard]] static constexpr std::int64_t from(double value) {
        return from_small(std::clamp(value, -largest, largest));
    }
};

/// What a load tallies of each token: here, the experts that it chose. W = E + 1 words.
struct Choices {};

/// The token's fixed-point value of a quantity, for each expert. W = E + 1 words.
template <Quantity Q>
struct FixedSums {};

/// Uniform bins that hold every shortfall: with scores in [0, 1] it lies between min(bias) - 1 and max(bias) + 1.
struct ShortfallBins {
    double lowest = -1.0, width = 0.0;
    index_t count = 0;

    ShortfallBins() = default;
    constexpr ShortfallBins(view<const float, 1> bias, index_t bins) : count(bins) {
        double least = bias[0], most = bias[0];
        for (index_t e = 1; e < bias.extents[0]; ++e) {
            least = std::min<double>(least, bias[e]);
            most = std::max<double>(most, bias[e]);
        }
        lowest = least - 1.0;
        width = (most - least + 2.0) / static_cast<double>(bins);
    }
    [[nodiscard]] constexpr index_t bin(double shortfall) const {
        return std::clamp(static_cast<index_t>((shortfall - lowest) / width), index_t{0}, count - 1);
    }
};

/// What each expert lacks to be chosen by the token: a_t - s_te, where the cutoff a_t is the largest s + bias among the
/// experts that were not chosen. A histogram for each expert: W = E * bins + 1 words, the last of which is the number
/// of choices. Tokens that chose all experts have no cutoff and are left out.
template <class Space = HostSpace>
struct Shortfalls {
    Score score = Score::sigmoid;
    view<const float, 1, Space> bias;  // [E]
    index_t bins = 0;
};

/// A sample without replacement: `drawn` of `population` consecutive global tokens, the same on every rank.
/// This rank's valid tokens are the global tokens `first`, `first + 1`, ...
struct TokenDraw {
    Philox stream;
    std::int64_t population = 0, drawn = 0, first = 0;
};

/// Balance kernels of a device, as static functions. A *load* is an integer tensor [S, W]: for each segment what is
/// tallied of its tokens, W = E + 1 words for choices: those of each expert and, in the last column, the tokens that
/// made them. Counts and tokens travel together, so that neither can be divided by the other's batch. S is 1, or the
/// number of sequences. Only tokens that
/// `observation.counts` take part. Results do not depend on the number of threads;
/// floating-point sums are taken in double over fixed blocks of tokens.
///
/// Loads, sums and coefficients are the host's: policies do arithmetic on them. A device with memory of its own reaches
/// them too (pinned), and writes them in the order of its work.
///
///  index_t scratch_bytes(device, shape)
///  void count<T>(device, observation, load[S, W] (=), tally, scratch)
///      S = 1: all tokens; otherwise one row for each packed sequence (rows beyond the last are 0).
///      `tally`: Choices, FixedSums<Q> or Shortfalls.
///  void count_drawn<T>(device, observation, draw, load[1, W] (=), tally, scratch)
///      Only the tokens of the draw, which is from all valid tokens.
///  void sum_quantity<T, Q>(device, observation, sums[S, E] (=), own_tokens[S] (=), scratch)
///      sums[s, i] = sum over tokens t of segment s of quantity Q of (t, i); own_tokens[s]: how many those are.
///  void add_quantity_gradient<T, Q>(device, observation, coefficients[S, E], factor, grad (+=), scratch)
///      The gradient of sum_t sum_i factor * coefficients[segment of t, i] * Q(t, i), into grad.probs, grad.weight of
///      the chosen, or grad.smooth_load.
///  void sum_tokens<T>(device, observation, objective, sum[1] (=), scratch)
///      Sum over tokens of objective.loss(logits row).
///  void add_token_gradient<T>(device, observation, objective, factor, dlogits[T, E] (+=), scratch)
///      objective.gradient(logits row, factor, dlogits row) for each token.
///
/// Objectives that take a `RowMath` as last argument (balance/objective.hpp) may be given the device's own.
template <class Device>
struct balance_ops;

}  // namespace steelyard
