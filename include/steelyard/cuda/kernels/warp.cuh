// What a warp does together, and conversions between element types.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "steelyard/core/bf16.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard::cuda {

template <class T>
__device__ float to_float(T value) {
    if constexpr (std::is_same_v<T, bf16>)
        return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
    else
        return value;
}
template <class T>
__device__ T from_float(float value) {
    if constexpr (std::is_same_v<T, bf16>) {
        bf16 rounded;
        rounded.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
        return rounded;
    } else {
        return value;
    }
}

/// A matrix as kernels take it.
template <class T>
struct Matrix {
    T* data = nullptr;
    index_t stride = 0;
    __device__ T& operator()(index_t row, index_t column) const { return data[row * stride + column]; }
};
template <class T>
Matrix<T> matrix_of(const view<T, 2, CudaSpace>& of) {
    return {of.data, of.strides[0]};
}

/// `count` elements of T that are read and written together: 16 bytes, or one where rows do not allow more.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
    T of[count];
};
template <class T>
inline constexpr int whole_pack = static_cast<int>(16 / sizeof(T));

// Each of these takes lanes in pairs that do not depend on the data: the same bits from run to run.

__device__ inline float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}
__device__ inline double warp_sum(double value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}
__device__ inline float warp_max(float value) {
    for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

/// values [n] become the sums of those before; returns the sum of all. By one warp.
__device__ inline std::int32_t sums_before(std::int32_t* values, int n) {
    const int lane = threadIdx.x % 32;
    std::int32_t before = 0;
    for (int begin = 0; begin < n; begin += 32) {
        const int i = begin + lane;
        const std::int32_t own = i < n ? values[i] : 0;
        std::int32_t sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const std::int32_t other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (i < n) values[i] = before + sum - own;
        before += __shfl_sync(~0u, sum, 31);
    }
    return before;
}

/// The sum of one number of each of 256 threads, in a fixed order; in thread 0.
template <class Number>
__device__ Number sum_of_block(Number value) {
    __shared__ Number sums[256];
    sums[threadIdx.x] = value;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

}  // namespace steelyard::cuda
