// The stages of a layer, each from one bundle to the next.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "steelyard/layer/boundary.hpp"
#include "steelyard/ops/memory_ops.hpp"

namespace steelyard {

/// What `MoE` is composed of. `Types` is a LayerTypes.
template <class Types>
class LayerStages : protected LayerBoundary<Types> {
protected:
    using Boundary = LayerBoundary<Types>;
    using Gate = typename Types::Gate;
    using Space = typename Types::Space;
    using Boundary::config_, Boundary::dims_, Boundary::context_layout_, Boundary::check_all, Boundary::check_state,
        Boundary::state_header;
    using typename Boundary::T, typename Boundary::Parts, typename Boundary::Balance, typename Boundary::Config,
        typename Boundary::Context, typename Boundary::Workspace, typename Boundary::State,
        typename Boundary::ForwardArgs, typename Boundary::BackwardArgs;

    explicit LayerStages(const Config& config) : Boundary(config) {}

    [[nodiscard]] State place_state(std::span<std::byte> state) const { return place<State>(state.data(), dims_); }
    [[nodiscard]] auto selection_bias(const State& state, const StepInfo& at) const {
        if constexpr (Balance::has_bias)
            return config_.balance.selection_bias(state.balance, at);
        else
            return view<const float, 1, Space>{};
    }
    static std::span<std::int64_t> words(view<std::int64_t, 1, Space> wire, index_t count) {
        return {wire.data, static_cast<std::size_t>(count)};
    }
    template <class V>
    static void clear(const V& tensor) {
        std::fill_n(tensor.data, tensor.size(), typename V::value_type{});
    }

    /// A state that has seen nothing.
    Status init_state(std::span<std::byte> state) const {
        if (Status s = check_block("layer.init_state", "state", state, bytes_of<State>(dims_)); !s) return s;
        if constexpr (Balance::remembers) {
            const auto placed = place_state(state);
            placed.header[0] = state_header();
            std::fill_n(placed.enqueued.step.data, placed.enqueued.step.size(), std::int64_t{-1});
            config_.balance.init(placed.balance);
        }
        return {};
    }

    /// Copies what backward must know of the call; the caller's mask and offsets need not outlive forward.
    TokenInfo<Space> remember_call(const Context& context, const ForwardArgs& args) const {
        const index_t count = args.x.extents[0];
        CallInfo& call = context.call[0];
        call = {.magic = CallInfo::expected_magic,
                .layout = context_layout_,
                .mode = args.tokens.mode,
                .tokens = count,
                .valid_tokens = count,
                .step = args.tokens.step};
        if (args.tokens.mask.present()) {
            call.masked = 1;
            call.valid_tokens = 0;
            for (index_t t = 0; t < count; ++t) {
                context.mask[t] = args.tokens.mask[t];
                call.valid_tokens += args.tokens.mask[t] != 0;
            }
        }
        if (args.tokens.sequences.present()) {
            call.sequences = args.tokens.sequences.extents[0] - 1;
            for (index_t s = 0; s <= call.sequences; ++s) context.sequences[s] = args.tokens.sequences[s];
        }
        if constexpr (Types::uses_ids) {
            call.labelled = 1;
            for (index_t t = 0; t < count; ++t) context.ids[t] = args.tokens.ids[t];
        }
        return observation(context, count).tokens;
    }

    [[nodiscard]] Observation<Gate, Space> observation(const Context& context, index_t count) const {
        const CallInfo& call = context.call[0];
        Observation<Gate, Space> seen;
        seen.routing = dims_.routed.routing(context.routed, count);
        if (call.masked) seen.tokens.mask = context.mask.slice(0, count);
        if (call.sequences > 0) seen.tokens.sequences = context.sequences.slice(0, call.sequences + 1);
        if (call.labelled) seen.tokens.ids = context.ids.slice(0, count);
        seen.tokens.step = call.step;
        seen.tokens.mode = call.mode;
        seen.valid_tokens = call.valid_tokens;
        seen.layer = config_.layer;
        return seen;
    }

