// The layer on a device that has memory of its own and works in its own time, such as a GPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "steelyard/layer/moe.hpp"
#include "steelyard/layer/queued_memory.hpp"

namespace steelyard {

/// `MoE` (layer/moe.hpp) on a QueuedDevice: the same policies and the same stages. What differs:
///
///  - Calls enqueue and return. x, y, gradients and parameters are the device's memory, state is pinned memory. Context
///    and workspace have a part in each, and live until the device has come so far.
///  - Statistics are counted, summed and concluded beside the experts. Policies do their arithmetic in between, on a
///    thread of the device's. Backward waits for that on the device.
///  - What the host reads of a context (`balance_loss`, `balance_record`, `summed`) or of a state is there after the
///    device has been waited for. A forward of a policy that remembers waits for the statistics of the forward before,
///    and so does one whose context is still at work. Nothing else waits, so that other policies' calls can be captured
///    in a graph, with the step that they were captured with.
///  - Tokens that are refused later, such as logits that are not finite, the device reports (see its `faults`). A sum
///    that another rank refused is told by `summed`, and its loss is a NaN.
///  - With a mask, a training call gives StepInfo::total_tokens: the host does not count.
///  - No Stack, and no scope that draws over ranks.
template <class T, class RouterT, class ExpertT, class BalanceT, class CommT, class OverflowT, class RetentionT,
          QueuedDevice DeviceT>
class MoE<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT, true>
    : LayerStages<LayerTypes<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>> {
    using Types = LayerTypes<T, RouterT, ExpertT, BalanceT, CommT, OverflowT, RetentionT, DeviceT>;
    using Stages = LayerStages<Types>;
    using Space = typename Types::Space;
    using Gate = typename Types::Gate;
    using Memory = memory_ops<DeviceT>;
    using Context = typename Types::Context;
    using Queued = QueuedTypes<Types>;
    using State = typename Queued::State;
    using Record = typename Queued::Record;
    using Seen = typename Queued::Seen;
    using Conclusion = typename Queued::Conclusion;
    using HostContext = typename Queued::HostContext;
    using HostWorkspace = typename Queued::HostWorkspace;
    using DeviceWorkspace = typename Queued::DeviceWorkspace;
    using Stages::config_, Stages::dims_, Stages::context_layout_, Stages::state_layout_;

public:
    using value_type = T;
    using Comm = CommT;
    using Balance = BalanceT;
    using Config = typename Types::Config;
    using Params = typename Types::template Params<T>;
    using ConstParams = typename Types::template Params<const T>;

    struct ForwardArgs {
        view<const T, 2, Space> x;  // [T, d]
        ConstParams params;
        view<T, 2, Space> y;  // [T, d]  (=); [T, n d] for a mixture with n outputs
        QueuedBlock context, workspace;
        std::span<std::byte> state;  // pinned
        TokenInfo<Space> tokens = {};
        view<const Gate, 2, Space> prior = {};  // [T, E]  logits of the layer before, for routers that ask
    };
    struct BackwardArgs {
        view<const T, 2, Space> x;  // [T, d]  the same values as in forward
        ConstParams params;
        view<const T, 2, Space> dy;  // [T, d]; [T, n d] for a mixture with n outputs
        view<T, 2, Space> dx;        // [T, d]  (=)
        Params grads;                //         (+=)  absent tensors are frozen
        QueuedBlock context, workspace;
        view<const Gate, 2, Space> prior = {};    // [T, E]  the same values as in forward
        view<Gate, 2, Space> dprior = {};         // [T, E]  (+=), or absent
        view<const Gate, 2, Space> dlogits = {};  // [T, E]  gradient by this layer's logits, or absent
    };

    explicit MoE(const Config& config) : Stages(config) {}

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] const LayerShape& shape() const { return config_.shape; }
    [[nodiscard]] Status check() const { return this->check_all(); }
    using Stages::outputs;

    [[nodiscard]] index_t param_bytes() const { return bytes_of<Params>(dims_); }
    [[nodiscard]] index_t state_bytes() const { return bytes_of<State>(dims_); }
    [[nodiscard]] QueuedBytes context_bytes() const { return {bytes_of<HostContext>(dims_), bytes_of<Context>(dims_)}; }
    [[nodiscard]] QueuedBytes workspace_bytes() const {
        return {bytes_of<HostWorkspace>(dims_), bytes_of<DeviceWorkspace>(dims_, config_.device)};
    }
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

    Status check_state(std::string_view stage, std::span<const std::byte> state) const {
        if (Status s = check_block(stage, "state", state, state_bytes()); !s) return s;
        if constexpr (BalanceT::remembers)
            return check_header(stage, *reinterpret_cast<const StateHeader*>(state.data()), header());
        return {};
    }
    /// A state that has seen nothing, in pinned memory.
    Status init_state(std::span<std::byte> state) const {
        if (Status s = check_block("layer.init_state", "state", state, state_bytes()); !s) return s;
        if constexpr (BalanceT::remembers) {
            const auto placed = place<State>(state.data(), dims_);
            placed.header[0] = header();
            config_.balance.init(placed.balance);
        }
        return {};
    }

