// The layer on a device that has memory of its own and works in its own time, such as a GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "steelyard/layer/gradients.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/layer/queued_stages.hpp"

namespace steelyard {

/// `MoE` (layer/moe.hpp) on a QueuedDevice: the same policies and the same stages. What differs:
///
///  - Calls enqueue and return. x, y, gradients and parameters are the device's memory, state is pinned memory. Context
///    and workspace have a part in each, and live until the device has come so far.
///  - Statistics are counted, summed and concluded beside the experts. Policies do their arithmetic in between, on a
///    thread of the device's. Backward waits for that on the device.
///  - What the host reads of a context (`balance_loss`, `balance_record`, `summed`) or of a state is there after the
///    device has been waited for. The policy's state is read and written in the device's order, but at the end of a
///    step, which waits. Forward waits if the statistics of the last call with its context are still at work, for a
///    comm backend that does not sum in the device's order, and for the tokens of each rank, where a scope draws over
///    ranks and the caller gives no `tokens_of_rank`. Nothing else waits, so that calls of policies that remember
///    nothing can be captured in a graph, with the step that they were captured with.
///  - Tokens that are refused later, such as logits that are not finite, the device reports (see its `faults`). A sum
///    that another rank refused is told by `summed`, and its loss is a NaN.
///  - With a mask, a training call gives StepInfo::total_tokens, and `tokens_of_rank` where a scope draws over ranks:
///    the host does not count.
///  - The sums of several layers are one with a QueuedStack (layer/queued_stack.hpp).
template <class T, class RouterT, class ExpertT, class BalanceT, class CommT, class OverflowT, class RetentionT,
          QueuedDevice DeviceT>
class MoE<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT, true>
    : QueuedStages<LayerTypes<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>> {
    using Types = LayerTypes<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>;
    using Stages = QueuedStages<Types>;
    using Space = typename Types::Space;
    using Gate = typename Types::Gate;
    using Memory = memory_ops<DeviceT>;
    using Context = typename Types::Context;
    using State = typename Types::State;
    using Queued = QueuedTypes<Types>;
    using Record = typename Queued::Record;
    using Conclusion = typename Queued::Conclusion;
    using HostContext = typename Queued::HostContext;
    using HostWorkspace = typename Queued::HostWorkspace;
    using DeviceWorkspace = typename Queued::DeviceWorkspace;
    using Stages::config_, Stages::dims_, Stages::context_layout_;
    static constexpr bool enqueues_sums = StreamOrderedComm<CommT>;

public:
    using value_type = T;
    using Comm = CommT;
    using Balance = BalanceT;
    using Config = typename Types::Config;
    using Params = typename Types::template Params<T>;
    using ConstParams = typename Types::template Params<const T>;
    using Stack = typename Types::Stack;
    using ForwardArgs = typename Types::ForwardArgs;
    using BackwardArgs = typename Types::BackwardArgs;

    explicit MoE(const Config& config) : Stages(config) {}

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] const LayerShape& shape() const { return config_.shape; }
    [[nodiscard]] Status check() const { return this->check_all(); }
    using Stages::outputs;

    [[nodiscard]] index_t param_bytes() const { return bytes_of<Params>(dims_); }
    [[nodiscard]] index_t state_bytes() const { return bytes_of<State>(dims_); }
    using Stages::context_bytes, Stages::workspace_bytes;
    /// Words that a comm backend sums at once.
    [[nodiscard]] index_t wire_words() const { return dims_.wire_words(); }
    [[nodiscard]] index_t step_words() const { return dims_.step_words(); }

    /// The parameters (or their gradients) laid out in `block`, memory of the device of at least `param_bytes()`.
    [[nodiscard]] Params place_params(std::byte* block) const { return place<Params>(block, dims_); }
    template <class Visit>
    void each_param(Params& params, Visit&& visit) const {
        for_each_tensor(params, visit, dims_);
    }
    [[nodiscard]] ConstParams read_only_params(const Params& params) const {
        return read_only<ConstParams>(params, dims_);
    }

    using Stages::check_state;
    /// A state that has seen nothing: init_state(state), in pinned memory.
    using Stages::init_state;

