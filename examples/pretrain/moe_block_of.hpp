// Layers of the library behind the transformer's MoeBlock: memory for them, and one call for each.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "any_comm.hpp"
#include "any_router.hpp"
#include "limit.hpp"
#include "memory.hpp"
#include "moe_block.hpp"
#include "settings.hpp"
#include "steelyard/steelyard.hpp"

namespace pretrain {

/// What all layers have in common. What routing says of itself is left to those that derive from it.
template <class Layer>
class BlockAround : public MoeBlock<typename Layer::value_type> {
    using T = typename Layer::value_type;

public:
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
                   const BlockCall<>& call, const HandedOn<T>& handed = {}) override {
        step_ = call.step;
        // No mask: there is no padding.
        const steelyard::TokenInfo<> tokens{{}, call.sequences, call.step, call.mode, call.ids};
        return layer_.forward(comm_, {.x = x,
                                      .params = layer_.read_only_params(layer_.place_params(params)),
                                      .y = y,
                                      .context = context_.span(),
                                      .workspace = workspace,
                                      .state = state_.span(),
                                      .tokens = tokens,
                                      .prior = handed.prior});
    }

    Status backward(view<const T, 2> x, std::byte* params, view<const T, 2> dy, view<T, 2> dx, std::byte* grads,
                    std::span<std::byte> workspace, const BlockCall<>&, const HandedOn<T>& handed = {}) override {
        return layer_.backward({.x = x,
                                .params = layer_.read_only_params(layer_.place_params(params)),
                                .dy = dy,
                                .dx = dx,
                                .grads = layer_.place_params(grads),
                                .context = context_.span(),
                                .workspace = workspace,
                                .prior = handed.prior,
                                .dprior = handed.dprior,
                                .dlogits = handed.dlogits});
    }

    Status end_step(const steelyard::StepInfo& step, std::span<std::byte> workspace) override {
        return layer_.end_step(comm_, step.step, state_.span(), workspace);
    }

    double total_balance_loss() const override { return layer_.balance_loss(context_.span()); }
    std::span<std::byte> state() override { return state_.span(); }

protected:
    BlockAround(const typename Layer::Config& config, const AnyComm& comm)
        : layer_(config), comm_(comm), context_(layer_.context_bytes()), state_(layer_.state_bytes()),
          load_(static_cast<std::size_t>(config.shape.experts)) {
        steelyard::throw_if_refused(layer_.check());
        steelyard::throw_if_refused(layer_.init_state(state_.span()));
    }

    Layer layer_;
    AnyComm comm_;
    Bytes context_, state_;
    steelyard::StepInfo step_;
    std::vector<std::int64_t> load_;  // [E]
};

[[nodiscard]] inline steelyard::LayerShape layer_shape(const Settings& s) {
    return {.tokens = index_t{s.micro_batch} * s.sequence,
            .width = s.dim,
            .experts = s.experts,
            .sequences = s.micro_batch,
            .micro_steps = s.accumulate,
            .ranks = s.ranks};
}

/// load (=) how often each expert was chosen.
inline void count_choices(view<const steelyard::expert_t, 2> chosen, std::span<std::int64_t> load) {  // [T, K], [E]
    std::fill(load.begin(), load.end(), 0);
    for (index_t t = 0; t < chosen.extents[0]; ++t)
        for (index_t k = 0; k < chosen.extents[1]; ++k)
            if (const auto e = chosen(t, k); e >= 0) ++load[static_cast<std::size_t>(e)];
}

template <class Main>
using BalanceWith = steelyard::AllOf<Main, steelyard::RouterZLoss>;
/// A strategy's policy beside the router z-loss of the settings.
template <class Main>
[[nodiscard]] BalanceWith<Main> balance_with(const Main& main, const Settings& s) {
    return BalanceWith<Main>(main, steelyard::RouterZLoss{{}, {s.z_loss}});
}
/// The main part's loss of a record.
template <class Main, class Record>
[[nodiscard]] double main_loss(const BalanceWith<Main>& balance, const Record& record, const steelyard::StepInfo& step) {
    return std::get<0>(balance.parts).loss(std::get<0>(record.of), step);
}
template <class T, class Main>
using LayerWith = steelyard::MoE<T, AnyRouter, steelyard::SwiGlu, BalanceWith<Main>, AnyComm, Limit>;

/// SwiGLU experts behind the router and the capacity of the settings, balanced by `Main` and a router z-loss.
template <class T, class Main>
class MoeBlockOf final : public BlockAround<LayerWith<T, Main>> {
    using Base = BlockAround<LayerWith<T, Main>>;
    using Base::layer_, Base::context_, Base::load_;

public:
    /// `unit` is what the main part's reported loss is divided by: its coefficient.
    MoeBlockOf(const Settings& s, int layer, const AnyComm& comm, const Main& main, double unit)
        : Base({.shape = layer_shape(s),
                .router = make_router(s),
                .expert = {.hidden = s.hidden},
                .balance = balance_with(main, s),
                .overflow = make_limit(s),
                .device = {.threads = s.threads},
                .layer = static_cast<std::uint32_t>(layer)},
               comm),
          unit_(unit), hears_prior_(hears_prior(s.router)) {}

    double balance_loss() const override {
        return main_loss(layer_.config().balance, layer_.balance_record(context_.span()), this->step_) / unit_;
    }

    std::span<const std::int64_t> tokens_per_expert() override {
        count_choices(choices(), load_);
        return load_;
    }

    view<const steelyard::expert_t, 2> choices() const override { return layer_.routing(context_.span()).expert; }
    view<const std::int32_t, 2> taken() const override { return layer_.plan(context_.span()).row; }
    view<const T, 2> logits_to_hand_on() const override {
        return hears_prior_ ? view<const T, 2>(layer_.routing(context_.span()).logits) : view<const T, 2>{};
    }

private:
    double unit_;
    bool hears_prior_;
};

template <class T>
using MergedLayer = steelyard::MoE<T, steelyard::MergeExperts, steelyard::SwiGlu, steelyard::NoBalance, AnyComm>;

/// One SwiGLU expert for each run of tokens, blended from all by the run before. Nothing is chosen or balanced.
template <class T>
class MergedBlock final : public BlockAround<MergedLayer<T>> {
public:
    MergedBlock(const Settings& s, int layer, const AnyComm& comm)
        : BlockAround<MergedLayer<T>>(
              {.shape = layer_shape(s),
               .router = {.segment = s.segment, .first = steelyard::FirstSegment::uniform},  // causal
               .expert = {.hidden = s.hidden},
               .balance = {},
               .overflow = {},
               .device = {.threads = s.threads},
               .layer = static_cast<std::uint32_t>(layer)},
              comm) {}

    double balance_loss() const override { return 0; }
    std::span<const std::int64_t> tokens_per_expert() override { return this->load_; }  // zeros
    view<const steelyard::expert_t, 2> choices() const override { return {}; }
    view<const std::int32_t, 2> taken() const override { return {}; }
    view<const T, 2> logits_to_hand_on() const override { return {}; }
};

}  // namespace pretrain
