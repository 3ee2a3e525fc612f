// A layer with memory and made-up data, ready to be timed.
#pragma once

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdint>
#include <utility>

#include "limits.hpp"
#include "steelyard/steelyard.hpp"

namespace steelyard_bench {

using namespace steelyard;

/// Tokens, widths and experts of one measured layer.
struct Shape {
    const char* name;
    index_t tokens, width, hidden, experts;
    int top_k;

    [[nodiscard]] double forward_flops() const {  // three products of a SwiGLU for each routed row
        return 6.0 * static_cast<double>(tokens * top_k) * static_cast<double>(width * hidden);
    }
};

/// The shapes of the published comparisons that fit this kind of machine.
inline constexpr Shape shape_a{"A", 4096, 512, 1408, 64, 4};
inline constexpr Shape shape_b{"B", 2048, 1024, 2816, 8, 2};

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Standard normal values, the same in every run.
template <class V>
void fill_normal(const V& tensor, std::uint64_t seed, double scale = 1.0) {
    const Philox random(seed, Stream::user);
    for (index_t i = 0; i < tensor.size(); ++i)
        tensor.data[i] = static_cast<typename V::value_type>(scale * random.normal(static_cast<std::uint64_t>(i)));
}

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
          params_memory_(layer_.param_bytes()), grads_memory_(layer_.param_bytes()), state_(layer_.state_bytes()),
          context_(layer_.context_bytes()), workspace_(layer_.workspace_bytes()),
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

    [[nodiscard]] const Layer& layer() const { return layer_; }
    [[nodiscard]] std::span<std::byte> context() const { return context_; }
    [[nodiscard]] std::span<std::byte> state() const { return state_; }
    [[nodiscard]] view<const float, 2> x() const { return x_; }
    [[nodiscard]] view<const float, 2> dy() const { return dy_; }
    [[nodiscard]] const typename Layer::Params& params() const { return params_; }

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

/// Counters `GFLOP/s` and `of_fma_peak`: the rate, and its share of the multiply-add peak of the threads used.
inline void report_flops(benchmark::State& state, const Lap& lap, double flops, int threads) {
    const double rate = flops * 1e-9 / lap.seconds(state);
    state.counters["GFLOP/s"] = rate;
    state.counters["of_fma_peak"] = rate / (limits().fma_gflops_float * threads);
}

/// Counters `GB/s` and `of_copy`: bytes read and written, and their share of memcpy's rate.
inline void report_bytes(benchmark::State& state, const Lap& lap, double bytes) {
    const double rate = bytes * 1e-9 / lap.seconds(state);
    state.counters["GB/s"] = rate;
    state.counters["of_copy"] = rate / limits().copy_gbytes;
}

/// Counter `ns_per_token`.
inline void report_tokens(benchmark::State& state, const Lap& lap, index_t tokens) {
    state.counters["ns_per_token"] = lap.seconds(state) * 1e9 / static_cast<double>(tokens);
}

}  // namespace steelyard_bench
