// The mixture-of-experts layer: the stages composed, on the caller's memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "steelyard/comm/concept.hpp"
#include "steelyard/comm/self.hpp"
#include "steelyard/cpu/memory.hpp"
#include "steelyard/layer/diagnose.hpp"
#include "steelyard/layer/gradients.hpp"
#include "steelyard/layer/stages.hpp"
#include "steelyard/layer/unsound.hpp"

namespace steelyard {

/// y_t = sum_k weight_tk * expert_{i(t,k)}(x_t) (+ shared expert), with the balance that `BalanceT` says.
///
///     x [T,d] -> route -> observe -> (begin sum) -> plan -> experts -> (end sum) -> balance loss -> combine -> y [T,d]
///
/// The layer is an immutable value: share it between threads, each with its own context and workspace. It owns no
/// memory and allocates none. Four lifetimes, all the caller's:
///
///  - **params** and their gradients: gradients accumulate (+=), activation gradients are written (=);
///  - **state** [state_bytes()]: what balance remembers between steps; belongs into checkpoints;
///  - **context** [context_bytes()]: written by forward, read by its backward;
///  - **workspace** [workspace_bytes()]: dead when a call returns.
///
/// Results are bit-identical from run to run and for any number of threads. A refused call has left y, dx, gradients
/// and state as they were.
template <class T, class RouterT, class ExpertT, class BalanceT = NoBalance, class CommT = SelfComm,
          class OverflowT = Dropless, class RetentionT = KeepActivations, class DeviceT = Cpu,
          bool sound = LayerDiagnosis<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>::diagnose()>
class MoE : LayerStages<LayerTypes<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>> {
    using Types = LayerTypes<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>;
    using Stages = LayerStages<Types>;
    using Space = typename Types::Space;
    using Context = typename Types::Context;
    using Workspace = typename Types::Workspace;
    using State = typename Types::State;
    using Stages::config_, Stages::dims_;

public:
    using value_type = T;
    using Comm = CommT;
    using Balance = BalanceT;
    using Params = typename Types::template Params<T>;
    using ConstParams = typename Types::template Params<const T>;
    using Stack = typename Types::Stack;
    using ForwardArgs = typename Types::ForwardArgs;
    using BackwardArgs = typename Types::BackwardArgs;

    using Config = typename Types::Config;

    /// Unchecked: call `check()` once, or let `forward` refuse.
    explicit MoE(const Config& config) : Stages(config) {}

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] const LayerShape& shape() const { return config_.shape; }

    /// Whether the configuration can work: one sentence for the first thing that cannot.
    [[nodiscard]] Status check() const { return this->check_all(); }
    /// Whether `state` belongs to this layer: check_state(stage, state).
    using Stages::check_state;

    [[nodiscard]] index_t param_bytes() const { return bytes_of<Params>(dims_); }
    [[nodiscard]] index_t state_bytes() const { return bytes_of<State>(dims_); }
    [[nodiscard]] index_t context_bytes() const { return bytes_of<Context>(dims_); }
    [[nodiscard]] index_t workspace_bytes() const { return bytes_of<Workspace>(dims_); }
    /// Columns of y, in widths of x: 1, but for a mixture with several outputs.
    using Stages::outputs;
    /// Words of this layer on the wire of a forward, and at the end of a step: for a `Stack`.
    [[nodiscard]] index_t wire_words() const { return dims_.wire_words(); }
    [[nodiscard]] index_t step_words() const { return dims_.step_words(); }

    /// The parameters (or their gradients) laid out in `block`, of at least `param_bytes()`.
    [[nodiscard]] Params place_params(std::byte* block) const { return place<Params>(block, dims_); }
    /// Calls visit(name, view) for each parameter tensor: "router.weight", "experts.gate", "shared.down", ...
    template <class Visit>
    void each_param(Params& params, Visit&& visit) const {
        for_each_tensor(params, visit, dims_);
    }
    [[nodiscard]] ConstParams read_only_params(const Params& params) const {
        return read_only<ConstParams>(params, dims_);
    }

    /// A state that has seen nothing: init_state(state), of at least `state_bytes()`.
    using Stages::init_state;

