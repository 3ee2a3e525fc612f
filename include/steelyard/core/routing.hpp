// The values that flow between the stages: what the router decided, and how tokens are grouped by expert.
#pragma once

#include <algorithm>
#include <cstdint>

#include "steelyard/core/gate.hpp"
#include "steelyard/core/shape.hpp"
#include "steelyard/core/step.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard {

/// An expert's index in a token's choices; -1 where the token takes no expert (padding, a drop, a choice not made).
using expert_t = std::int32_t;

/// What the router decided for each token: written by the router, read by everything after it.
template <class T, class Space = HostSpace>
struct Routing {
    view<T, 2, Space> logits;            // [T, E]  raw router output, noise included
    view<T, 2, Space> probs;             // [T, E]  scores normalised over all experts: a row sums to 1
    view<expert_t, 2, Space> expert;     // [T, K]  best first; -1 throughout for a masked token
    view<T, 2, Space> weight;            // [T, K]  combine weights; 0 where expert is -1
    view<T, 2, Space> smooth_load = {};  // [T, E]  differentiable chance of each choice; absent for most routers

    template <class Field>
    void fields(Field&& field, index_t tokens, index_t experts, index_t top_k, bool with_smooth_load = false) {
        field("logits", logits, tokens, experts);
        field("probs", probs, tokens, experts);
        field("expert", expert, tokens, top_k);
        field("weight", weight, tokens, top_k);
        field("smooth_load", smooth_load, with_smooth_load ? tokens : 0, experts);
    }

    /// The first `tokens` rows of everything.
    [[nodiscard]] Routing first(index_t tokens) const {
        return {logits.slice(0, tokens), probs.slice(0, tokens), expert.slice(0, tokens), weight.slice(0, tokens),
                smooth_load.slice(0, std::min(tokens, smooth_load.extents[0]))};
    }
};

/// The gradient that flows back into the router. Stages accumulate (+=) into it.
template <class T, class Space = HostSpace>
struct RoutingGrad {
    view<T, 2, Space> weight;            // [T, K]  from the combine
    view<T, 2, Space> probs;             // [T, E]  from balance losses on P
    view<T, 2, Space> logits;            // [T, E]  from losses on the logits (z-loss)
    view<T, 2, Space> smooth_load = {};  // [T, E]  from losses on the smooth load, where the router has one

    template <class Field>
    void fields(Field&& field, index_t tokens, index_t experts, index_t top_k, bool with_smooth_load = false) {
        field("weight", weight, tokens, top_k);
        field("probs", probs, tokens, experts);
        field("logits", logits, tokens, experts);
        field("smooth_load", smooth_load, with_smooth_load ? tokens : 0, experts);
    }

    [[nodiscard]] RoutingGrad first(index_t tokens) const {
        return {weight.slice(0, tokens), probs.slice(0, tokens), logits.slice(0, tokens),
                smooth_load.slice(0, std::min(tokens, smooth_load.extents[0]))};
    }
};

/// Tokens grouped by expert: row r of the grouped order is choice `choice[r]` = t * K + k of token t.
///
/// Rows of expert e are `[offsets[e], offsets[e + 1])`, by ascending token (a stable counting sort).
/// Only the first `offsets[E]` entries of `choice` mean anything. Backward replays the same plan.
template <class Space = HostSpace>
struct Plan {
    view<index_t, 1, Space> offsets;      // [E + 1]
    view<std::int32_t, 1, Space> choice;  // [T * K]  grouped row -> flat choice t * K + k
    view<std::int32_t, 2, Space> row;     // [T, K]   choice -> grouped row, -1 where there is none

    template <class Field>
    void fields(Field&& field, index_t tokens, index_t experts, index_t top_k) {
        field("offsets", offsets, experts + 1);
        field("choice", choice, tokens * top_k);
        field("row", row, tokens, top_k);
    }

    [[nodiscard]] Plan first(index_t tokens) const {
        return {offsets, choice.slice(0, tokens * row.extents[1]), row.slice(0, tokens)};
    }
    [[nodiscard]] index_t experts() const { return offsets.extents[0] - 1; }
    [[nodiscard]] index_t top_k() const { return row.extents[1]; }
};

/// What the caller says of a call's tokens.
template <class Space = HostSpace>
struct TokenInfo {
    view<const std::uint8_t, 1, Space> mask = {};  // [T] nonzero: valid. Absent: all are valid
    view<const index_t, 1, Space> sequences = {};  // [S + 1] offsets of packed sequences, 0 .. T. Absent: one sequence
    StepInfo step = {};
    Mode mode = Mode::train;
    view<const std::int32_t, 1, Space> ids = {};  // [T] of tokens, tasks or domains, for routers that ask
};

/// What a router sees of one call.
template <class T, class Space = HostSpace>
struct RouterInput {
    view<const T, 2, Space> x;  // [T, d]
    TokenInfo<Space> tokens = {};
    view<const float, 1, Space> selection_bias = {};  // [E]     of the balance policy, or absent
    view<const gate_t<T>, 2, Space> prior = {};       // [T, E]  logits of the layer before, for routers that ask
    std::uint32_t layer = 0;                          // index in the model: keys the random numbers
};

/// Where a router adds (+=) the gradients of its inputs. Absent: not wanted.
template <class T, class Space = HostSpace>
struct RouterInputGrad {
    view<T, 2, Space> x;                   // [T, d]
    view<gate_t<T>, 2, Space> prior = {};  // [T, E]
};

}  // namespace steelyard
