// Selection of experts, a warp a token: scores, choices, weights and probabilities from one reading of the logits.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/kernels/warp.cuh"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard::cuda {

/// A SelectionRule as kernels take it.
struct RuleOf {
    bool sigmoid, renormalized, top2;
    float scale;
    int top_k, groups, kept_groups;

    explicit RuleOf(const SelectionRule& rule)
        : sigmoid(rule.score == Score::sigmoid),
          renormalized(rule.weight == GateWeight::renormalized),
          top2(rule.group_score == GroupScore::top2_sum),
          scale(static_cast<float>(rule.scale)),
          top_k(rule.top_k),
          groups(rule.groups),
          kept_groups(rule.kept_groups) {}
};

struct SelectCall {
    RuleOf rule;
    index_t tokens;
    int experts;
    const float* bias;         // [E], or null
    const std::uint8_t* mask;  // [T], or null
    Matrix<float> logits, probs, weight;
    Matrix<expert_t> expert;
    unsigned long long* first_bad;  // the first token whose logits are not finite, or all ones
};

/// Ascending with the number; a NaN comes last of all that may be chosen, which are above 0.
__device__ inline std::uint32_t order_of(float value) {
    if (value != value) return 1;
    const std::uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float sigmoid_of(float z) {
    const float small = expf(-fabsf(z));
    return (z < 0.0f ? small : 1.0f) / (1.0f + small);
}
__device__ inline float log_sigmoid_of(float z) { return fminf(z, 0.0f) - log1pf(expf(-fabsf(z))); }

/// Takes the best keys of a warp, one after the other, ties to the lowest index; a key of 0 is no candidate. Lane l
/// holds entries l, l + 32, ...
template <int slots>
struct BestKeys {
    std::uint32_t key[slots];

    __device__ int take(int lane) {
        std::uint32_t own = 0;
#pragma unroll
        for (int s = 0; s < slots; ++s) own = max(own, key[s]);
        const std::uint32_t best = __reduce_max_sync(~0u, own);
        unsigned at = ~0u;
#pragma unroll
        for (int s = slots - 1; s >= 0; --s)
            if (key[s] == best) at = s * 32 + lane;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int s = 0; s < slots; ++s)
            if (at == s * 32 + lane) key[s] = 0;
        return static_cast<int>(at);
    }
};

/// Keys of experts outside the best groups become 0. Lane g ranks group g of at most 32; `value_of(e)` is what is
/// ranked.
template <int slots, class Value>
__device__ void keep_groups(const SelectCall& call, int lane, bool plain, Value&& value_of, BestKeys<slots>& keys) {
    const int members = call.experts / call.rule.groups;
    BestKeys<1> groups{{0}};
    if (lane < call.rule.groups) {
        float first = -INFINITY, second = -INFINITY;
        for (int j = 0; j < members; ++j) {
            const float v = value_of(lane * members + j), known = v == v ? v : -INFINITY;
            second = fmaxf(second, fminf(first, known));
            first = fmaxf(first, known);
        }
        float rank = first;
        if (call.rule.top2) {
            if (plain) {
                rank = first + second;
            } else {  // log(exp(a) + exp(b)) keeps the order of sums that underflow
                const float a = call.rule.sigmoid ? log_sigmoid_of(first) : first;
                const float b = call.rule.sigmoid ? log_sigmoid_of(second) : second;
                rank = a + log1pf(expf(b - a));
            }
        }
        groups.key[0] = max(order_of(rank), 1u);
    }
    std::uint32_t kept = 0;
    for (int g = 0; g < call.rule.kept_groups; ++g) kept |= 1u << groups.take(lane);
#pragma unroll
    for (int s = 0; s < slots; ++s) {
        const int e = s * 32 + lane;
        if (e < call.experts && (kept >> (e / members) & 1) == 0) keys.key[s] = 0;
    }
}

/// Combine weights of one token's choices, of which some may be -1. Lanes take choices in turn.
__device__ inline void weigh_token(const SelectCall& call, index_t t, int lane) {
    const RuleOf& rule = call.rule;
    const float* const z = &call.logits(t, 0);
    const auto log_score = [&](int e) { return rule.sigmoid ? log_sigmoid_of(z[e]) : z[e]; };
    float largest = -INFINITY, sum = 0.0f;
    if (rule.renormalized) {
        for (int k = lane; k < rule.top_k; k += 32)
            if (const int e = call.expert(t, k); e >= 0) largest = fmaxf(largest, log_score(e));
        largest = warp_max(largest);
        for (int k = lane; k < rule.top_k; k += 32)
            if (const int e = call.expert(t, k); e >= 0) sum += expf(log_score(e) - largest);
        sum = warp_sum(sum);
    }
    for (int k = lane; k < rule.top_k; k += 32) {
        const int e = call.expert(t, k);
        float weight = 0.0f;
        if (e >= 0 && rule.renormalized)
            weight = rule.scale * (expf(log_score(e) - largest) / sum);
        else if (e >= 0)
            weight = rule.scale * (rule.sigmoid ? sigmoid_of(z[e]) : call.probs(t, e));
        call.weight(t, k) = weight;
    }
}