    /// Writes y and, under Mode::train, observes the routing and computes this call's balance loss.
    ///
    /// Where the policy communicates, a rank that refuses (logits that are not finite, say) still takes part in the sum
    /// and says so: the others return `Code::rank_refused`, and the group can go on with the next call.
    Status forward(const CommT& comm, const ForwardArgs& args) const {
        if (Status s = this->check_forward(args); !s) return this->refuse_together(comm, args, std::move(s));
        const auto context = place<Context>(args.context.data(), dims_);
        const auto workspace = place<Workspace>(args.workspace.data(), dims_);
        const auto state = this->place_state(args.state);
        const TokenInfo<Space> tokens = this->remember_call(context, args);
        const index_t count = args.x.extents[0];
        if (Status s = this->route(args, tokens, context, workspace, state); !s)
            return this->refuse_together(comm, args, std::move(s));

        const bool train = tokens.mode == Mode::train;
        const bool summing = train && config_.balance.exchanges(state.balance, tokens.step);
        const bool deferred = summing && args.stack != nullptr;
        auto seen = this->observation(context, count);
        if constexpr (BalanceT::needs_rank_tokens) {
            if (summing)
                if (Status s = this->know_rank_tokens(comm, args, workspace, seen); !s) return s;
        }
        if (train) this->count_choices_of(args, context, workspace, state, seen);
        if constexpr (BalanceT::communicates) {
            if (summing)
                if (Status s = this->start_sum(comm, args, workspace); !s) return s;
        }

        this->run_experts(args, tokens, context, workspace);

        if (train && !deferred) {
            Wire<Space> wire;
            if constexpr (BalanceT::communicates) {
                if (summing)
                    if (Status s = this->finish_sum(comm, "layer.forward", workspace, wire_words()); !s) return s;
                wire = this->behind_head(workspace.wire);
            }
            config_.balance.conclude(seen, state.balance, context.balance, wire);
        }
        this->combine_outputs(args, tokens, context, workspace);  // last, so that a failed sum leaves y as it was
        context.call[0].phase = !train     ? CallInfo::Phase::evaluated
                                : deferred ? CallInfo::Phase::counted
                                           : CallInfo::Phase::ready;
        return {};
    }

    /// After a deferred forward, when the stack's sum has ended: takes row `row` of it and computes the balance loss.
    /// Nothing is left to do, and nothing is done, for a policy that does not communicate.
    Status conclude(const Stack& stack, index_t row, std::span<std::byte> context_bytes,
                    std::span<std::byte> workspace_bytes, std::span<std::byte> state_bytes) const {
        if (Status s = check_block("layer.conclude", "context", context_bytes, this->context_bytes()); !s) return s;
        if (Status s = check_block("layer.conclude", "workspace", workspace_bytes, this->workspace_bytes()); !s)
            return s;
        if (Status s = this->check_state("layer.conclude", state_bytes); !s) return s;
        const auto context = place<Context>(context_bytes.data(), dims_);
        if (context.call[0].is(CallInfo::Phase::ready, this->context_layout_)) return {};
        if (Status s = check_call("layer.conclude", context.call[0], this->context_layout_, CallInfo::Phase::counted);
            !s)
            return s;
        if (Status s = check_summed("layer.conclude", stack, row, wire_words()); !s) return s;
        if (Status s = SumHead::check("layer.conclude", stack.row(row)); !s) return s;
        const auto state = this->place_state(state_bytes);
        Wire<Space> wire = this->behind_head(stack.row(row));
        config_.balance.conclude(this->observation(context, context.call[0].tokens), state.balance, context.balance,
                                 wire);
        context.call[0].phase = CallInfo::Phase::ready;
        return {};
    }

    /// dx (=) and grads (+=, or = with `write_grads`): of the outputs' loss through dy, and of this call's balance
    /// loss. Uses the context up: a second backward needs a forward of its own, which as a replay counts nothing twice.
    Status backward(const BackwardArgs& given) const {
        if (Status s = this->check_backward(given); !s) return s;
        BackwardArgs args = given;
        args.grads =
            detail::begin_gradients<Types::Parts::has_shared>(config_.device, dims_, given.grads, given.write_grads);
        const auto context = place<Context>(args.context.data(), dims_);
        const auto workspace = place<Workspace>(args.workspace.data(), dims_);
        const index_t count = context.call[0].tokens;
        const auto seen = this->observation(context, count);
        this->backward_experts(args, seen.tokens, context, workspace);
        const RoutingGrad<gate_t<T>, Space> grad = dims_.routed.grad(workspace.routed, count);
        if constexpr (Types::Routed::has_routing) {
            if (args.dlogits.present()) memory_ops<DeviceT>::copy(config_.device, args.dlogits, grad.logits);
        }
        config_.balance.gradient(config_.device, seen, context.balance, grad, workspace.scratch.data);
        this->backward_routers(args, seen.tokens, context, workspace);
        context.call[0].phase = CallInfo::Phase::spent;
        return {};
    }

