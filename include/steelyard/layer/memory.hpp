// The four lifetimes of a layer's memory: params, state, context, workspace. Sizes and views from one description.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "steelyard/balance/policy.hpp"
#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/expert/shared.hpp"
#include "steelyard/layer/stack.hpp"
#include "steelyard/layer/sum_head.hpp"

namespace steelyard {

/// Splits an Expert policy into the routed experts and the shared one beside them, where there is one.
template <class ExpertT>
struct ExpertParts {
    static constexpr bool has_shared = false;
    using Routed = ExpertT;
    using Shared = ExpertT;
    static constexpr const Routed& routed(const ExpertT& expert) { return expert; }
    static constexpr const Shared& shared(const ExpertT& expert) { return expert; }
};

template <class RoutedT, class SharedT>
struct ExpertParts<WithShared<RoutedT, SharedT>> {
    static constexpr bool has_shared = true;
    using Routed = RoutedT;
    using Shared = SharedT;
    static constexpr const Routed& routed(const WithShared<RoutedT, SharedT>& expert) { return expert.routed; }
    static constexpr const Shared& shared(const WithShared<RoutedT, SharedT>& expert) { return expert.shared; }
};

/// What one call was about; backward reads it instead of being told again.
struct CallInfo {
    enum class Phase : std::int32_t { none, counted, ready, evaluated, spent };
    std::int64_t magic = 0, layout = 0;  // layout: of the context that this belongs to
    Phase phase = Phase::none;
    Mode mode = Mode::train;
    index_t tokens = 0, sequences = 0;  // sequences: 0 where no offsets were given
    std::int64_t valid_tokens = 0;
    std::int64_t masked = 0;  // whether there was a mask
    StepInfo step;

    static constexpr std::int64_t expected_magic = 0x53544c5943414c4c;

    /// Written by a layer whose context has this layout, and in this phase.
    [[nodiscard]] bool is(Phase expected, std::int64_t of_layout) const {
        return magic == expected_magic && layout == of_layout && phase == expected;
    }
};

/// The head of a layer's state: bytes that are something else are refused rather than trained on.
struct StateHeader {
    std::int64_t magic = 0, version = 0, layer = 0, experts = 0, micro_steps = 0, bytes = 0;
    std::int64_t layout = 0;  // fingerprint_of the state: policies of equal size are told apart

    static constexpr std::int64_t expected_magic = 0x53544c5953544154, current_version = 1;
    friend bool operator==(const StateHeader&, const StateHeader&) = default;
};

/// What a layer is made of: sizes and policy values.
template <class RouterT, class ExpertT, class BalanceT, class OverflowT, class DeviceT>
struct LayerConfig {
    LayerShape shape;
    RouterT router = {};
    ExpertT expert = {};
    BalanceT balance = {};
    OverflowT overflow = {};
    DeviceT device = {};
    std::uint32_t layer = 0;  ///< index in the model: keys the random numbers
};

/// The types of one layer: its policies, its bundles, the arguments of its calls.
template <class Element, class RouterT, class ExpertT, class BalanceT, class CommT, class OverflowT, class RetentionT,
          class DeviceT>
struct LayerTypes {
    using T = Element;
    using Space = typename DeviceT::space;
    using Device = DeviceT;
    using Router = RouterT;
    using Balance = BalanceT;
    using Comm = CommT;
    using Overflow = OverflowT;
    using Parts = ExpertParts<ExpertT>;
    using Routed = typename Parts::Routed;
    using Shared = typename Parts::Shared;
    using Config = LayerConfig<RouterT, ExpertT, BalanceT, OverflowT, DeviceT>;
    static constexpr bool keeps = RetentionT::keeps;

    /// Sizes that the descriptions below depend on.
    struct Dims {
        LayerShape shape;
        RouterT router;
        ExpertT expert;
        BalanceT balance;
        index_t top_k = 0;
        index_t scratch = 0;

        [[nodiscard]] LayerShape shared_shape() const {
            LayerShape one = shape;
            one.experts = 1;
            return one;
        }
        [[nodiscard]] index_t rows() const { return shape.tokens * top_k; }
        /// Of the sums that this layer takes part in: the policy's words behind a head, or none at all.
        [[nodiscard]] index_t wire_words() const {
            return BalanceT::communicates ? SumHead::words + balance.wire_words(shape) : 0;
        }
        [[nodiscard]] index_t step_words() const {
            return BalanceT::communicates_at_step_end ? SumHead::words + balance.step_words(shape) : 0;
        }
    };

    /// The caller's tensors; with non-const elements also their gradients, which accumulate.
    template <class U>
    struct Params {
        typename RouterT::template Params<U, Space> router;
        typename Routed::template Params<U, Space> experts;
        typename Shared::template Params<U, Space> shared;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            field.group("router", router, dims.router, dims.shape);
            field.group("experts", experts, Parts::routed(dims.expert), dims.shape);
            if constexpr (Parts::has_shared)
                field.group("shared", shared, Parts::shared(dims.expert), dims.shared_shape());
        }
    };