    /// The policy's words behind the head.
    static Wire<Space> behind_head(view<std::int64_t, 1, Space> wire) {
        return Wire<Space>(wire.slice(SumHead::words, wire.extents[0]));
    }
    [[nodiscard]] std::int64_t key(const StepInfo& at, bool at_step_end) const {
        return SumHead::key(at, config_.layer, at_step_end);
    }

    /// Counts into the record and, for a policy that communicates, onto the wire: the stack's row, or the workspace's.
    void count_choices_of(const ForwardArgs& args, const Context& context, const Workspace& workspace,
                          const State& state, const Observation<Gate, Space>& seen) const {
        Wire<Space> words;
        if constexpr (Balance::communicates) {
            const auto wire = args.stack != nullptr ? args.stack->row(args.row) : workspace.wire;
            clear(wire);
            SumHead::write(wire, key(seen.tokens.step, false), false);
            words = behind_head(wire);
        }
        config_.balance.observe(config_.device, seen, state.balance, context.balance, workspace.scratch.data);
        config_.balance.post(seen, state.balance, context.balance, words);
    }

    /// Starts the sum of what was counted: at once, or by posting it to the stack.
    Status start_sum(const typename Types::Comm& comm, const ForwardArgs& args, const Workspace& workspace) const {
        if (args.stack == nullptr) return comm.begin_sum(words(workspace.wire, dims_.wire_words()));
        args.stack->post();
        return {};
    }

    /// Waits for the sum and reads its head.
    Status finish_sum(const typename Types::Comm& comm, std::string_view stage, const Workspace& workspace,
                      index_t count) const {
        if (Status s = comm.end_sum(words(workspace.wire, count)); !s) return s;
        return SumHead::check(stage, workspace.wire);
    }

    /// A refusal of a forward that the other ranks wait in: takes part in their sum with a word that says so, where
    /// the arguments allow it, so that every rank refuses at once. Answers with the refusal itself.
    Status refuse_together([[maybe_unused]] const typename Types::Comm& comm, [[maybe_unused]] const ForwardArgs& args,
                           Status refusal) const {
        if constexpr (Balance::communicates) {
            const StepInfo& at = args.tokens.step;
            const bool able = check_all().ok() && args.tokens.mode == Mode::train && at.step >= 0 &&
                              at.micro_step >= 0 && at.micro_step < config_.shape.micro_steps &&
                              check_block("", "", args.workspace, bytes_of<Workspace>(dims_)).ok() &&
                              check_state("", args.state).ok();
            if (!able || !config_.balance.exchanges(place_state(args.state).balance, at)) return refusal;
            if (args.stack != nullptr && !check_stack("", *args.stack, args.row, dims_.wire_words())) return refusal;
            const auto workspace = place<Workspace>(args.workspace.data(), dims_);
            if constexpr (Balance::needs_rank_tokens) {
                Observation<Gate, Space> nothing;
                if (!args.tokens_of_rank.present() && !know_rank_tokens(comm, args, workspace, nothing)) return refusal;
            }
            const auto wire = args.stack != nullptr ? args.stack->row(args.row) : workspace.wire;
            clear(wire);
            SumHead::write(wire, key(at, false), true);
            if (start_sum(comm, args, workspace) && args.stack == nullptr)
                (void)finish_sum(comm, "layer.forward", workspace, dims_.wire_words());
        }
        return refusal;
    }

    /// Valid tokens of each rank: the caller's word, or a small sum of one-hot vectors.
    Status know_rank_tokens(const typename Types::Comm& comm, const ForwardArgs& args, const Workspace& workspace,
                            Observation<Gate, Space>& seen) const {
        const index_t ranks = comm.size();
        seen.rank = comm.rank();
        seen.tokens_of_rank = args.tokens_of_rank;
        if (Status s =
                check_ranks("layer.forward", config_.shape, ranks, seen.rank, seen.valid_tokens, args.tokens_of_rank);
            !s)
            return s;
        if (args.tokens_of_rank.present()) return {};
        const auto counts = workspace.tokens_of_rank.slice(0, ranks);
        clear(counts);
        counts[comm.rank()] = seen.valid_tokens;
        seen.tokens_of_rank = counts;
        if (Status s = comm.begin_sum(words(counts, ranks)); !s) return s;
        return comm.end_sum(words(counts, ranks));
    }

