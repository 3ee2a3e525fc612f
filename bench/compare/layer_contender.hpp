// A contender that is a Steelyard layer: ours, or our layer around a peer's experts.
#pragma once

#include <algorithm>
#include <optional>

#include "contender.hpp"
#include "steelyard/steelyard.hpp"

namespace steelyard_bench {

/// One layer with memory for one case.
template <class ExpertT, class BalanceT>
class LayerRun {
    using Layer = MoE<float, TopK, ExpertT, BalanceT>;

public:
    LayerRun(const Case& of, const ExpertT& expert, const Model& model, const Batch& batch,
             view<const std::byte, 1> packed)
        : layer_({.shape = {.tokens = of.shape.tokens, .width = of.shape.width, .experts = of.shape.experts},
                  .router = {.k = of.shape.top_k, .bias = true},
                  .expert = expert,
                  .device = {.threads = of.threads}}),
          model_(model),
          batch_(batch),
          training_(of.pass == Pass::train),
          context_(static_cast<std::size_t>(layer_.context_bytes())),
          workspace_(static_cast<std::size_t>(layer_.workspace_bytes())),
          rows_(2 * static_cast<std::size_t>(batch.dy.size()) * sizeof(float)),
          y_(rows_.as<float>(), of.shape.tokens, of.shape.width),
          dx_(rows_.as<float>() + y_.size(), of.shape.tokens, of.shape.width) {
        typename Layer::Params params;
        fill(params, model.weights());
        params_ = layer_.read_only_params(params);
        params_.experts.packed = packed;
        if (training_) {
            fill(grads_, model.gradients());
            grads_.router.bias = {};  // not trained: it stands in for a skew of the data
        }
    }

    void forward(index_t set) {
        TokenInfo<> tokens;
        tokens.step.step = step_++;
        tokens.mode = training_ ? Mode::train : Mode::evaluate;
        throw_if_refused(layer_.forward({}, {.x = batch_.x[set],
                                             .params = params_,
                                             .y = y_,
                                             .context = context_.span(),
                                             .workspace = workspace_.span(),
                                             .state = {},
                                             .tokens = tokens}));
    }
    void backward() {
        throw_if_refused(layer_.backward({.x = batch_.x[0],
                                          .params = params_,
                                          .dy = batch_.dy,
                                          .dx = dx_,
                                          .grads = grads_,
                                          .context = context_.span(),
                                          .workspace = workspace_.span(),
                                          .write_grads = Write::assign}));
    }

    [[nodiscard]] Outcome outcome() const {
        const auto all = [](const auto& tensor) { return std::vector(tensor.data, tensor.data + tensor.size()); };
        Outcome made{.y = all(y_)};
        if (!training_) return made;
        made.dx = all(dx_);
        made.router = all(model_.gradients().router);
        for_sampled([&](const auto& tensor, std::vector<float> Outcome::*part) {
            auto& to = made.*part;
            to.insert(to.end(), tensor.data, tensor.data + tensor.size());
        });
        return made;
    }
    void forget_gradients() const {
        if (!training_) return;
        std::fill_n(model_.gradients().router.data, model_.gradients().router.size(), 0.0f);
        for_sampled([](const auto& tensor, auto) { std::fill_n(tensor.data, tensor.size(), 0.0f); });
    }

private:
    static void fill(typename Layer::Params& params, const Model::Tensors& tensors) {
        params.router.weight = tensors.router, params.router.bias = tensors.bias;
        params.experts.gate = tensors.gate, params.experts.up = tensors.up, params.experts.down = tensors.down;
    }
    template <class Visit>
    void for_sampled(Visit&& visit) const {
        const auto& gradients = model_.gradients();
        for (const index_t e : batch_.sampled) {
            visit(gradients.gate[e], &Outcome::gate);
            visit(gradients.up[e], &Outcome::up);
            visit(gradients.down[e], &Outcome::down);
        }
    }

    Layer layer_;
    const Model& model_;
    const Batch& batch_;
    bool training_;
    HugeMemory context_, workspace_, rows_;
    view<float, 2> y_, dx_;
    typename Layer::ConstParams params_;
    typename Layer::Params grads_;
    std::int64_t step_ = 0;
};

/// Forward with NoBalance under Mode::evaluate; training with the micro-batch loss, where gradients replace those of
/// the step before.
template <class ExpertT>
class LayerContender : public Contender {
public:
    LayerContender(const Model& model, const ExpertT& expert) : model_(model), expert_(expert) {}

    void prepare(const Case& of, const Batch& batch) override {
        inference_.reset(), training_.reset();
        if (of.pass == Pass::train)
            training_.emplace(of, expert_, model_, batch, packed_);
        else
            inference_.emplace(of, expert_, model_, batch, packed_);
    }
    void forward(index_t set) override { training_ ? training_->forward(set) : inference_->forward(set); }
    void backward() override { training_->backward(); }
    Outcome outcome() override { return training_ ? training_->outcome() : inference_->outcome(); }
    void forget_gradients() override { training_ ? training_->forget_gradients() : inference_->forget_gradients(); }

protected:
    const Model& model_;
    ExpertT expert_;
    view<const std::byte, 1> packed_;

private:
    std::optional<LayerRun<ExpertT, NoBalance>> inference_;
    std::optional<LayerRun<ExpertT, MicroBatchLoss>> training_;
};

}  // namespace steelyard_bench