    /// Enqueues y and, under Mode::train, the statistics and this call's balance loss.
    Status forward(const CommT& comm, const ForwardArgs& args) const {
        if (Status s = this->check_forward(args); !s) return this->refuse_together(comm, args, std::move(s));
        const auto host = place<HostContext>(args.context.host.data(), dims_);
        const auto context = place<Context>(args.context.device.data(), dims_);
        const auto workspace = place<DeviceWorkspace>(args.workspace.device.data(), dims_, config_.device);
        const auto state = this->place_state(args.state);
        this->settle(host);
        const TokenInfo<Space> tokens = this->remember_call(host.call[0], context, args);
        view<const float, 1, Space> bias;
        if constexpr (BalanceT::has_bias) {
            if (const auto of = config_.balance.selection_bias(state.balance, tokens.step); of.present()) {
                Memory::upload(config_.device, of, workspace.bias);
                bias = workspace.bias;
            }
        }
        if (Status s = dims_.routed.route(this->routed_call(args, tokens, workspace.main, bias), context.routed); !s)
            return this->refuse_together(comm, args, std::move(s));
        if constexpr (Types::Parts::has_shared)
            if (Status s = dims_.shared.route(this->shared_call(args, tokens, workspace.main), context.shared); !s)
                return this->refuse_together(comm, args, std::move(s));
        const bool train = tokens.mode == Mode::train;
        const bool summing = train && this->exchanges(state, tokens.step);
        const bool deferred = summing && args.stack != nullptr;
        const bool waiting = summing && !deferred && !enqueues_sums;  // with the device's experts to run meanwhile
        if (train) {
            auto seen = this->observation(host.call[0], context);
            if constexpr (BalanceT::needs_rank_tokens)
                if (summing)
                    if (Status s = this->know_rank_tokens(comm, args, seen); !s) return s;
            this->observe(args, host, seen, workspace, state, summing);
            if (deferred) args.stack->post();
            if (!deferred && !waiting)
                if (Status s = this->sum_and_conclude(comm, host); !s) return s;
        }
        this->run_experts(args, tokens, context, workspace.main);
        if (waiting)
            if (Status s = this->sum_and_conclude(comm, host); !s) return s;
        this->combine_outputs(args, tokens, context, workspace.main);
        if (train) Memory::join(config_.device);
        host.call[0].phase = !train     ? CallInfo::Phase::evaluated
                             : deferred ? CallInfo::Phase::counted
                                        : CallInfo::Phase::ready;
        return {};
    }

    /// After a deferred forward, when the stack's sum has ended: enqueues this layer's balance loss, of row `row`.
    /// Nothing is left to do, and nothing is done, for a policy that does not communicate.
    Status conclude(const Stack& stack, index_t row, const QueuedBlock& context, const QueuedBlock& workspace,
                    std::span<std::byte> state) const {
        constexpr std::string_view stage = "layer.conclude";
        if (Status s = this->check_blocks(stage, context, workspace); !s) return s;
        if (Status s = check_state(stage, state); !s) return s;
        const auto host = place<HostContext>(context.host.data(), dims_);
        CallInfo& call = host.call[0];
        if (call.is(CallInfo::Phase::ready, context_layout_)) return {};
        if (Status s = check_call(stage, call, context_layout_, CallInfo::Phase::counted); !s) return s;
        if (Status s = check_summed(stage, stack.rows(), row, wire_words()); !s) return s;
        if constexpr (!enqueues_sums)  // else the sum is still to come, and `summed` tells
            if (Status s = SumHead::check(stage, stack.row(row)); !s) return s;
        host.conclusion[0].sum = stack.row(row);
        this->enqueue_conclusion(host.conclusion[0]);
        Memory::join(config_.device);
        call.phase = CallInfo::Phase::ready;
        return {};
    }

    /// Enqueues dx (=) and grads (+=, or = with `write_grads`): of the outputs' loss through dy, and of this call's
    /// balance loss. Uses the context up.
    Status backward(const BackwardArgs& given) const {
        if (Status s = this->check_backward(given); !s) return s;
        BackwardArgs args = given;
        args.grads =
            detail::begin_gradients<Types::Parts::has_shared>(config_.device, dims_, given.grads, given.write_grads);
        const auto host = place<HostContext>(args.context.host.data(), dims_);
        const auto context = place<Context>(args.context.device.data(), dims_);
        const auto workspace = place<DeviceWorkspace>(args.workspace.device.data(), dims_, config_.device).main;
        const index_t count = host.call[0].tokens;
        const auto seen = this->observation(host.call[0], context);
        this->backward_experts(args, seen.tokens, context, workspace);
        const RoutingGrad<Gate, Space> grad = dims_.routed.grad(workspace.routed, count);
        if constexpr (Types::Routed::has_routing)
            if (args.dlogits.present()) Memory::copy(config_.device, args.dlogits, grad.logits);
        config_.balance.gradient(config_.device, seen, host.balance, grad, workspace.scratch.data);
        this->backward_routers(args, seen.tokens, context, workspace);
        host.call[0].phase = CallInfo::Phase::spent;
        return {};
    }

