// A layer with memory and made-up data, ready to be timed.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <utility>

#include "shape.hpp"
#include "steelyard/steelyard.hpp"

namespace steelyard_bench {

/// A float layer of SwiGlu experts behind a softmax router.
template <class Balance, class Comm = SelfComm>
class LayerCase {
public:
    using Layer = MoE<float, TopK, SwiGlu, Balance, Comm>;

    LayerCase(const Shape& shape, Balance balance, int threads, Comm comm = {}, int ranks = 1)
        : comm_(std::move(comm)),
          layer_({.shape = {.tokens = shape.tokens, .width = shape.width, .experts = shape.experts, .ranks = ranks},
                  .router = {.k = shape.top_k},
                  .expert = {.hidden = shape.hidden},
                  .balance = std::move(balance),
                  .device = {.threads = threads}}),
          params_memory_(layer_.param_bytes()),
          grads_memory_(layer_.param_bytes()),
          state_(layer_.state_bytes()),
          context_(layer_.context_bytes()),
          workspace_(layer_.workspace_bytes()),
          tokens_memory_(4 * shape.tokens * shape.width * static_cast<index_t>(sizeof(float))) {
        params_ = layer_.place_params(params_memory_.data());
        layer_.each_param(params_, [seed = std::uint64_t{7}](const std::string&, auto tensor) mutable {
            fill_normal(tensor, seed++, 0.03);
        });
        throw_if_refused(layer_.init_state(state_));
        auto* values = reinterpret_cast<float*>(tokens_memory_.data());
        for (auto* tensor : {&x_, &y_, &dy_, &dx_}) {
            *tensor = view<float, 2>(values, shape.tokens, shape.width);
            values += tensor->size();
        }
        fill_normal(x_, 1);
        fill_normal(dy_, 2);
    }

    /// One training forward of a new step.
    void forward() {
        TokenInfo<> tokens;
        tokens.step.step = step_++;
        throw_if_refused(layer_.forward(comm_, {.x = x_,
                                                .params = layer_.read_only_params(params_),
                                                .y = y_,
                                                .context = context_,
                                                .workspace = workspace_,
                                                .state = state_,
                                                .tokens = tokens}));
    }

    void backward() {
        throw_if_refused(layer_.backward({.x = x_,
                                          .params = layer_.read_only_params(params_),
                                          .dy = dy_,
                                          .dx = dx_,
                                          .grads = layer_.place_params(grads_memory_.data()),
                                          .context = context_,
                                          .workspace = workspace_}));
    }

private:
    Comm comm_;
    Layer layer_;
    Bytes params_memory_, grads_memory_, state_, context_, workspace_, tokens_memory_;
    typename Layer::Params params_;
    view<float, 2> x_, y_, dy_, dx_;
    std::int64_t step_ = 0;
};

/// Seconds of one iteration: construct before the timed loop, ask after it.
class Lap {
public:
    [[nodiscard]] double seconds(const benchmark::State& state) const {
        return (now() - start_) / static_cast<double>(state.iterations());
    }

private:
    double start_ = now();
};

/// Counter `ns_per_token`.
inline void report_tokens(benchmark::State& state, const Lap& lap, index_t tokens) {
    state.counters["ns_per_token"] = lap.seconds(state) * 1e9 / static_cast<double>(tokens);
}

}  // namespace steelyard_bench
