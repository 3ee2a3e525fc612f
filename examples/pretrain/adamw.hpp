// AdamW (Loshchilov and Hutter, 1711.05101), its learning rate, and the norm that clipping needs.
#pragma once

#include <cmath>
#include <cstdint>

#include "adamw_factors.hpp"
#include "linear.hpp"
#include "settings.hpp"

namespace pretrain {

/// Linear warm-up, then half a cosine down to a tenth of the peak.
[[nodiscard]] inline double learning_rate(const Settings& settings, std::int64_t step) {
    const std::int64_t warmup = settings.warmup_steps();
    if (step < warmup) return settings.learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup);
    const double done = static_cast<double>(step - warmup) / static_cast<double>(settings.steps - warmup);
    return settings.learning_rate * (0.55 + 0.45 * std::cos(3.14159265358979323846 * done));
}

/// With g = scale · gradient: m = β1 m + (1 − β1) g, v = β2 v + (1 − β2) g²,
/// p −= rate · (m̂ / (sqrt(v̂) + ε) + decay · p), where m̂ = m / (1 − β1^t) and v̂ = v / (1 − β2^t) for step t ≥ 1.
template <class T>
void adamw_update(const AdamWFactors<T>& by, index_t size, T* params, const T* gradient, T* first_moment,
                  T* second_moment) {
    const auto g = row(gradient, size) * by.scale;
    auto p = row(params, size);
    auto m = row(first_moment, size), v = row(second_moment, size);
    m = by.b1 * m + (T(1) - by.b1) * g;
    v = by.b2 * v + (T(1) - by.b2) * g.square();
    p = p * by.keep - by.to_m * m / ((by.to_v * v).sqrt() + by.epsilon);
}

template <class T>
double sum_of_squares(const T* data, index_t size) {
    return row(data, size).template cast<double>().square().sum();
}

}  // namespace pretrain
