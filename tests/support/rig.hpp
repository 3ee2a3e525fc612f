// A layer with everything that a caller owns around it, for tests that call it directly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "steelyard/steelyard.hpp"

namespace steelyard::testing {

/// Uniform numbers in (-1, 1), a stream for each seed.
template <class T>
void fill_random(std::span<T> values, std::uint64_t seed) {
    const Philox random(seed, Stream::user);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(2 * random.uniform(i) - 1);
}

/// The tokens of one call.
template <class T>
struct Batch {
    index_t width = 0;
    std::vector<T> x, dy;             // [T, d]
    std::vector<std::uint8_t> mask;   // [T]      empty: all are valid
    std::vector<index_t> sequences;   // [S + 1]  empty: one sequence
    std::vector<std::int32_t> ids;    // [T]      empty: none
    std::vector<T> prior, dlogits;    // [T, E]   empty: none
    StepInfo step;

    Batch() = default;
    Batch(index_t tokens, index_t d, std::uint64_t seed, StepInfo at = {}, index_t outputs = 1)
        : width(d), x(static_cast<std::size_t>(tokens * d)), dy(x.size() * static_cast<std::size_t>(outputs)), step(at) {
        fill_random<T>(x, 2 * seed);
        fill_random<T>(dy, 2 * seed + 1);
    }

    [[nodiscard]] index_t tokens() const { return width == 0 ? 0 : static_cast<index_t>(x.size()) / width; }
    [[nodiscard]] bool valid(index_t t) const { return mask.empty() || mask[static_cast<std::size_t>(t)] != 0; }
    [[nodiscard]] view<const T, 2> of_experts(const std::vector<T>& values) const {
        if (values.empty()) return {};
        return {values.data(), tokens(), static_cast<index_t>(values.size()) / tokens()};
    }
    [[nodiscard]] TokenInfo<> info(Mode mode = Mode::train) const {
        TokenInfo<> tokens_info;
        if (!mask.empty()) tokens_info.mask = {mask.data(), static_cast<index_t>(mask.size())};
        if (!sequences.empty()) tokens_info.sequences = {sequences.data(), static_cast<index_t>(sequences.size())};
        if (!ids.empty()) tokens_info.ids = {ids.data(), static_cast<index_t>(ids.size())};
        tokens_info.step = step;
        tokens_info.mode = mode;
        return tokens_info;
    }
};

/// A layer, its four lifetimes of memory, and y and dx of the last call.
template <class LayerT>
class Rig {
public:
    using Layer = LayerT;
    using T = typename Layer::value_type;
    using Comm = typename Layer::Comm;

    explicit Rig(const typename Layer::Config& config, std::uint64_t seed = 7)
        : layer(config), param_memory(layer.param_bytes()), grad_memory(layer.param_bytes()),
          state(layer.state_bytes()), context(layer.context_bytes()), workspace(layer.workspace_bytes()),
          params(layer.place_params(param_memory.data())), grads(layer.place_params(grad_memory.data())),
          y(static_cast<std::size_t>(config.shape.tokens * config.shape.width * layer.outputs())),
          dx(static_cast<std::size_t>(config.shape.tokens * config.shape.width)) {
        std::uint64_t tensor = 0;
        layer.each_param(params, [&](const std::string&, auto weights) {
            fill_random<T>({weights.data, static_cast<std::size_t>(weights.size())}, 1000 * seed + tensor++);
        });
        (void)layer.init_state(state);
    }

    [[nodiscard]] typename Layer::ForwardArgs forward_args(const Batch<T>& batch, Mode mode = Mode::train) {
        return {.x = {batch.x.data(), batch.tokens(), batch.width},
                .params = layer.read_only_params(params),
                .y = {y.data(), batch.tokens(), layer.outputs() * batch.width},
                .context = context,
                .workspace = workspace,
                .state = state,
                .tokens = batch.info(mode),
                .prior = batch.of_experts(batch.prior)};
    }
    [[nodiscard]] typename Layer::BackwardArgs backward_args(const Batch<T>& batch) {
        return {.x = {batch.x.data(), batch.tokens(), batch.width},
                .params = layer.read_only_params(params),
                .dy = {batch.dy.data(), batch.tokens(), layer.outputs() * batch.width},
                .dx = {dx.data(), batch.tokens(), batch.width},
                .grads = grads,
                .context = context,
                .workspace = workspace,
                .prior = batch.of_experts(batch.prior),
                .dprior = prior_gradient(batch),
                .dlogits = batch.of_experts(batch.dlogits),
                .write_grads = write_grads};
    }