    /// What lasts between steps. Nothing at all for a policy that remembers nothing.
    struct State {
        view<StateHeader, 1, Space> header;  // [1]
        typename BalanceT::template State<Space> balance;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            if constexpr (BalanceT::remembers) {
                field("header", header, index_t{1});
                field.group("balance", balance, dims.balance, dims.shape);
            }
        }
    };

    /// Inner activations of the experts: in the context when kept, in the workspace when recomputed.
    struct Inner {
        typename Routed::template Kept<T, Space> experts;
        typename Shared::template Kept<T, Space> shared;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            field.group("experts", experts, Parts::routed(dims.expert), dims.shape, dims.rows());
            if constexpr (Parts::has_shared)
                field.group("shared", shared, Parts::shared(dims.expert), dims.shared_shape(), dims.shape.tokens);
        }
    };

    /// Written by forward, read by its backward.
    struct Context {
        view<CallInfo, 1, Space> call;             // [1]
        view<std::uint8_t, 1, Space> mask;         // [T]      a copy of the caller's
        view<index_t, 1, Space> sequences;         // [S + 1]  likewise
        Routing<T, Space> routing;
        view<expert_t, 2, Space> admitted;         // [T, K]   choices after drops, where the overflow rule drops
        Plan<Space> plan, shared_plan;
        typename BalanceT::template Record<Space> balance;
        Inner inner;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            const index_t tokens = dims.shape.tokens, experts = dims.shape.experts;
            field("call", call, index_t{1});
            field("mask", mask, tokens);
            field("sequences", sequences, dims.shape.sequences + 1);
            field.group("routing", routing, tokens, experts, dims.top_k);
            if constexpr (OverflowT::drops) field("admitted", admitted, tokens, dims.top_k);
            field.group("plan", plan, tokens, experts, dims.top_k);
            if constexpr (Parts::has_shared) field.group("shared_plan", shared_plan, tokens, index_t{1}, index_t{1});
            field.group("balance", balance, dims.balance, dims.shape);
            if constexpr (keeps) field.group("inner", inner, dims);
        }
    };

    /// Dead when the call returns.
    struct Workspace {
        view<std::int64_t, 1, Space> wire;   // [words]
        view<std::int64_t, 1, Space> tokens_of_rank;  // [R]  for scopes that draw over ranks
        view<T, 2, Space> rows;              // [T K, d]  expert outputs in forward, input gradients in backward
        view<T, 2, Space> shared_rows;       // [T, d]
        view<expert_t, 2, Space> all;        // [T, 1]    the shared expert's choices
        RoutingGrad<T, Space> grad;
        typename Routed::template Work<T, Space> work;
        typename Shared::template Work<T, Space> shared_work;
        Inner inner;
        view<std::byte, 1, Space> scratch;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            const index_t tokens = dims.shape.tokens;
            field("wire", wire, std::max(dims.wire_words(), dims.step_words()));
            if constexpr (BalanceT::needs_rank_tokens) field("tokens_of_rank", tokens_of_rank, dims.shape.ranks);
            field("rows", rows, dims.rows(), dims.shape.width);
            field.group("grad", grad, tokens, dims.shape.experts, dims.top_k);
            field.group("work", work, Parts::routed(dims.expert), dims.shape, dims.rows());
            if constexpr (Parts::has_shared) {
                field("shared_rows", shared_rows, tokens, dims.shape.width);
                field("all", all, tokens, index_t{1});
                field.group("shared_work", shared_work, Parts::shared(dims.expert), dims.shared_shape(), tokens);
            }
            if constexpr (!keeps) field.group("inner", inner, dims);
            field("scratch", scratch, dims.scratch);
        }
    };

    struct ForwardArgs {
        view<const T, 2, Space> x;  // [T, d]
        Params<const T> params;
        view<T, 2, Space> y;  // [T, d]  (=)
        std::span<std::byte> context, workspace, state;
        TokenInfo<Space> tokens = {};
        Stack* stack = nullptr;                           ///< defers the sum of the statistics to the caller
        index_t row = 0;                                  ///< of the stack
        view<const std::int64_t, 1> tokens_of_rank = {};  // [R]  saves scopes that ask for it an exchange
    };

    struct BackwardArgs {
        view<const T, 2, Space> x;  // [T, d]  the same values as in forward
        Params<const T> params;
        view<const T, 2, Space> dy;  // [T, d]
        view<T, 2, Space> dx;        // [T, d]  (=)
        Params<T> grads;             //         (+=)  absent tensors are frozen
        std::span<std::byte> context, workspace;
    };
};

}  // namespace steelyard
