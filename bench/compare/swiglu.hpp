// silu(g) * u and its gradient, for peers that have only matrix products. Plain loops that compilers vectorise.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../shape.hpp"

namespace steelyard_bench {

/// exp(x) to about 2e-7, for |x| < 87 and clamped beyond.
inline float fast_exp(float x) {
    x = std::min(87.0f, std::max(-87.0f, x));
    const float shifted = x * 1.44269504f + 12582912.0f;  // the low bits hold the rounded power of two
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 5040;
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + c;
    return series * std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23) + (127u << 23));
}

/// inner = silu(gate) * up
inline void swiglu(index_t count, const float* gate, const float* up, float* inner) {
#pragma GCC ivdep
    for (index_t i = 0; i < count; ++i) inner[i] = gate[i] * up[i] / (1.0f + fast_exp(-gate[i]));
}

/// One row's gradients from that of the unweighted inner (dinner) and the combine weight w; returns <dinner, inner>.
///
///     inner = w silu(g) u,  dgate = w dinner u silu'(g),  dup = w dinner silu(g)
inline float swiglu_backward(index_t count, float w, const float* gate, const float* up, const float* dinner,
                             float* dgate, float* dup, float* inner) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (index_t i = 0; i < count; ++i) {
        const float s = 1.0f / (1.0f + fast_exp(-gate[i])), silu = gate[i] * s, a = silu * up[i], d = dinner[i];
        dot += d * a;
        inner[i] = w * a;
        dup[i] = w * d * silu;
        dgate[i] = w * d * up[i] * (s + silu * (1.0f - s));
    }
    return dot;
}

}  // namespace steelyard_bench
