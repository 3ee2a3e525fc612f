// What a layer on a device that works in its own time does beside the stages: statistics, their sums, refusals.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "steelyard/layer/queued_memory.hpp"
#include "steelyard/layer/queued_stack.hpp"
#include "steelyard/layer/stages.hpp"

namespace steelyard {

/// The parts of `MoE` on a QueuedDevice (layer/queued.hpp). `Types` is a LayerTypes.
template <class Types>
class QueuedStages : protected LayerStages<Types> {
protected:
    using Stages = LayerStages<Types>;
    using BalanceT = typename Types::Balance;
    using CommT = typename Types::Comm;
    using DeviceT = typename Types::Device;
    using Memory = memory_ops<DeviceT>;
    using Queued = QueuedTypes<Types>;
    using Record = typename Queued::Record;
    using Seen = typename Queued::Seen;
    using Conclusion = typename Queued::Conclusion;
    using HostContext = typename Queued::HostContext;
    using HostWorkspace = typename Queued::HostWorkspace;
    using DeviceWorkspace = typename Queued::DeviceWorkspace;
    using Stages::config_, Stages::dims_, Stages::context_layout_;
    using typename Stages::Space, typename Stages::Gate, typename Stages::Context, typename Stages::State,
        typename Stages::ForwardArgs, typename Stages::BackwardArgs;

    explicit QueuedStages(const typename Types::Config& config) : Stages(config) {}

    [[nodiscard]] QueuedBytes context_bytes() const { return {bytes_of<HostContext>(dims_), bytes_of<Context>(dims_)}; }
    [[nodiscard]] QueuedBytes workspace_bytes() const {
        return {bytes_of<HostWorkspace>(dims_), bytes_of<DeviceWorkspace>(dims_, config_.device)};
    }

    /// Waits for the statistics that were enqueued, and for what reads a bias: the state, and what lies pinned, is the
    /// host's.
    void rest() const {
        Memory::wait(BalanceT::has_bias ? Memory::fork(config_.device) : Memory::beside(config_.device));
    }

    /// Whether this training call has anything to sum: not if the device has been given that sum already.
    [[nodiscard]] bool exchanges([[maybe_unused]] const State& state, [[maybe_unused]] const StepInfo& at) const {
        if constexpr (BalanceT::communicates)
            return !state.enqueued.holds(at) && config_.balance.exchanges(state.balance, at);
        return false;
    }