    /// Ends an optimizer step: moves windows and selection biases. Call it once a step, on every rank, after the last
    /// backward; calling it again for the same step changes nothing. `workspace` as for forward.
    Status end_step(const CommT& comm, std::int64_t step, std::span<std::byte> state,
                    std::span<std::byte> workspace) const {
        if constexpr (BalanceT::remembers) {
            if (Status s = this->check_state("layer.end_step", state); !s) return s;
            if (Status s = check_block("layer.end_step", "workspace", workspace, workspace_bytes()); !s) return s;
            const auto placed = this->place_state(state);
            const auto space = place<Workspace>(workspace.data(), dims_);
            Wire<Space> out, in;
            if constexpr (BalanceT::communicates_at_step_end) {
                out = in = this->behind_head(space.wire);
                this->clear(space.wire);
                SumHead::write(space.wire, this->key({.step = step}, true), false);
            }
            config_.balance.collect_step(placed.balance, step, out);
            if constexpr (BalanceT::communicates_at_step_end) {
                if (Status s = comm.begin_sum(this->words(space.wire, step_words())); !s) return s;
                if (Status s = this->finish_sum(comm, "layer.end_step", space, step_words()); !s) return s;
            }
            config_.balance.end_step(placed.balance, step, in);
        }
        return {};
    }

    /// The two halves of `end_step` around a stacked sum: post every layer, sum the stack, then end every layer.
    Status post_step(Stack& stack, index_t row, std::int64_t step, std::span<std::byte> state) const {
        if constexpr (BalanceT::remembers) {
            if (Status s = this->check_state("layer.post_step", state); !s) return s;
            if (Status s = check_stack("layer.post_step", stack, row, step_words()); !s) return s;
            Wire<Space> wire;
            if constexpr (BalanceT::communicates_at_step_end) {
                SumHead::write(stack.row(row), this->key({.step = step}, true), false);
                wire = this->behind_head(stack.row(row));
                stack.post();
            }
            config_.balance.collect_step(this->place_state(state).balance, step, wire);
        }
        return {};
    }
    Status end_step(const Stack& stack, index_t row, std::int64_t step, std::span<std::byte> state) const {
        if constexpr (BalanceT::remembers) {
            if (Status s = this->check_state("layer.end_step", state); !s) return s;
            Wire<Space> wire;
            if constexpr (BalanceT::communicates_at_step_end) {
                if (Status s = check_summed("layer.end_step", stack, row, step_words()); !s) return s;
                if (Status s = SumHead::check("layer.end_step", stack.row(row)); !s) return s;
                wire = this->behind_head(stack.row(row));
            }
            config_.balance.end_step(this->place_state(state).balance, step, wire);
        }
        return {};
    }

    // What a context says after forward.

    /// This call's share of the total balance loss: summed over ranks and micro-steps, the loss of the global batch.
    /// 0 after an evaluation.
    [[nodiscard]] double balance_loss(std::span<std::byte> context) const {
        const auto placed = place<Context>(context.data(), dims_);
        const CallInfo& call = placed.call[0];
        const bool concluded = call.phase == CallInfo::Phase::ready || call.phase == CallInfo::Phase::spent;
        return concluded ? config_.balance.loss(placed.balance, call.step) : 0.0;
    }
    /// The routing of the call's tokens: experts, weights, probabilities.
    [[nodiscard]] Routing<gate_t<T>, Space> routing(std::span<std::byte> context) const {
        const auto placed = place<Context>(context.data(), dims_);
        return dims_.routed.routing(placed.routed, placed.call[0].tokens);
    }
    /// The grouping by expert that was computed with.
    [[nodiscard]] Plan<Space> plan(std::span<std::byte> context) const {
        const auto placed = place<Context>(context.data(), dims_);
        return dims_.routed.plan(placed.routed, placed.call[0].tokens);
    }
    /// What balance saw of the call (see the policy's Record).
    [[nodiscard]] auto balance_record(std::span<std::byte> context) const {
        return place<Context>(context.data(), dims_).balance;
    }
    /// What balance remembers (see the policy's State).
    [[nodiscard]] auto balance_state(std::span<std::byte> state) const { return this->place_state(state).balance; }
};

/// The layer of policies whose diagnosis found something: empty.
template <class T, class RouterT, class ExpertT, class BalanceT, class CommT, class OverflowT, class RetentionT,
          class DeviceT>
class MoE<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT, false>
    : public detail::UnsoundLayer<T, CommT, BalanceT, LayerConfig<RouterT, ExpertT, BalanceT, OverflowT, DeviceT>> {
public:
    using detail::UnsoundLayer<T, CommT, BalanceT,
                               LayerConfig<RouterT, ExpertT, BalanceT, OverflowT, DeviceT>>::UnsoundLayer;
};

}  // namespace steelyard
