// A layer on the GPU with all its memory, for the benchmark.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gpu/timer.hpp"
#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

namespace bench {

using steelyard::bf16;
using steelyard::Cuda;
using steelyard::CudaBytes;
using steelyard::CudaSpace;
using steelyard::index_t;
using steelyard::view;

/// A layer of a published model or a point of a grid, and how many tokens it is given.
struct Case {
    std::string name;
    index_t tokens, width, hidden, experts;
    int top_k;
    bool zipf = false;  // choices by 1 / rank rather than alike

    [[nodiscard]] double forward_flops() const {
        return 6.0 * static_cast<double>(tokens) * top_k * static_cast<double>(width) * static_cast<double>(hidden);
    }
};

/// What layers of the same sizes can share, one after the other: where tensors lie makes a difference of half a
/// percent.
struct LayerMemory {
    CudaBytes params, grads, context, workspace, x, y, dy, dx;
};

/// Tokens come in `turns` sets of their own, one call after the other: few tokens would else find their experts'
/// weights in the cache. Gradients replace those of the call before, as those of PyTorch's peers do.
template <class BalanceT, class CommT = steelyard::SelfComm>
class TimedLayer {
public:
    using Layer = steelyard::MoE<bf16, steelyard::TopK, steelyard::SwiGlu, BalanceT, CommT, steelyard::Dropless,
                                 steelyard::KeepActivations, Cuda>;

    /// `stacked`: the counts are summed as a stack, of this one layer. `memory`: another layer's.
    TimedLayer(const Case& of, const Cuda& device, const CommT& comm = {}, bool stacked = false,
               std::shared_ptr<const LayerMemory> memory = nullptr)
        : case_(of),
          comm_(&comm),
          turns_(of.tokens <= 512 ? 8 : 2),
          layer_({.shape = {.tokens = of.tokens, .width = of.width, .experts = of.experts},
                  .router = {.k = of.top_k, .bias = of.zipf},
                  .expert = {.hidden = of.hidden},
                  .device = device}),
          state_(layer_.state_bytes(), CudaBytes::Where::pinned),
          context_host_(layer_.context_bytes().host, CudaBytes::Where::pinned),
          workspace_host_(layer_.workspace_bytes().host, CudaBytes::Where::pinned),
          memory_(memory != nullptr ? std::move(memory) : make_memory()),
          wires_(layer_.wire_words() * 8, CudaBytes::Where::pinned),
          stack_({reinterpret_cast<std::int64_t*>(wires_.data()), static_cast<std::size_t>(layer_.wire_words())}, 1,
                 layer_.wire_words(), device),
          stacked_(stacked) {
        steelyard::throw_if_refused(layer_.check());
        steelyard::throw_if_refused(layer_.init_state(state_.span()));
        std::memset(context_host_.data(), 0, static_cast<std::size_t>(context_host_.size()));
        if (memory_->context.size() < layer_.context_bytes().device ||
            memory_->workspace.size() < layer_.workspace_bytes().device)
            throw std::runtime_error("the other layer's memory is too small");
        fill_random(memory_->params, static_cast<float>(1.0 / std::sqrt(static_cast<double>(of.width))), 5);
        fill_random(memory_->x, 1.0f, 6), fill_random(memory_->dy, 1.0f, 7), fill_random(memory_->grads, 1.0f, 8);
        if (of.zipf) {  // logits of tokens are about N(0, 1); each expert's is moved by the logarithm of 1 / rank
            std::vector<bf16> bias(static_cast<std::size_t>(of.experts));
            for (std::size_t e = 0; e < bias.size(); ++e) bias[e] = bf16(-std::log(static_cast<float>(e + 1)));
            check(cudaMemcpy(placed().router.bias.data, bias.data(), 2 * bias.size(), cudaMemcpyHostToDevice));
        }
        check(cudaDeviceSynchronize());
    }

    [[nodiscard]] const Layer& layer() const { return layer_; }
    [[nodiscard]] const std::shared_ptr<const LayerMemory>& memory() const { return memory_; }
    [[nodiscard]] steelyard::QueuedBlock context() const { return {context_host_.span(), memory_->context.span()}; }
    [[nodiscard]] steelyard::QueuedBlock workspace() const {
        return {workspace_host_.span(), memory_->workspace.span()};
    }
    [[nodiscard]] view<bf16, 2, CudaSpace> x(int turn) const {
        return {reinterpret_cast<bf16*>(memory_->x.data() + matrix_bytes() * (turn % turns_)), case_.tokens,
                case_.width};
    }
    [[nodiscard]] view<bf16, 2, CudaSpace> y() const { return matrix(memory_->y); }
    [[nodiscard]] auto weights() const { return layer_.read_only_params(placed()); }