    Status forward(const Comm& comm, const Batch<T>& batch, Mode mode = Mode::train) {
        return layer.forward(comm, forward_args(batch, mode));
    }
    Status forward(const Batch<T>& batch, Mode mode = Mode::train) { return forward(Comm{}, batch, mode); }
    Status backward(const Batch<T>& batch) { return layer.backward(backward_args(batch)); }
    Status end_step(const Comm& comm, std::int64_t step) { return layer.end_step(comm, step, state, workspace); }
    Status end_step(std::int64_t step) { return end_step(Comm{}, step); }

    [[nodiscard]] double balance_loss() const { return layer.balance_loss(context); }
    [[nodiscard]] Routing<T> routing() const { return layer.routing(context); }
    [[nodiscard]] auto record() const { return layer.balance_record(context); }
    [[nodiscard]] auto balance_state() const { return layer.balance_state(state); }

    /// All parameters, or gradients, in one run; the gaps between tensors are 0.
    [[nodiscard]] std::span<T> param_values() const { return values(param_memory); }
    [[nodiscard]] std::span<T> grad_values() const { return values(grad_memory); }
    void clear_grads() { std::fill_n(grad_memory.data(), grad_memory.size(), std::byte{0}); }

    [[nodiscard]] std::vector<std::byte> state_bytes() const { return {state.data(), state.data() + state.size()}; }
    void restore(const std::vector<std::byte>& bytes) { std::copy(bytes.begin(), bytes.end(), state.data()); }

    /// <y, dy> + <logits, dlogits> over the valid tokens: the task's loss whose gradient by y is dy.
    [[nodiscard]] double task_loss(const Batch<T>& batch) const {
        double sum = 0;
        for (index_t t = 0; t < batch.tokens(); ++t)
            for (index_t j = 0, columns = layer.outputs() * batch.width; batch.valid(t) && j < columns; ++j) {
                const auto at = static_cast<std::size_t>(t * columns + j);
                sum += static_cast<double>(y[at]) * static_cast<double>(batch.dy[at]);
            }
        const auto dlogits = batch.of_experts(batch.dlogits);
        for (index_t t = 0; t < dlogits.extents[0]; ++t)
            for (index_t e = 0; batch.valid(t) && e < dlogits.extents[1]; ++e)
                sum += static_cast<double>(routing().logits(t, e)) * static_cast<double>(dlogits(t, e));
        return sum;
    }

    Layer layer;
    Bytes param_memory, grad_memory, state, context, workspace;
    typename Layer::Params params, grads;
    Write write_grads = Write::add;
    std::vector<T> y, dx;   // [T, d]
    std::vector<T> dprior;  // [T, E]  where the batch has a prior

private:
    view<T, 2> prior_gradient(const Batch<T>& batch) {
        dprior.assign(batch.prior.size(), T(0));
        if (dprior.empty()) return {};
        return {dprior.data(), batch.tokens(), static_cast<index_t>(dprior.size()) / batch.tokens()};
    }
    static std::span<T> values(const Bytes& block) {
        return {reinterpret_cast<T*>(block.data()), static_cast<std::size_t>(block.size()) / sizeof(T)};
    }
};

/// The largest |a - b| over the largest |b|; 0 for two empty or zero runs.
template <class T>
double relative_difference(std::span<const T> a, std::span<const T> b) {
    double difference = 0, scale = 0;
    for (std::size_t i = 0; i < b.size(); ++i) {
        const double one = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
        if (!(one <= difference)) difference = one;  // a NaN stays
        scale = std::max(scale, std::abs(static_cast<double>(b[i])));
    }
    return difference == 0 ? 0 : difference / scale;
}

template <class T>
bool same_bits(std::span<const T> a, std::span<const T> b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return same_bits(std::span<const T>(a), std::span<const T>(b));
}

}  // namespace steelyard::testing
