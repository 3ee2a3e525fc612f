// A layer of the library behind the transformer's MoeBlock: memory for it, and one call for each.
#pragma once

#include <string>
#include <tuple>

#include "memory.hpp"
#include "moe_block.hpp"
#include "settings.hpp"
#include "steelyard/steelyard.hpp"

namespace pretrain {

/// SwiGLU experts behind a softmax top-k router, balanced by `Main` and a router z-loss.
template <class T, class Comm, class Main>
class MoeBlockOf final : public MoeBlock<T> {
    using Balance = steelyard::AllOf<Main, steelyard::RouterZLoss>;
    using Layer = steelyard::MoE<T, steelyard::TopK, steelyard::SwiGlu, Balance, Comm>;

public:
    /// `unit` is what the main part's reported loss is divided by: its coefficient.
    MoeBlockOf(const Settings& s, int layer, const Comm& comm, const Main& main, double unit)
        : layer_({.shape = {.tokens = index_t{s.micro_batch} * s.sequence,
                            .width = s.dim,
                            .experts = s.experts,
                            .sequences = s.micro_batch,
                            .micro_steps = s.accumulate,
                            .ranks = s.ranks},
                  .router = {.k = s.top_k},
                  .expert = {.hidden = s.hidden},
                  .balance = Balance(main, steelyard::RouterZLoss{{}, {s.z_loss}}),
                  .device = {.threads = s.threads},
                  .layer = static_cast<std::uint32_t>(layer)}),
          comm_(comm), unit_(unit), context_(layer_.context_bytes()), state_(layer_.state_bytes()),
          load_(static_cast<std::size_t>(s.experts)) {
        steelyard::throw_if_refused(layer_.check());
        steelyard::throw_if_refused(layer_.init_state(state_.span()));
    }

    index_t param_bytes() const override { return layer_.param_bytes(); }
    index_t workspace_bytes() const override { return layer_.workspace_bytes(); }

    std::vector<Tensor<T>> tensors(std::byte* block) const override {
        std::vector<Tensor<T>> all;
        auto params = layer_.place_params(block);
        layer_.each_param(params, [&]<int Rank>(const std::string& name, const view<T, Rank>& v) {
            all.push_back({name, v.data, std::vector<index_t>(v.extents, v.extents + Rank)});
        });
        return all;
    }

    Status forward(view<const T, 2> x, std::byte* params, view<T, 2> y, std::span<std::byte> workspace,
                   const BlockCall& call) override {
        step_ = call.step;
        const steelyard::TokenInfo<> tokens{{}, call.sequences, call.step, call.mode};  // no mask: no padding
        return layer_.forward(comm_, {.x = x,
                                      .params = layer_.read_only_params(layer_.place_params(params)),
                                      .y = y,
                                      .context = context_.span(),
                                      .workspace = workspace,
                                      .state = state_.span(),
                                      .tokens = tokens});
    }

    Status backward(view<const T, 2> x, std::byte* params, view<const T, 2> dy, view<T, 2> dx, std::byte* grads,
                    std::span<std::byte> workspace, const BlockCall&) override {
        return layer_.backward({.x = x,
                                .params = layer_.read_only_params(layer_.place_params(params)),
                                .dy = dy,
                                .dx = dx,
                                .grads = layer_.place_params(grads),
                                .context = context_.span(),
                                .workspace = workspace});
    }

    Status end_step(const steelyard::StepInfo& step, std::span<std::byte> workspace) override {
        return layer_.end_step(comm_, step.step, state_.span(), workspace);
    }

    double total_balance_loss() const override { return layer_.balance_loss(context_.span()); }

    double balance_loss() const override {
        const auto record = layer_.balance_record(context_.span());
        return std::get<0>(layer_.config().balance.parts).loss(std::get<0>(record.of), step_) / unit_;
    }

    std::span<const std::int64_t> tokens_per_expert() override {
        const auto offsets = layer_.plan(context_.span()).offsets;  // [E + 1]
        for (std::size_t e = 0; e < load_.size(); ++e) {
            const auto i = static_cast<index_t>(e);
            load_[e] = offsets(i + 1) - offsets(i);
        }
        return load_;
    }

    view<const steelyard::expert_t, 2> choices() const override { return layer_.routing(context_.span()).expert; }
    std::span<std::byte> state() override { return state_.span(); }

private:
    Layer layer_;
    Comm comm_;
    double unit_;
    Bytes context_, state_;
    steelyard::StepInfo step_;
    std::vector<std::int64_t> load_;  // [E]
};

}  // namespace pretrain
