// Rows between tokens and experts: dispatch, combine, and the gradient of its weights.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

/// `count` elements of T that are read and written together: 16 bytes, or one where rows do not allow more.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
    T of[count];
};
template <class T>
inline constexpr int whole_pack = static_cast<int>(16 / sizeof(T));

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

/// y[t] (= or +=) sum_k weight[t, k] rows[row[t, k]], in float. A thread for each pack of y; rows of up to four choices
/// are on their way at once.
template <class T, int pack>
__global__ void combine_rows(Matrix<const std::int32_t> row, int top_k, Matrix<const T> rows,
                             Matrix<const float> weight, index_t tokens, int width, Matrix<T> y, bool add) {
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int packs = width / pack;
    if (at >= tokens * packs) return;
    const index_t t = at / packs;
    const int column = static_cast<int>(at % packs) * pack;
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
        float factor[together];
#pragma unroll
        for (int i = 0; i < together; ++i) {
            const std::int32_t r = first + i < top_k ? row(t, first + i) : -1;
            factor[i] = r < 0 ? 0.0f : weight.data != nullptr ? weight(t, first + i) : 1.0f;
            // What a missing row would hold is nobody's: it must not meet a factor of 0.
            from[i] = r < 0 ? Pack<T, pack>{} : *reinterpret_cast<const Pack<T, pack>*>(&rows(r, column));
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
template <class T>
__global__ void combine_weight_gradient(Matrix<const std::int32_t> row, int top_k, Matrix<const T> rows,
                                        Matrix<const T> dy, index_t tokens, int width, Matrix<float> dweight) {
    const index_t at = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (at >= tokens * top_k) return;
    const index_t t = at / top_k, k = at % top_k;
    const std::int32_t r = row(t, k);
    if (r < 0) return;
    float sum = 0.0f;
    for (int j = threadIdx.x % 32; j < width; j += 32) sum += to_float(dy(t, j)) * to_float(rows(r, j));
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dweight(t, k) += sum;
}

}  // namespace steelyard::cuda