/// Routes the tokens; with `choose` false it weighs choices that are there already.
template <int slots, bool choose>
__global__ void select_tokens(SelectCall call) {
    const int lane = threadIdx.x % 32;
    const index_t t = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (t >= call.tokens) return;
    if (call.mask != nullptr && call.mask[t] == 0) {
        for (int e = lane; e < call.experts; e += 32) call.probs(t, e) = 0.0f;
        for (int k = lane; k < call.rule.top_k; k += 32) call.expert(t, k) = -1, call.weight(t, k) = 0.0f;
        return;
    }
    float z[slots], score[slots];
    float largest = -INFINITY;
    bool finite = true;
#pragma unroll
    for (int s = 0; s < slots; ++s) {
        const int e = s * 32 + lane;
        z[s] = e < call.experts ? call.logits(t, e) : -INFINITY;
        finite = finite && (e >= call.experts || isfinite(z[s]));
        score[s] = e < call.experts && call.rule.sigmoid ? log_sigmoid_of(z[s]) : z[s];
        largest = fmaxf(largest, score[s]);
    }
    largest = warp_max(largest);
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < slots; ++s)
        if (s * 32 + lane < call.experts) sum += score[s] = expf(score[s] - largest);
    const float inverse = 1.0f / warp_sum(sum);
#pragma unroll
    for (int s = 0; s < slots; ++s)
        if (const int e = s * 32 + lane; e < call.experts) call.probs(t, e) = score[s] *= inverse;
    if (!__all_sync(~0u, finite) && lane == 0) atomicMin(call.first_bad, static_cast<unsigned long long>(t));
    if constexpr (choose) {
        const bool plain = call.bias != nullptr;
        BestKeys<slots> keys;
#pragma unroll
        for (int s = 0; s < slots; ++s) {
            const int e = s * 32 + lane;
            float value = z[s];
            if (plain && e < call.experts) value = (call.rule.sigmoid ? sigmoid_of(z[s]) : score[s]) + call.bias[e];
            keys.key[s] = e < call.experts ? order_of(value) : 0;
        }
        if (call.rule.kept_groups < call.rule.groups) {
            __syncwarp();  // probs of the other lanes
            keep_groups<slots>(
                call, lane, plain,
                [&](int e) {
                    const float logit = call.logits(t, e);
                    if (!plain) return logit;
                    return (call.rule.sigmoid ? sigmoid_of(logit) : call.probs(t, e)) + call.bias[e];
                },
                keys);
        }
        for (int k = 0; k < call.rule.top_k; ++k) {
            const int best = keys.take(lane);
            if (lane == k % 32) call.expert(t, k) = best;
        }
    }
    __syncwarp();
    weigh_token(call, t, lane);
}

/// What a token's gradient is made of: see cpu/router_token.hpp for the formulas.
struct SelectGradient {
    Matrix<float> weight, probs;  // either may be absent
    Matrix<float> logits;         // (+=)
};

__global__ void select_gradient(SelectCall call, SelectGradient grad) {
    const int lane = threadIdx.x % 32;
    const index_t t = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (t >= call.tokens) return;
    const RuleOf& rule = call.rule;
    float* const out = &grad.logits(t, 0);
    if (call.mask != nullptr && call.mask[t] == 0) {
        for (int e = lane; e < call.experts; e += 32) out[e] = 0.0f;
        return;
    }
    // Around the first chosen: the weights sum to `scale`, and where all dw are equal the gradient is exactly 0.
    float first = 0.0f, from_weights = 0.0f;
    const bool with_weights = grad.weight.data != nullptr, with_probs = grad.probs.data != nullptr;
    if (with_weights) {
        if (rule.renormalized)
            for (int k = rule.top_k - 1; k >= 0; --k)
                if (call.expert(t, k) >= 0) first = grad.weight(t, k);
        for (int k = lane; k < rule.top_k; k += 32)
            if (call.expert(t, k) >= 0) from_weights += call.weight(t, k) * (grad.weight(t, k) - first);
        from_weights = warp_sum(from_weights);
    }
    const bool weights_are_probs = !rule.renormalized && !rule.sigmoid;
    float mean = 0.0f;
    if (with_probs) {
        for (int e = lane; e < call.experts; e += 32) mean += call.probs(t, e) * grad.probs(t, e);
        mean = warp_sum(mean);
    }
    if (weights_are_probs) mean += from_weights;
    if (with_probs || (weights_are_probs && with_weights))
        for (int e = lane; e < call.experts; e += 32) {
            const float slope = call.probs(t, e) * ((with_probs ? grad.probs(t, e) : 0.0f) - mean);
            out[e] += rule.sigmoid ? slope * sigmoid_of(-call.logits(t, e)) : slope;
        }
    if (!with_weights) return;
    __syncwarp();
    const float centre = rule.renormalized ? first + from_weights / rule.scale : 0.0f;
    for (int k = lane; k < rule.top_k; k += 32) {
        const int e = call.expert(t, k);
        if (e >= 0)
            out[e] += call.weight(t, k) * (grad.weight(t, k) - centre) *
                      (rule.sigmoid ? sigmoid_of(-call.logits(t, e)) : 1.0f);
    }
}

}  // namespace steelyard::cuda