    /// Enqueues y and, under Mode::train, the statistics and this call's balance loss.
    Status forward(const CommT& comm, const ForwardArgs& args) const {
        if (Status s = check_forward(args); !s) return refuse_together(comm, args, std::move(s));
        const auto host = place<HostContext>(args.context.host.data(), dims_);
        const auto context = place<Context>(args.context.device.data(), dims_);
        const auto workspace = place<DeviceWorkspace>(args.workspace.device.data(), dims_, config_.device);
        const auto state = place<State>(args.state.data(), dims_);
        settle(host);
        const TokenInfo<Space> tokens = remember_call(host.call[0], context, args);
        view<const float, 1, Space> bias;
        if constexpr (BalanceT::has_bias) {
            if (const auto of = config_.balance.selection_bias(state.balance, tokens.step); of.present()) {
                Memory::upload(config_.device, of, workspace.bias);
                bias = workspace.bias;
            }
        }
        if (Status s = dims_.routed.route(this->routed_call(args, tokens, workspace.main, bias), context.routed); !s)
            return refuse_together(comm, args, std::move(s));
        if constexpr (Types::Parts::has_shared)
            if (Status s = dims_.shared.route(this->shared_call(args, tokens, workspace.main), context.shared); !s)
                return refuse_together(comm, args, std::move(s));
        const bool train = tokens.mode == Mode::train;
        if (train)
            if (Status s = observe(comm, args, host, context, workspace, state); !s) return s;
        this->run_experts(args, tokens, context, workspace.main);
        this->combine_outputs(args, tokens, context, workspace.main);
        if (train) Memory::join(config_.device);
        host.call[0].phase = train ? CallInfo::Phase::ready : CallInfo::Phase::evaluated;
        return {};
    }

