// The four lifetimes of a layer's memory: params, state, context, workspace. Sizes and views from one description.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "steelyard/balance/policy.hpp"
#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/expert/shared.hpp"
#include "steelyard/layer/block.hpp"
#include "steelyard/layer/sum_head.hpp"
#include "steelyard/mixture/sparse.hpp"

namespace steelyard {

/// Splits an Expert policy into the routed experts and the shared one beside them, where there is one.
template <class ExpertT>
struct ExpertParts {
    static constexpr bool has_shared = false;
    using Routed = ExpertT;
    using Shared = ExpertT;
    using Gate = Every;
    static constexpr const Routed& routed(const ExpertT& expert) { return expert; }
};

template <class RoutedT, class SharedT, class GateT>
struct ExpertParts<WithShared<RoutedT, SharedT, GateT>> {
    static constexpr bool has_shared = true;
    using Routed = RoutedT;
    using Shared = SharedT;
    using Gate = GateT;
    static constexpr const Routed& routed(const WithShared<RoutedT, SharedT, GateT>& expert) { return expert.routed; }
};

/// What one call was about; backward reads it instead of being told again.
struct CallInfo {
    enum class Phase : std::int32_t { none, counted, ready, evaluated, spent };
    std::int64_t magic = 0, layout = 0;  // layout: of the context that this belongs to
    Phase phase = Phase::none;
    Mode mode = Mode::train;
    index_t tokens = 0, sequences = 0;  // sequences: 0 where no offsets were given
    std::int64_t valid_tokens = 0;
    std::int32_t masked = 0, labelled = 0;  // whether there was a mask, and ids
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

/// Which sums of statistics a device that works in its own time has been given: the step, for each micro-step; -1:
/// none. The host asks this, since what the policy remembers is the device's work, and may be yet to come. Other
/// devices leave it as it is.
struct EnqueuedSums {
    view<std::int64_t, 1> step;  // [A]

    [[nodiscard]] bool holds(const StepInfo& at) const { return slot(at).load(std::memory_order_acquire) == at.step; }
    void enter(const StepInfo& at) const { slot(at).store(at.step, std::memory_order_release); }
    /// The sum was refused, and may be tried again.
    void withdraw(const StepInfo& at) const {
        std::int64_t given = at.step;
        slot(at).compare_exchange_strong(given, -1);
    }

private:
    [[nodiscard]] std::atomic_ref<std::int64_t> slot(const StepInfo& at) const {
        return std::atomic_ref<std::int64_t>(step[at.micro_step]);
    }
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
    using Gate = gate_t<Element>;
    using Space = typename DeviceT::space;
    using Device = DeviceT;
    using Router = RouterT;
    using Balance = BalanceT;
    using Comm = CommT;
    using Overflow = OverflowT;
    using Block = typename LayerMemory<DeviceT>::Block;
    using Stack = typename LayerMemory<DeviceT>::Stack;
    using Parts = ExpertParts<ExpertT>;
    using Config = LayerConfig<RouterT, ExpertT, BalanceT, OverflowT, DeviceT>;
    using RoutedTypes = MixtureTypes<T, RouterT, OverflowT, typename Parts::Routed, DeviceT, RetentionT::keeps>;
    using SharedTypes =
        MixtureTypes<T, typename Parts::Gate, Dropless, typename Parts::Shared, DeviceT, RetentionT::keeps>;
    using Routed = MixtureOf<RoutedTypes>;
    using Shared = std::conditional_t<Parts::has_shared, MixtureOf<SharedTypes>, NoMixture>;
    static constexpr bool uses_ids = RouterTraits<RouterT>::uses_ids || RouterTraits<typename Parts::Gate>::uses_ids ||
                                     BalanceTraits<BalanceT>::uses_ids;

    static Routed routed_of(const Config& config) {
        return Routed({config.shape, config.router, config.overflow, Parts::routed(config.expert), config.device});
    }
    static Shared shared_of([[maybe_unused]] const Config& config) {
        if constexpr (Parts::has_shared) {
            LayerShape one = config.shape;
            one.experts = 1;
            return Shared({one, config.expert.gate, {}, config.expert.shared, config.device});
        } else {
            return {};
        }
    }

