// Rows between tokens and experts: dispatch, combine, and the gradient of its weights.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

/// rows[r] (=) x[choice[r] / K] for every row of the plan. A warp for each row.
template <class T, int pack>
__global__ void dispatch_rows(const index_t* offsets, int experts, const std::int32_t* choice, int top_k,
                              Matrix<const T> x, int width, Matrix<T> rows) {
    const index_t row = offsets[0] + static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= offsets[experts]) return;
    const index_t token = choice[row] / top_k;
    for (int j = threadIdx.x % 32 * pack; j < width; j += 32 * pack)
        *reinterpret_cast<Pack<T, pack>*>(&rows(row, j)) = *reinterpret_cast<const Pack<T, pack>*>(&x(token, j));
}

inline constexpr int combine_threads = 256;

/// y[t] (= or +=) sum_k weight[t, k] rows[row[t, k]], in float. A thread for each pack of y; rows of up to four choices
/// are on their way at once. Blocks: x counts tokens, or several at a time where a row is short, y columns.
template <class T, int pack>
__global__ void combine_rows(Matrix<const std::int32_t> row, int top_k, Matrix<const T> rows,
                             Matrix<const float> weight, index_t tokens, int width, Matrix<T> y, bool add) {
    const int packs = width / pack, across = min(packs, combine_threads), together_tokens = combine_threads / across;
    const int own = static_cast<int>(threadIdx.x) / across, thread = static_cast<int>(threadIdx.x) % across;
    const index_t t = static_cast<index_t>(blockIdx.x) * together_tokens + own;
    const int at = static_cast<int>(blockIdx.y) * across + thread, column = at * pack;
    if (own >= together_tokens || t >= tokens || at >= packs) return;
    auto* const out = reinterpret_cast<Pack<T, pack>*>(&y(t, column));
    float sum[pack] = {};
    if (add) {
        const Pack<T, pack> held = *out;
#pragma unroll
        for (int i = 0; i < pack; ++i) sum[i] = to_float(held.of[i]);
    }
    constexpr int together = 4;
    for (int first = 0; first < top_k; first += together) {
        Pack<T, pack> from[together];
        std::int32_t at_row[together];
        float factor[together];
        // Without branches, so that all are on their way before the first is waited for.
#pragma unroll
        for (int i = 0; i < together; ++i) at_row[i] = row(t, min(first + i, top_k - 1));
#pragma unroll
        for (int i = 0; i < together; ++i)
            factor[i] = weight.data != nullptr ? weight(t, min(first + i, top_k - 1)) : 1.0f;
#pragma unroll
        for (int i = 0; i < together; ++i)
            from[i] = *reinterpret_cast<const Pack<T, pack>*>(&rows(max(at_row[i], 0), column));
#pragma unroll
        for (int i = 0; i < together; ++i)
            if (first + i >= top_k || at_row[i] < 0) {
                // What a missing row would hold is nobody's: it must not meet a factor of 0.
                from[i] = Pack<T, pack>{};
                factor[i] = 0.0f;
            }
#pragma unroll
        for (int i = 0; i < together; ++i)
#pragma unroll
            for (int j = 0; j < pack; ++j) sum[j] = fmaf(factor[i], to_float(from[i].of[j]), sum[j]);
    }
    Pack<T, pack> result;
#pragma unroll
    for (int i = 0; i < pack; ++i) result.of[i] = from_float<T>(sum[i]);
    *out = result;
}

/// dweight[t, k] += <dy[t], rows[row[t, k]]>. A warp for each choice.
template <class T, int pack>
__global__ void combine_weight_gradient(Matrix<const std::int32_t> row, int top_k, Matrix<const T> rows,
                                        Matrix<const T> dy, index_t tokens, int width, Matrix<float> dweight) {
    const index_t at = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (at >= tokens * top_k) return;
    const index_t t = at / top_k, k = at % top_k;
    const std::int32_t r = row(t, k);
    if (r < 0) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int j = static_cast<int>(threadIdx.x) % 32 * pack; j < width; j += 32 * pack) {
        const auto left = *reinterpret_cast<const Pack<T, pack>*>(&dy(t, j));
        const auto right = *reinterpret_cast<const Pack<T, pack>*>(&rows(r, j));
#pragma unroll
        for (int i = 0; i < pack; ++i) sum = fmaf(to_float(left.of[i]), to_float(right.of[i]), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dweight(t, k) += sum;
}

}  // namespace steelyard::cuda