    void forward(int turn) const { forward(turn, steelyard::Mode::train); }
    void evaluate(int turn) const { forward(turn, steelyard::Mode::evaluate); }
    void backward(int turn, steelyard::Write write = steelyard::Write::assign) const {
        steelyard::throw_if_refused(layer_.backward({.x = x(turn),
                                                     .params = weights(),
                                                     .dy = matrix(memory_->dy),
                                                     .dx = matrix(memory_->dx),
                                                     .grads = layer_.place_params(memory_->grads.data()),
                                                     .context = context(),
                                                     .workspace = workspace(),
                                                     .write_grads = write}));
    }

    /// Experts that have any rows: the mean of an evaluation of each set of tokens.
    [[nodiscard]] double touched_experts() const {
        double touched = 0;
        std::vector<index_t> offsets(static_cast<std::size_t>(case_.experts) + 1);
        for (int turn = 0; turn < turns_; ++turn) {
            evaluate(turn);
            check(cudaDeviceSynchronize());
            check(cudaMemcpy(offsets.data(), layer_.plan(context()).offsets.data, offsets.size() * sizeof(index_t),
                             cudaMemcpyDeviceToHost));
            for (std::size_t e = 0; e + 1 < offsets.size(); ++e) touched += offsets[e + 1] > offsets[e];
        }
        return touched / turns_;
    }
    /// Bytes of context for a token, and of all workspace.
    [[nodiscard]] double context_bytes() const { return static_cast<double>(layer_.context_bytes().device); }
    [[nodiscard]] double workspace_bytes() const { return static_cast<double>(layer_.workspace_bytes().device); }

private:
    [[nodiscard]] index_t matrix_bytes() const { return case_.tokens * case_.width * 2; }
    [[nodiscard]] view<bf16, 2, CudaSpace> matrix(const CudaBytes& of) const {
        return {reinterpret_cast<bf16*>(of.data()), case_.tokens, case_.width};
    }
    [[nodiscard]] auto placed() const { return layer_.place_params(memory_->params.data()); }
    /// With a megabyte to spare where layers may differ a little.
    [[nodiscard]] std::shared_ptr<const LayerMemory> make_memory() const {
        constexpr index_t spare = index_t{1} << 20;
        return std::shared_ptr<const LayerMemory>(
            new LayerMemory{CudaBytes(layer_.param_bytes()), CudaBytes(layer_.param_bytes()),
                            CudaBytes(layer_.context_bytes().device + spare),
                            CudaBytes(layer_.workspace_bytes().device + spare), CudaBytes(matrix_bytes() * turns_),
                            CudaBytes(matrix_bytes()), CudaBytes(matrix_bytes()), CudaBytes(matrix_bytes())});
    }
    void forward(int turn, steelyard::Mode mode) const {
        // Each call is a step of its own: to a policy that remembers, the same step again would be a replay.
        const steelyard::StepInfo at{.step = next_step_++};
        if (stacked_) stack_.clear();
        steelyard::throw_if_refused(layer_.forward(*comm_, {.x = x(turn),
                                                            .params = weights(),
                                                            .y = matrix(memory_->y),
                                                            .context = context(),
                                                            .workspace = workspace(),
                                                            .state = state_.span(),
                                                            .tokens = {.step = at, .mode = mode},
                                                            .stack = stacked_ ? &stack_ : nullptr}));
        if (!stacked_) return;
        steelyard::throw_if_refused(stack_.begin(*comm_));
        steelyard::throw_if_refused(stack_.end(*comm_));
        steelyard::throw_if_refused(layer_.conclude(stack_, 0, context(), workspace(), state_.span()));
    }

    Case case_;
    const CommT* comm_;
    int turns_;
    Layer layer_;
    CudaBytes state_, context_host_, workspace_host_;
    std::shared_ptr<const LayerMemory> memory_;
    CudaBytes wires_;
    mutable typename Layer::Stack stack_;
    bool stacked_;
    mutable std::int64_t next_step_ = 0;
};

}  // namespace bench