    /// What this call is about to write must not be at work any more.
    void settle(const HostContext& host) const {
        const bool at_work = host.call[0].magic == CallInfo::expected_magic && host.call[0].layout == context_layout_ &&
                             std::atomic_ref<std::int64_t>(host.pending[0]).load(std::memory_order_acquire) != 0;
        if (at_work) Memory::wait(Memory::beside(config_.device));
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

    /// Where this call's words go: to the stack's row, or into the workspace.
    [[nodiscard]] view<std::int64_t, 1> wire_of(const ForwardArgs& args) const {
        return args.stack != nullptr ? args.stack->row(args.row)
                                     : place<HostWorkspace>(args.workspace.host.data(), dims_).wire;
    }

    /// Valid tokens of each rank: the caller's word, or a small sum of one-hot vectors, which the host waits for.
    Status know_rank_tokens(const CommT& comm, const ForwardArgs& args, Seen& seen) const {
        constexpr std::string_view stage = "layer.forward";
        const index_t ranks = comm.size();
        seen.rank = comm.rank();
        seen.tokens_of_rank = args.tokens_of_rank;
        if (Status s = check_ranks(stage, config_.shape, ranks, seen.rank, seen.valid_tokens, args.tokens_of_rank); !s)
            return s;
        if (args.tokens_of_rank.present()) return {};
        if (seen.valid_tokens < 0)
            return Status::refuse(Code::invalid_argument, stage, "tokens_of_rank",
                                  "the valid tokens of each rank, which the host cannot count", "none");
        // The words of an earlier call are no longer at work: it waited for them.
        const auto counts = place<HostWorkspace>(args.workspace.host.data(), dims_).tokens_of_rank.slice(0, ranks);
        std::fill_n(counts.data, ranks, std::int64_t{0});
        counts[seen.rank] = seen.valid_tokens;
        seen.tokens_of_rank = counts;
        if (ranks == 1) return {};
        const std::span<std::int64_t> words{counts.data, static_cast<std::size_t>(ranks)};
        if (Status s = comm.begin_sum(words); !s) return s;
        if (Status s = comm.end_sum(words); !s) return s;
        if constexpr (StreamOrderedComm<CommT>) Memory::wait(Memory::beside(config_.device));
        return {};
    }

    /// Counts beside the experts, which are enqueued next, and puts the counts on the wire.
    void observe(const ForwardArgs& args, const HostContext& host, const Seen& seen, const DeviceWorkspace& workspace,
                 const State& state, bool summing) const {
        const auto wire = wire_of(args);
        auto* const conclusion =
            std::construct_at(host.conclusion.data, Conclusion{config_.balance, seen, state, host.balance, wire, wire,
                                                               this->key(seen.tokens.step, false), host.pending.data,
                                                               host.refused.data, summing, config_.shape});
        conclusion->seen.tokens_of_rank = {};  // the caller's, and of use for the draw alone
        host.pending[0] = 1;
        const DeviceT beside = Memory::fork(config_.device);
        config_.balance.observe(beside, seen, state.balance, host.balance, workspace.beside.data);
        if (summing) Memory::run_on_host(beside, Conclusion::post, conclusion);
    }

    /// Sums what was posted, and concludes.
    Status sum_and_conclude(const CommT& comm, const HostContext& host) const {
        Conclusion& conclusion = host.conclusion[0];
        if (conclusion.summing) {
            const std::span<std::int64_t> words{conclusion.wire.data, static_cast<std::size_t>(dims_.wire_words())};
            if constexpr (!StreamOrderedComm<CommT>) Memory::wait(Memory::beside(config_.device));
            if (Status s = comm.begin_sum(words); !s) return s;
            if (Status s = comm.end_sum(words); !s) return s;
            if constexpr (!StreamOrderedComm<CommT>)  // else the sum is still to come, and `summed` tells
                if (Status s = SumHead::check("layer.forward", conclusion.wire); !s) return s;
        }
        enqueue_conclusion(conclusion);
        return {};
    }
    /// From here on the micro-step's sum is one that the state will hold, unless it comes out refused.
    void enqueue_conclusion(Conclusion& conclusion) const {
        if constexpr (BalanceT::communicates)
            if (conclusion.summing) conclusion.state.enqueued.enter(conclusion.seen.tokens.step);
        Memory::run_on_host(Memory::beside(config_.device), Conclusion::conclude, &conclusion);
    }

    /// A refusal of a forward that the other ranks wait in: takes part in their sum with a word that says so, where the
    /// arguments allow it. Answers with the refusal itself.
    Status refuse_together([[maybe_unused]] const CommT& comm, [[maybe_unused]] const ForwardArgs& args,
                           Status refusal) const {
        if constexpr (BalanceT::communicates) {
            const StepInfo& at = args.tokens.step;
            const bool able = comm.size() > 1 && this->check_all().ok() && args.tokens.mode == Mode::train &&
                              at.step >= 0 && at.micro_step >= 0 && at.micro_step < config_.shape.micro_steps &&
                              check_blocks("", args.context, args.workspace).ok() &&
                              this->check_state("", args.state).ok();
            if (!able) return refusal;
            if (args.stack != nullptr && !check_stack("", args.stack->rows(), args.row, dims_.wire_words()))
                return refusal;
            rest();
            if (!exchanges(this->place_state(args.state), at)) return refusal;
            if constexpr (BalanceT::needs_rank_tokens) {
                Seen nothing;
                if (!args.tokens_of_rank.present() && !know_rank_tokens(comm, args, nothing)) return refusal;
            }
            const auto wire = wire_of(args);
            std::fill_n(wire.data, wire.size(), std::int64_t{0});
            SumHead::write(wire, this->key(at, false), true);
            if (args.stack != nullptr) {
                args.stack->post();
                return refusal;
            }
            const std::span<std::int64_t> words{wire.data, static_cast<std::size_t>(dims_.wire_words())};
            if (comm.begin_sum(words)) (void)comm.end_sum(words);
        }
        return refusal;
    }

    Status check_forward(const ForwardArgs& args) const {
        constexpr std::string_view stage = "layer.forward";
        if (Status s = this->check_forward_tensors(stage, args); !s) return s;
        if (Status s = check_blocks(stage, args.context, args.workspace); !s) return s;
        if (BalanceT::communicates && args.stack != nullptr)
            if (Status s = check_stack(stage, args.stack->rows(), args.row, dims_.wire_words()); !s) return s;
        return this->check_state(stage, args.state);
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
