// Rows of a router beside its selection: noise, biases, masks, sums over tokens.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/kernels/warp.cuh"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard::cuda {

/// to (=) from, times the jitter where there is any, and 0 in masked rows, which are not read. A thread takes four
/// columns, as one draw does.
template <class T>
__global__ void copy_input(Matrix<const T> from, const std::uint8_t* mask, RouterNoise noise, index_t tokens,
                           index_t width, Matrix<T> to) {
    const index_t blocks = (width + 3) / 4, at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= tokens * blocks) return;
    const index_t t = at / blocks, block = at % blocks;
    const bool valid = mask == nullptr || mask[t] != 0;
    float factor[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if (noise.jitter != 0.0) {
        const auto drawn =
            noise.jitter_factors(noise.jitter_stream(), noise.position(t), static_cast<std::uint64_t>(block), width);
#pragma unroll
        for (int i = 0; i < 4; ++i) factor[i] = static_cast<float>(drawn[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (const index_t j = 4 * block + i; j < width)
            to(t, j) = from_float<T>(valid ? to_float(from(t, j)) * factor[i] : 0.0f);
}

/// parts [T, 2 E] (=): each number as the sum of two bf16, the second of what the first leaves.
__global__ void split_gradient(Matrix<const float> dlogits, index_t tokens, index_t experts, Matrix<bf16> parts) {
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= tokens * experts) return;
    const index_t t = at / experts, e = at % experts;
    const float whole = dlogits(t, e);
    const bf16 high = from_float<bf16>(whole);
    parts(t, e) = high;
    parts(t, experts + e) = from_float<bf16>(whole - to_float(high));
}

/// dweight += both halves of sums [2 E, d], rounded once.
template <class T>
__global__ void add_halves(Matrix<const float> sums, index_t experts, index_t width, Matrix<T> dweight) {
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= experts * width) return;
    const index_t e = at / width, j = at % width;
    dweight(e, j) = from_float<T>(to_float(dweight(e, j)) + (sums(e, j) + sums(experts + e, j)));
}

/// dx += rows, times the jitter.
template <class T>
__global__ void add_input_gradient(Matrix<const T> rows, RouterNoise noise, index_t tokens, index_t width,
                                   Matrix<T> dx) {
    const index_t blocks = (width + 3) / 4, at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= tokens * blocks) return;
    const index_t t = at / blocks, block = at % blocks;
    const auto factor =
        noise.jitter_factors(noise.jitter_stream(), noise.position(t), static_cast<std::uint64_t>(block), width);
    for (index_t j = 4 * block; j < 4 * block + 4 && j < width; ++j)
        dx(t, j) = from_float<T>(to_float(dx(t, j)) + to_float(rows(t, j)) * static_cast<float>(factor[j % 4]));
}

/// logits (=) x weight^T: a warp for each token and expert. For few tokens, where a product of matrices takes longer to
/// begin than this to end.
template <class T, int pack>
__global__ void multiply_few(Matrix<const T> x, Matrix<const T> weight, index_t tokens, int experts, int width,
                             Matrix<float> logits) {
    const index_t at = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (at >= tokens * experts) return;
    const index_t t = at / experts, e = at % experts;
    float sum = 0.0f;
#pragma unroll 4
    for (int j = threadIdx.x % 32 * pack; j < width; j += 32 * pack) {
        const auto a = *reinterpret_cast<const Pack<T, pack>*>(&x(t, j));
        const auto b = *reinterpret_cast<const Pack<T, pack>*>(&weight(e, j));
#pragma unroll
        for (int i = 0; i < pack; ++i) sum = fmaf(to_float(a.of[i]), to_float(b.of[i]), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) logits(t, e) = sum;
}

/// logits += noise, four at a time.
__global__ void add_logit_noise(RouterNoise noise, index_t tokens, index_t experts, Matrix<float> logits) {
    const index_t blocks = (experts + 3) / 4, at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= tokens * blocks) return;
    const index_t t = at / blocks, block = at % blocks;
    const auto added =
        noise.logit_noise(noise.noise_stream(), noise.position(t), static_cast<std::uint64_t>(block), experts);
    for (index_t j = 4 * block; j < 4 * block + 4 && j < experts; ++j) logits(t, j) += static_cast<float>(added[j % 4]);
}

template <class T>
__global__ void add_expert_bias(const T* bias, index_t stride, index_t tokens, index_t experts, Matrix<float> logits) {
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < tokens * experts) logits(at / experts, at % experts) += to_float(bias[at % experts * stride]);
}

/// sums[e] (+=) over tokens, in double: a block for each column, 256 threads that take tokens in turn.
template <class T>
__global__ void add_sum_over_tokens(Matrix<const float> rows, index_t tokens, T* sums, index_t stride) {
    double own = 0.0;
    for (index_t t = threadIdx.x; t < tokens; t += blockDim.x) own += rows(t, blockIdx.x);
    const double sum = sum_of_block(own);
    if (threadIdx.x == 0) {
        T& place = sums[blockIdx.x * stride];
        place = from_float<T>(to_float(place) + static_cast<float>(sum));
    }
}

/// All experts for every valid token.
__global__ void take_all_experts(const std::uint8_t* mask, index_t tokens, index_t experts, Matrix<float> logits,
                                 Matrix<float> probs, Matrix<expert_t> expert, Matrix<float> weight) {
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= tokens * experts) return;
    const index_t t = at / experts, e = at % experts;
    const bool valid = mask == nullptr || mask[t] != 0;
    logits(t, e) = 0.0f;
    probs(t, e) = valid ? 1.0f / static_cast<float>(experts) : 0.0f;
    expert(t, e) = valid ? static_cast<expert_t>(e) : -1;
    weight(t, e) = valid ? 1.0f : 0.0f;
}

}  // namespace steelyard::cuda
