// What stands between the matrices of a feed-forward expert, with its derivatives, in float.
#pragma once

#include "steelyard/ops/expert_ops.hpp"

namespace steelyard::cuda {

/// An FfnFunction as kernels take it.
struct FunctionOf {
    Activation activation = Activation::silu;
    bool clamped = false, gated = true;
    float limit = 0, alpha = 0, factor = 1;

    FunctionOf(const FfnFunction& function, bool with_gate)
        : activation(function.activation),
          clamped(function.clamped),
          gated(with_gate),
          limit(static_cast<float>(function.clamp.limit)),
          alpha(static_cast<float>(function.clamp.alpha)),
          factor(static_cast<float>(function.factor)) {}
};

/// a, and its derivatives by the pre-activations.
struct FunctionPoint {
    float a = 0, by_gate = 0, by_up = 0;
};

/// act(u) and act'(u).
struct ActivationPoint {
    float value = 0, slope = 0;
};

__device__ inline ActivationPoint activate(Activation activation, float u) {
    constexpr float half_root = 0.70710678118654752f, density = 0.39894228040143268f, tanh_scale = 0.79788456080286536f;
    switch (activation) {
        case Activation::relu:
            return {fmaxf(u, 0.0f), u > 0.0f ? 1.0f : 0.0f};
        case Activation::relu2: {
            const float kept = fmaxf(u, 0.0f);
            return {kept * kept, 2.0f * kept};
        }
        case Activation::gelu: {
            const float below = 0.5f * erfcf(-u * half_root);
            return {u * below, below + u * density * expf(-0.5f * u * u)};
        }
        case Activation::gelu_tanh: {
            const float t = tanhf(tanh_scale * (u + 0.044715f * u * u * u));
            return {0.5f * u * (1.0f + t),
                    0.5f * (1.0f + t) + 0.5f * u * (1.0f - t * t) * tanh_scale * (1.0f + 3.0f * 0.044715f * u * u)};
        }
        case Activation::silu: {
            const float s = 1.0f / (1.0f + expf(-u));
            return {u * s, s * (1.0f + u * (1.0f - s))};
        }
        case Activation::identity:
            break;
    }
    return {u, 1.0f};
}

/// SiLU alone, which nearly all models have, by the GPU's own exponential and reciprocal: their error is far below
/// bf16's. Far below zero the one is infinite, and the other 0.
__device__ inline ActivationPoint silu_fast(float u) {
    float power, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(u * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + power));
    const float value = u * s;
    return {value, fmaf(value, 1.0f - s, s)};
}

/// a(gate, up) and its derivatives; without a gate, of `up` alone.
__device__ inline FunctionPoint point_of(const FunctionOf& f, float gate, float up) {
    if (f.clamped) {
        const float g = fminf(gate, f.limit), u = fminf(fmaxf(up, -f.limit), f.limit);
        const float s = 1.0f / (1.0f + expf(-f.alpha * g));
        const float by_g = (u + 1.0f) * s * (1.0f + f.alpha * g * (1.0f - s));
        return {(u + 1.0f) * g * s, gate <= f.limit ? by_g : 0.0f, fabsf(up) <= f.limit ? g * s : 0.0f};
    }
    if (f.gated) {
        const ActivationPoint of_gate = activate(f.activation, gate);
        return {of_gate.value * up, of_gate.slope * up, of_gate.value};
    }
    const ActivationPoint of_up = activate(f.activation, up);
    return {f.factor * of_up.value, 0.0f, f.factor * of_up.slope};
}

/// The same, where the function is known to be SwiGLU's.
__device__ inline FunctionPoint swiglu_point(float gate, float up) {
    const ActivationPoint of_gate = silu_fast(gate);
    return {of_gate.value * up, of_gate.slope * up, of_gate.value};
}

}  // namespace steelyard::cuda
