// What a device does for balance policies: count choices, sum probabilities, add gradients.
#pragma once

#include <cstdint>

#include "steelyard/core/random.hpp"
#include "steelyard/core/routing.hpp"

namespace steelyard {

/// What one call routed, as a balance policy sees it: after selection, before any drop.
template <class T, class Space = HostSpace>
struct Observation {
    Routing<T, Space> routing;
    TokenInfo<Space> tokens;
    std::int64_t valid_tokens = 0;                   // of this call, padding left out
    std::uint32_t layer = 0;
    int rank = 0;                                    // of the data group
    view<const std::int64_t, 1> tokens_of_rank;      // [R] valid tokens of each rank; only for scopes that ask

    [[nodiscard]] index_t count() const { return routing.probs.extents[0]; }
    [[nodiscard]] index_t experts() const { return routing.probs.extents[1]; }
    [[nodiscard]] index_t top_k() const { return routing.expert.extents[1]; }
    [[nodiscard]] bool valid(index_t t) const { return !tokens.mask.present() || tokens.mask[t] != 0; }
};

/// A sample without replacement: `drawn` of `population` consecutive global tokens, the same on every rank.
/// This rank's valid tokens are the global tokens `first`, `first + 1`, ...
struct TokenDraw {
    Philox stream;
    std::int64_t population = 0, drawn = 0, first = 0;
};

/// Balance kernels of a device, as static functions. A *load* is an integer tensor [S, E + 1]: for each segment the
/// choices of each expert and, in the last column, the tokens that made them. Counts and tokens travel together, so
/// that neither can be divided by the other's batch. S is 1, or the number of sequences. Results do not depend on
/// the number of threads; floating-point sums are taken in double over fixed blocks of tokens.
///
///  index_t scratch_bytes(device, shape)
///  void count<T>(device, observation, load[S, E+1] (=))
///      S = 1: all valid tokens; otherwise one row for each packed sequence (rows beyond the last are 0).
///  void count_drawn<T>(device, observation, draw, load[1, E+1] (=))
///      Only the tokens of the draw.
///  void sum_probs<T>(device, observation, sums[S, E] (=), own_tokens[S] (=), scratch)
///      sums[s, i] = sum over valid tokens t of segment s of probs[t, i]; own_tokens[s]: how many those are.
///  void add_to_probs<T>(device, observation, coefficients[S, E], factor, dprobs[T, E] (+=))
///      dprobs[t, i] += factor * coefficients[segment of t, i] for valid t.
///  double sum_tokens<T>(device, observation, objective, scratch)
///      Sum over valid tokens of objective.loss(logits row).
///  void add_token_gradient<T>(device, observation, objective, factor, dlogits[T, E] (+=))
///      objective.gradient(logits row, factor, dlogits row) for each valid token.
template <class Device>
struct balance_ops;

}  // namespace steelyard