    /// Ends an optimizer step: waits for the step's statistics, then moves windows and selection biases. Once a step,
    /// on every rank, after the last backward; again for the same step changes nothing.
    Status end_step(const CommT& comm, std::int64_t step, std::span<std::byte> state,
                    const QueuedBlock& workspace) const {
        if constexpr (BalanceT::remembers) {
            if (Status s = check_state("layer.end_step", state); !s) return s;
            if (Status s = check_block("layer.end_step", "workspace", workspace.host, workspace_bytes().host); !s)
                return s;
            this->rest();
            const auto placed = this->place_state(state);
            Wire<> out, in;
            if constexpr (BalanceT::communicates_at_step_end) {
                const auto wire = place<HostWorkspace>(workspace.host.data(), dims_).wire;
                std::fill_n(wire.data, wire.size(), std::int64_t{0});
                SumHead::write(wire, this->key({.step = step}, true), false);
                out = in = Conclusion::behind_head(wire);
                config_.balance.collect_step(placed.balance, step, out);
                const std::span<std::int64_t> words{wire.data, static_cast<std::size_t>(step_words())};
                if (Status s = comm.begin_sum(words); !s) return s;
                if (Status s = comm.end_sum(words); !s) return s;
                Memory::wait(Memory::beside(config_.device));
                if (Status s = SumHead::check("layer.end_step", wire); !s) return s;
            } else {
                config_.balance.collect_step(placed.balance, step, out);
            }
            config_.balance.end_step(placed.balance, step, in);
        }
        return {};
    }

    /// The two halves of `end_step` around a stacked sum: post every layer, sum the stack, then end every layer. Both
    /// wait as `end_step` does.
    Status post_step(Stack& stack, index_t row, std::int64_t step, std::span<std::byte> state) const {
        if constexpr (BalanceT::remembers) {
            if (Status s = check_state("layer.post_step", state); !s) return s;
            if (Status s = check_stack("layer.post_step", stack.rows(), row, step_words()); !s) return s;
            this->rest();
            Wire<> wire;
            if constexpr (BalanceT::communicates_at_step_end) {
                SumHead::write(stack.row(row), this->key({.step = step}, true), false);
                wire = Conclusion::behind_head(stack.row(row));
                stack.post();
            }
            config_.balance.collect_step(this->place_state(state).balance, step, wire);
        }
        return {};
    }
    Status end_step(const Stack& stack, index_t row, std::int64_t step, std::span<std::byte> state) const {
        if constexpr (BalanceT::remembers) {
            if (Status s = check_state("layer.end_step", state); !s) return s;
            if constexpr (BalanceT::communicates_at_step_end)
                if (Status s = check_summed("layer.end_step", stack.rows(), row, step_words()); !s) return s;
            this->rest();
            Wire<> wire;
            if constexpr (BalanceT::communicates_at_step_end) {
                if (Status s = SumHead::check("layer.end_step", stack.row(row)); !s) return s;
                wire = Conclusion::behind_head(stack.row(row));
            }
            config_.balance.end_step(this->place_state(state).balance, step, wire);
        }
        return {};
    }

    // What a context says, once the device has come so far.

    /// This call's share of the total balance loss: summed over ranks and micro-steps, the loss of the global batch.
    [[nodiscard]] double balance_loss(const QueuedBlock& context) const {
        const auto host = place<HostContext>(context.host.data(), dims_);
        const CallInfo::Phase phase = host.call[0].phase;
        if (phase != CallInfo::Phase::ready && phase != CallInfo::Phase::spent) return 0.0;
        if (host.refused[0] != 0) return std::numeric_limits<double>::quiet_NaN();
        return config_.balance.loss(host.balance, host.call[0].step);
    }
    /// `ok`, or that the sum of the counts was refused: by another rank, or because ranks were not at the same step.
    [[nodiscard]] Status summed(const QueuedBlock& context) const {
        const auto code = static_cast<Code>(place<HostContext>(context.host.data(), dims_).refused[0]);
        if (code == Code::ok) return {};
        return Status::refuse(code, "layer.forward", "comm", "the sum of all ranks' counts", "a refusal");
    }
    /// The routing of the call's tokens, in the device's memory.
    [[nodiscard]] Routing<Gate, Space> routing(const QueuedBlock& context) const {
        const auto call = place<HostContext>(context.host.data(), dims_).call;
        return dims_.routed.routing(place<Context>(context.device.data(), dims_).routed, call[0].tokens);
    }
    [[nodiscard]] Plan<Space> plan(const QueuedBlock& context) const {
        const auto call = place<HostContext>(context.host.data(), dims_).call;
        return dims_.routed.plan(place<Context>(context.device.data(), dims_).routed, call[0].tokens);
    }
    [[nodiscard]] Record balance_record(const QueuedBlock& context) const {
        return place<HostContext>(context.host.data(), dims_).balance;
    }
    [[nodiscard]] auto balance_state(std::span<std::byte> state) const { return this->place_state(state).balance; }
};

}  // namespace steelyard
