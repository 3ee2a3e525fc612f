// Selection of experts, a warp a token: scores, choices, weights and probabilities from one reading of the logits.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/kernels/warp.cuh"
#include "steelyard/cuda/score_math.hpp"
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

/// Keys of experts outside the best groups become 0. Lane g ranks group g of at most 32; `row` [E] is this warp's, for
/// what is ranked.
template <int slots>
__device__ void keep_groups(const SelectCall& call, int lane, const float (&value)[slots], float* row,
                            BestKeys<slots>& keys) {
    const int members = call.experts / call.rule.groups;
#pragma unroll
    for (int s = 0; s < slots; ++s)
        if (const int e = s * 32 + lane; e < call.experts) row[e] = value[s];
    __syncwarp();
    BestKeys<1> groups{{0}};
    if (lane < call.rule.groups) {
        float first = -INFINITY, second = -INFINITY;
        for (int j = 0, at = lane % members; j < members; ++j) {  // each lane from elsewhere: they share no bank
            const float v = row[lane * members + at], known = v == v ? v : -INFINITY;
            second = fmaxf(second, fminf(first, known));
            first = fmaxf(first, known);
            at = at + 1 < members ? at + 1 : 0;
        }
        groups.key[0] =
            order_of(call.rule.top2 ? rank_of_pair(first, second, call.bias != nullptr, call.rule.sigmoid) : first);
    }
    std::uint32_t kept = 0;
    for (int g = 0; g < call.rule.kept_groups; ++g) kept |= 1u << groups.take(lane);
#pragma unroll
    for (int s = 0; s < slots; ++s) {
        const int e = s * 32 + lane;
        if (e < call.experts && (kept >> (e / members) & 1) == 0) keys.key[s] = 0;
    }
}

/// The sum of a token's scores in `score_lanes` lanes, each by ascending entry: of two lanes of this warp, one CPU
/// lane.
template <int slots>
__device__ float sum_scores(const float (&score)[slots], int lane) {
    const bool lower = lane < score_lanes;
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < slots; ++s) {
        const float other = __shfl_xor_sync(~0u, score[s], score_lanes);
        sum = (sum + (lower ? score[s] : other)) + (lower ? other : score[s]);
    }
#pragma unroll
    for (int half = score_lanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    return sum;
}

/// Combine weights of one token's choices, of which some may be -1. Lanes take choices in turn.
__device__ inline void weigh_token(const SelectCall& call, index_t t, int lane) {
    const RuleOf& rule = call.rule;
    const float* const z = &call.logits(t, 0);
    const int top_k = rule.top_k;
    if (!rule.renormalized) {
        for (int k = lane; k < top_k; k += 32) {
            const int e = call.expert(t, k);
            const float score = e < 0 ? 0.0f : rule.sigmoid ? sigmoid_score(z[e]) : call.probs(t, e);
            call.weight(t, k) = rule.scale * score;
        }
        return;
    }
    float most = -INFINITY;
    for (int k = lane; k < top_k; k += 32)
        if (const int e = call.expert(t, k); e >= 0) most = fmaxf(most, z[e]);
    most = warp_max(most);
    const float from = rule.sigmoid ? fminf(most, 0.0f) : most;
    const auto score_of = [&](int e) {
        if (e < 0) return 0.0f;
        return rule.sigmoid ? shifted_sigmoid(z[e], from) : exp_score(z[e] - from);
    };
    float sum = 0.0f;
    for (int begin = 0; begin < top_k; begin += 32) {  // by ascending k
        const int k = begin + lane;
        const float own = k < top_k ? score_of(call.expert(t, k)) : 0.0f;
        const int count = top_k - begin < 32 ? top_k - begin : 32;
        for (int i = 0; i < count; ++i) sum += __shfl_sync(~0u, own, i);
    }
    for (int k = lane; k < top_k; k += 32) {
        const int e = call.expert(t, k);
        call.weight(t, k) = e < 0 ? 0.0f : rule.scale * (score_of(e) / sum);
    }
}

/// Routes the tokens; with `choose` false it weighs choices that are there already. Shared memory: where there are
/// groups, [warps, E].
template <int slots, bool choose>
__global__ void select_tokens(SelectCall call) {
    extern __shared__ float ranked[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const index_t t = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + warp;
    if (t >= call.tokens) return;
    if (call.mask != nullptr && call.mask[t] == 0) {
        for (int e = lane; e < call.experts; e += 32) call.probs(t, e) = 0.0f;
        for (int k = lane; k < call.rule.top_k; k += 32) call.expert(t, k) = -1, call.weight(t, k) = 0.0f;
        return;
    }
    float z[slots], score[slots];
    float highest = -INFINITY;
    bool finite = true;
#pragma unroll
    for (int s = 0; s < slots; ++s) {
        const int e = s * 32 + lane;
        z[s] = e < call.experts ? call.logits(t, e) : -INFINITY;
        finite = finite && (e >= call.experts || isfinite(z[s]));
        highest = fmaxf(highest, z[s]);
    }
    highest = warp_max(highest);
    const float shift = call.rule.sigmoid ? fminf(highest, 0.0f) : highest;
#pragma unroll
    for (int s = 0; s < slots; ++s) {
        score[s] = call.rule.sigmoid ? shifted_sigmoid(z[s], shift) : exp_score(z[s] - shift);
        if (s * 32 + lane >= call.experts) score[s] = 0.0f;
    }
    const float inverse = 1.0f / sum_scores(score, lane);
#pragma unroll
    for (int s = 0; s < slots; ++s)
        if (const int e = s * 32 + lane; e < call.experts) call.probs(t, e) = score[s] * inverse;
    if (!__all_sync(~0u, finite) && lane == 0) atomicMin(call.first_bad, static_cast<unsigned long long>(t));
    if constexpr (choose) {
        if (call.bias != nullptr) {
            const float factor = call.rule.sigmoid ? exp_score(shift) : inverse;
#pragma unroll
            for (int s = 0; s < slots; ++s)
                if (const int e = s * 32 + lane; e < call.experts) z[s] = biased_score(score[s], factor, call.bias[e]);
        }
        BestKeys<slots> keys;
#pragma unroll
        for (int s = 0; s < slots; ++s) keys.key[s] = s * 32 + lane < call.experts ? order_of(z[s]) : 0;
        if (call.rule.kept_groups < call.rule.groups)
            keep_groups<slots>(call, lane, z, ranked + warp * call.experts, keys);
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
            out[e] += rule.sigmoid ? slope * sigmoid_score(-call.logits(t, e)) : slope;
        }
    if (!with_weights) return;
    __syncwarp();
    const float centre = rule.renormalized ? first + from_weights / rule.scale : 0.0f;
    for (int k = lane; k < rule.top_k; k += 32) {
        const int e = call.expert(t, k);
        if (e >= 0)
            out[e] += call.weight(t, k) * (grad.weight(t, k) - centre) *
                      (rule.sigmoid ? sigmoid_score(-call.logits(t, e)) : 1.0f);
    }
}

}  // namespace steelyard::cuda