    /// Enqueues dx (=) and grads (+=): of the outputs' loss through dy, and of this call's balance loss. Uses the
    /// context up.
    Status backward(const BackwardArgs& args) const {
        if (Status s = check_backward(args); !s) return s;
        const auto host = place<HostContext>(args.context.host.data(), dims_);
        const auto context = place<Context>(args.context.device.data(), dims_);
        const auto workspace = place<DeviceWorkspace>(args.workspace.device.data(), dims_, config_.device).main;
        const index_t count = host.call[0].tokens;
        const Seen seen = observation(host.call[0], context);
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
            const DeviceT beside = Memory::fork(config_.device);
            Memory::wait(beside);
            const auto placed = place<State>(state.data(), dims_);
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
                Memory::wait(beside);
                if (Status s = SumHead::check("layer.end_step", wire); !s) return s;
            } else {
                config_.balance.collect_step(placed.balance, step, out);
            }
            config_.balance.end_step(placed.balance, step, in);
        }
        return {};
    }

    // What a context says, once the device has come so far.

    /// This call's share of the total balance loss: summed over ranks and micro-steps, the loss of the global batch.
    [[nodiscard]] double balance_loss(const QueuedBlock& context) const {
        const auto host = place<HostContext>(context.host.data(), dims_);
        if (host.call[0].mode != Mode::train) return 0.0;
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
    [[nodiscard]] auto balance_state(std::span<std::byte> state) const {
        return place<State>(state.data(), dims_).balance;
    }

private:
    [[nodiscard]] StateHeader header() const {
        return {StateHeader::expected_magic,
                StateHeader::current_version,
                static_cast<std::int64_t>(config_.layer),
                config_.shape.experts,
                config_.shape.micro_steps,
                state_bytes(),
                state_layout_};
    }

    /// What this call is about to write must not be at work any more.
    void settle(const HostContext& host) const {
        const bool at_work = host.call[0].magic == CallInfo::expected_magic && host.call[0].layout == context_layout_ &&
                             std::atomic_ref<std::int64_t>(host.pending[0]).load(std::memory_order_acquire) != 0;
        if (BalanceT::remembers || at_work) Memory::wait(Memory::fork(config_.device));
    }

    TokenInfo<Space> remember_call(CallInfo& call, const Context& context, const ForwardArgs& args) const {
        const index_t count = args.x.extents[0];
        call = {.magic = CallInfo::expected_magic,
                .layout = context_layout_,
                .mode = args.tokens.mode,
                .tokens = count,
                .valid_tokens = args.tokens.mask.present() ? -1 : count,  // -1: the device's to count
                .step = args.tokens.step};
        if (args.tokens.mask.present()) {
            call.masked = 1;
            Memory::copy(config_.device, args.tokens.mask, context.mask.slice(0, count));
        }
        if (args.tokens.sequences.present()) {
            call.sequences = args.tokens.sequences.extents[0] - 1;
            Memory::copy(config_.device, args.tokens.sequences, context.sequences.slice(0, call.sequences + 1));
        }
        if constexpr (Types::uses_ids) {
            call.labelled = 1;
            Memory::copy(config_.device, args.tokens.ids, context.ids.slice(0, count));
        }
        return observation(call, context).tokens;
    }

    [[nodiscard]] Seen observation(const CallInfo& call, const Context& context) const {
        Seen seen;
        seen.routing = dims_.routed.routing(context.routed, call.tokens);
        if (call.masked) seen.tokens.mask = context.mask.slice(0, call.tokens);
        if (call.sequences > 0) seen.tokens.sequences = context.sequences.slice(0, call.sequences + 1);
        if (call.labelled) seen.tokens.ids = context.ids.slice(0, call.tokens);
        seen.tokens.step = call.step;
        seen.tokens.mode = call.mode;
        seen.valid_tokens = call.valid_tokens;
        seen.layer = config_.layer;
        return seen;
    }

    /// Counts, sums and concludes beside the experts, which are enqueued next.
    Status observe(const CommT& comm, const ForwardArgs& args, const HostContext& host, const Context& context,
                   const DeviceWorkspace& workspace, const State& state) const {
        const auto wire = place<HostWorkspace>(args.workspace.host.data(), dims_).wire;
        const StepInfo& at = host.call[0].step;
        const Seen seen = observation(host.call[0], context);
        auto* const conclusion = std::construct_at(
            host.conclusion.data,
            Conclusion{config_.balance, seen, state, host.balance, wire, this->key(at, false), host.pending.data,
                       host.refused.data, config_.balance.exchanges(state.balance, at), config_.shape});
        host.pending[0] = 1;
        const DeviceT beside = Memory::fork(config_.device);
        config_.balance.observe(beside, seen, state.balance, host.balance, workspace.beside.data);
        if (conclusion->summing) {
            const std::span<std::int64_t> words{wire.data, static_cast<std::size_t>(wire_words())};
            Memory::run_on_host(beside, Conclusion::post, conclusion);
            if constexpr (!StreamOrderedComm<CommT>) Memory::wait(beside);
            if (Status s = comm.begin_sum(words); !s) return s;
            if (Status s = comm.end_sum(words); !s) return s;
        }
        Memory::run_on_host(beside, Conclusion::conclude, conclusion);
        return {};
    }

    /// A refusal of a forward that the other ranks wait in: takes part in their sum with a word that says so, where the
    /// arguments allow it. Answers with the refusal itself.
    Status refuse_together([[maybe_unused]] const CommT& comm, [[maybe_unused]] const ForwardArgs& args,
                           Status refusal) const {
        if constexpr (BalanceT::communicates) {
            const StepInfo& at = args.tokens.step;
            const bool able = comm.size() > 1 && this->check_all().ok() && args.tokens.mode == Mode::train &&
                              at.step >= 0 && at.micro_step >= 0 && at.micro_step < config_.shape.micro_steps &&
                              check_blocks("", args.context, args.workspace).ok() && check_state("", args.state).ok();
            if (!able) return refusal;
            Memory::wait(Memory::fork(config_.device));  // the log, and the wire, are at rest
            if (!config_.balance.exchanges(place<State>(args.state.data(), dims_).balance, at)) return refusal;
            const auto wire = place<HostWorkspace>(args.workspace.host.data(), dims_).wire;
            std::fill_n(wire.data, wire.size(), std::int64_t{0});
            SumHead::write(wire, this->key(at, false), true);
            const std::span<std::int64_t> words{wire.data, static_cast<std::size_t>(wire_words())};
            if (comm.begin_sum(words)) (void)comm.end_sum(words);
        }
        return refusal;
    }

    Status check_forward(const ForwardArgs& args) const {
        constexpr std::string_view stage = "layer.forward";
        if (Status s = this->check_forward_tensors(stage, args); !s) return s;
        if (Status s = check_blocks(stage, args.context, args.workspace); !s) return s;
        return check_state(stage, args.state);
    }
    Status check_backward(const BackwardArgs& args) const {
        constexpr std::string_view stage = "layer.backward";
        if (Status s = check_blocks(stage, args.context, args.workspace); !s) return s;
        return this->check_backward_tensors(stage, args, place<HostContext>(args.context.host.data(), dims_).call[0]);
    }
    Status check_blocks(std::string_view stage, const QueuedBlock& context, const QueuedBlock& workspace) const {
        const auto check = [&](const std::string& name, const QueuedBlock& block, const QueuedBytes& bytes) {
            if (Status s = check_block(stage, name + ".host", block.host, bytes.host); !s) return s;
            return check_block(stage, name + ".device", block.device, bytes.device);
        };
        if (Status s = check("context", context, context_bytes()); !s) return s;
        return check("workspace", workspace, workspace_bytes());
    }
};

}  // namespace steelyard
