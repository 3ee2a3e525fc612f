// AdamW over every tensor of a model, with its gradient's norm clipped.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/tensor.hpp"
#include "pretrain/adamw.hpp"

namespace example {

/// Steps a model, which lists its tensors: model.each_param(visit) calls visit(name, weights, gradient).
template <class T>
class Optimizer {
public:
    double weight_decay = 0.05;
    double clip = 1.0;  ///< largest norm of the whole gradient

    /// `model` must live as long as this.
    template <class Model>
    explicit Optimizer(Model& model) {
        model.each_param([&]<int Rank>(const auto&, view<T, Rank> weights, view<T, Rank> gradient) {
            if (weights.size() > 0) parts_.push_back({weights.data, gradient.data, weights.size(), Rank > 1});
        });
        index_t size = 0;
        for (const Part& part : parts_) size += part.size;
        first_.resize(static_cast<std::size_t>(size));
        second_.resize(static_cast<std::size_t>(size));
    }

    /// Moves the weights by their gradients and sets these to 0.
    void step(double rate) {
        double squares = 0;
        for (const Part& part : parts_) squares += pretrain::sum_of_squares<T>(part.gradient, part.size);
        const double norm = std::sqrt(squares), scale = norm > clip ? clip / norm : 1.0;
        ++steps_;
        std::size_t at = 0;
        for (const Part& part : parts_) {
            pretrain::adamw_update<T>({{}, steps_, rate, part.decays ? weight_decay : 0.0, scale}, part.size,
                                      part.weights, part.gradient, &first_[at], &second_[at]);
            std::fill_n(part.gradient, part.size, T(0));
            at += static_cast<std::size_t>(part.size);
        }
    }

private:
    struct Part {
        T *weights, *gradient;
        index_t size;
        bool decays;  // matrices do, biases and gains do not
    };
    std::vector<Part> parts_;
    std::vector<T> first_, second_;
    std::int64_t steps_ = 0;
};

/// Linear warm-up over a twentieth of the steps, then half a cosine down to 0.
[[nodiscard]] inline double cosine_rate(double peak, std::int64_t step, std::int64_t steps) {
    const std::int64_t warmup = std::max<std::int64_t>(1, steps / 20);
    if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
    const std::int64_t rest = std::max<std::int64_t>(1, steps - warmup);
    const double done = static_cast<double>(step - warmup) / static_cast<double>(rest);
    return peak * 0.5 * (1.0 + std::cos(3.14159265358979323846 * done));
}

/// The weights of one model, copied to another of the same tensors.
template <class From, class To>
void copy_weights(From& from, To& to) {
    std::vector<const void*> sources;
    from.each_param([&](const auto&, auto weights, auto) { sources.push_back(weights.data); });
    std::size_t at = 0;
    to.each_param([&](const auto&, auto weights, auto) {
        using T = typename decltype(weights)::value_type;
        std::copy_n(static_cast<const T*>(sources[at++]), weights.size(), weights.data);
    });
}

/// 0 .. count - 1 in a random order that depends on the seed and the epoch alone (Fisher and Yates).
[[nodiscard]] inline std::vector<index_t> shuffled(index_t count, std::uint64_t seed, std::uint64_t epoch) {
    std::vector<index_t> order(static_cast<std::size_t>(count));
    for (index_t i = 0; i < count; ++i) order[static_cast<std::size_t>(i)] = i;
    const steelyard::Philox random(seed, steelyard::Stream::data, epoch);
    for (std::size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[random.below(i, static_cast<std::uint32_t>(i))]);
    return order;
}

}  // namespace example