    /// The call as the routed experts' mixture sees it. `Args` are those of forward or of backward.
    template <class Args>
    [[nodiscard]] typename Types::RoutedTypes::Call routed_call(const Args& args, const TokenInfo<Space>& tokens,
                                                                const Workspace& workspace,
                                                                view<const float, 1, Space> bias = {}) const {
        return {{.x = args.x, .tokens = tokens, .selection_bias = bias, .prior = args.prior, .layer = config_.layer},
                args.params.router,
                args.params.experts,
                workspace.scratch.data};
    }
    /// The same for the shared expert's.
    template <class Args>
    [[nodiscard]] typename Types::SharedTypes::Call shared_call(const Args& args, const TokenInfo<Space>& tokens,
                                                                const Workspace& workspace) const {
        return {{.x = args.x, .tokens = tokens, .layer = config_.layer},
                args.params.shared_router,
                args.params.shared,
                workspace.scratch.data};
    }

    /// Decides for both branches; may refuse.
    Status route(const ForwardArgs& args, const TokenInfo<Space>& tokens, const Context& context,
                 const Workspace& workspace, const State& state) const {
        const auto call = routed_call(args, tokens, workspace, selection_bias(state, tokens.step));
        if (Status s = dims_.routed.route(call, context.routed); !s) return s;
        if constexpr (Parts::has_shared)
            return dims_.shared.route(shared_call(args, tokens, workspace), context.shared);
        return {};
    }

    template <class Args>
    void run_experts(const Args& args, const TokenInfo<Space>& tokens, const Context& context,
                     const Workspace& workspace) const {
        dims_.routed.run(routed_call(args, tokens, workspace), context.routed, workspace.routed);
        if constexpr (Parts::has_shared)
            dims_.shared.run(shared_call(args, tokens, workspace), context.shared, workspace.shared);
    }

    template <class Args>
    void combine_outputs(const Args& args, const TokenInfo<Space>& tokens, const Context& context,
                         const Workspace& workspace) const {
        dims_.routed.combine(routed_call(args, tokens, workspace), context.routed, workspace.routed, args.y,
                             Write::assign);
        if constexpr (Parts::has_shared)
            dims_.shared.combine(shared_call(args, tokens, workspace), context.shared, workspace.shared, args.y,
                                 Write::add);
    }

    /// dx (=) through the experts, their gradients (+=), and what their routers' decisions are to blame for.
    template <class Args>
    void backward_experts(const Args& args, const TokenInfo<Space>& tokens, const Context& context,
                          const Workspace& workspace) const {
        const index_t count = args.x.extents[0];
        dims_.routed.clear(workspace.routed, count);
        dims_.routed.backward(routed_call(args, tokens, workspace), context.routed, workspace.routed, args.dy, args.dx,
                              Write::assign, args.grads.experts);
        if constexpr (Parts::has_shared) {
            dims_.shared.clear(workspace.shared, count);
            dims_.shared.backward(shared_call(args, tokens, workspace), context.shared, workspace.shared, args.dy,
                                  args.dx, Write::add, args.grads.shared);
        }
    }

    /// dx (+=), dprior (=) and the routers' gradients (+=).
    template <class Args>
    void backward_routers(const Args& args, const TokenInfo<Space>& tokens, const Context& context,
                          const Workspace& workspace) const {
        if (args.dprior.present()) memory_ops<typename Types::Device>::fill(config_.device, args.dprior, Gate(0));
        dims_.routed.backward_router(routed_call(args, tokens, workspace), context.routed, workspace.routed,
                                     RouterInputGrad<T, Space>{args.dx, args.dprior}, args.grads.router);
        if constexpr (Parts::has_shared)
            dims_.shared.backward_router(shared_call(args, tokens, workspace), context.shared, workspace.shared,
                                         RouterInputGrad<T, Space>{args.dx}, args.grads.shared_router);
    }
};

}  // namespace steelyard