    /// Policies and sizes that the descriptions below depend on.
    struct Dims {
        LayerShape shape;
        Routed routed;
        Shared shared;
        BalanceT balance;
        index_t scratch = 0;

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
        typename RoutedTypes::template RouterParams<U> router;
        typename RoutedTypes::template ExpertParams<U> experts;
        typename SharedTypes::template ExpertParams<U> shared;
        typename SharedTypes::template RouterParams<U> shared_router;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            const auto& routed = dims.routed.config();
            field.group("router", router, routed.router, routed.shape);
            field.group("experts", experts, routed.expert, routed.shape);
            if constexpr (Parts::has_shared) {
                const auto& beside = dims.shared.config();
                field.group("shared", shared, beside.expert, beside.shape);
                field.group("shared_router", shared_router, beside.router, beside.shape);
            }
        }
    };

    /// What lasts between steps, in the host's memory. Nothing at all for a policy that remembers nothing.
    struct State {
        view<StateHeader, 1> header;  // [1]
        EnqueuedSums enqueued;        // [A]  of a policy that communicates
        typename BalanceT::template State<> balance;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            if constexpr (BalanceT::remembers) {
                field("header", header, index_t{1});
                if constexpr (BalanceT::communicates) field("enqueued", enqueued.step, dims.shape.micro_steps);
                field.group("balance", balance, dims.balance, dims.shape);
            }
        }
    };

    /// Written by forward, read by its backward.
    struct Context {
        view<CallInfo, 1, Space> call;      // [1]
        view<std::uint8_t, 1, Space> mask;  // [T]      a copy of the caller's
        view<index_t, 1, Space> sequences;  // [S + 1]  likewise
        view<std::int32_t, 1, Space> ids;   // [T]      likewise, where a router asks for them
        typename Routed::Context routed;
        typename Shared::Context shared;
        typename BalanceT::template Record<Space> balance;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            field("call", call, index_t{1});
            field("mask", mask, dims.shape.tokens);
            field("sequences", sequences, dims.shape.sequences + 1);
            if constexpr (uses_ids) field("ids", ids, dims.shape.tokens);
            field.group("routed", routed, dims.routed);
            field.group("shared", shared, dims.shared);
            field.group("balance", balance, dims.balance, dims.shape);
        }
    };

    /// Dead when the call returns.
    struct Workspace {
        view<std::int64_t, 1, Space> wire;            // [words]
        view<std::int64_t, 1, Space> tokens_of_rank;  // [R]  for scopes that draw over ranks
        typename Routed::Workspace routed;
        typename Shared::Workspace shared;
        view<std::byte, 1, Space> scratch;

        template <class Field>
        void fields(Field&& field, const Dims& dims) {
            field("wire", wire, std::max(dims.wire_words(), dims.step_words()));
            if constexpr (BalanceT::needs_rank_tokens) field("tokens_of_rank", tokens_of_rank, dims.shape.ranks);
            field.group("routed", routed, dims.routed);
            field.group("shared", shared, dims.shared);
            field("scratch", scratch, dims.scratch);
        }
    };

    struct ForwardArgs {
        view<const T, 2, Space> x;  // [T, d]
        Params<const T> params;
        view<T, 2, Space> y;  // [T, d]  (=); [T, n d] for a mixture with n outputs
        Block context, workspace;
        std::span<std::byte> state;
        TokenInfo<Space> tokens = {};
        Stack* stack = nullptr;                           ///< defers the sum of the statistics to the caller
        index_t row = 0;                                  ///< of the stack
        view<const std::int64_t, 1> tokens_of_rank = {};  // [R]  saves scopes that ask for it an exchange
        view<const gate_t<T>, 2, Space> prior = {};       // [T, E]  logits of the layer before, for routers that ask
    };

    struct BackwardArgs {
        view<const T, 2, Space> x;  // [T, d]  the same values as in forward
        Params<const T> params;
        view<const T, 2, Space> dy;  // [T, d]; [T, n d] for a mixture with n outputs
        view<T, 2, Space> dx;        // [T, d]  (=)
        Params<T> grads;             //         (+=, or by write_grads)  absent tensors are frozen
        Block context, workspace;
        view<const gate_t<T>, 2, Space> prior = {};  // [T, E]  the same values as in forward
        view<gate_t<T>, 2, Space> dprior = {};       // [T, E]  (+=), or absent
        view<const gate_t<T>, 2, Space> dlogits =
            {};  // [T, E]  gradient by this layer's logits, from the layer after; or absent
        /// Write::assign: gradients replace what is there, which need not be zeroed and is not read. For the first
        /// micro-step, or the only one.
        Write write_grads = Write::add;
    };
};

}  // namespace steelyard
