// The counting sort of choices by expert: each block counts its tokens' choices, one block adds up, each block places
// them.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

struct SortCall {
    static constexpr int threads = 256, warps = threads / 32;

    Matrix<const expert_t> choices;  // [T, K]
    int items = 0;                   // T K
    int top_k = 1;
    int experts = 0;
    int blocks = 0;
    int block_items = 0;   // a multiple of `threads`, but for the last block
    std::int32_t* counts;  // [blocks, E]  of each block; then where its rows of each expert begin
    index_t* offsets;      // [E + 1]
    std::int32_t* choice;  // [N]
    std::int32_t* row;     // [T, K]
    index_t row_stride = 0;

    __device__ expert_t at(int item) const { return choices(item / top_k, item % top_k); }
    __device__ int begin(int block) const { return block * block_items; }
    __device__ int end(int block) const { return min(items, (block + 1) * block_items); }
};

/// counts [blocks, E] (=)
__global__ void count_choices(SortCall call) {
    extern __shared__ std::int32_t counted[];  // [E]
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x) counted[e] = 0;
    __syncthreads();
    for (int i = call.begin(blockIdx.x) + threadIdx.x; i < call.end(blockIdx.x); i += blockDim.x)
        if (const expert_t e = call.at(i); e >= 0) atomicAdd(&counted[e], 1);  // integers: exact in any order
    __syncthreads();
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x)
        call.counts[blockIdx.x * call.experts + e] = counted[e];
}

/// offsets (=), and counts become where each block's rows begin. One block.
__global__ void add_up_counts(SortCall call) {
    extern __shared__ std::int32_t totals[];  // [E + 1]
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x) {
        std::int32_t sum = 0;
#pragma unroll 8
        for (int b = 0; b < call.blocks; ++b) {
            std::int32_t& count = call.counts[b * call.experts + e];
            const std::int32_t own = count;
            count = sum;
            sum += own;
        }
        totals[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        std::int32_t before = 0;
        for (int begin = 0; begin < call.experts; begin += 32) {
            const int e = begin + lane;
            const std::int32_t own = e < call.experts ? totals[e] : 0;
            std::int32_t sum = own;
            for (int step = 1; step < 32; step *= 2) {
                const std::int32_t other = __shfl_up_sync(~0u, sum, step);
                if (lane >= step) sum += other;
            }
            if (e < call.experts) totals[e] = before + sum - own;
            before += __shfl_sync(~0u, sum, 31);
        }
        if (lane == 0) totals[call.experts] = before;
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= call.experts; e += blockDim.x) call.offsets[e] = totals[e];
    for (int i = threadIdx.x; i < call.blocks * call.experts; i += blockDim.x)
        call.counts[i] += totals[i % call.experts];
}

/// choice, row (=). Warps take 32 choices each in turn; within a round, those of lower warps and lanes come first.
__global__ void place_choices(SortCall call) {
    extern __shared__ std::int32_t shared[];
    std::int32_t* const next = shared;                    // [E]        the block's next row of each expert
    std::int32_t* const of_warp = shared + call.experts;  // [warps, E] in this round
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x) next[e] = call.counts[blockIdx.x * call.experts + e];
    for (int i = threadIdx.x; i < SortCall::warps * call.experts; i += blockDim.x) of_warp[i] = 0;
    __syncthreads();
    for (int begin = call.begin(blockIdx.x); begin < call.end(blockIdx.x); begin += SortCall::threads) {
        const int item = begin + threadIdx.x;
        const expert_t e = item < call.end(blockIdx.x) ? call.at(item) : -1;
        const unsigned same = __match_any_sync(~0u, e);
        const int before = __popc(same & ((1u << lane) - 1));
        if (e >= 0 && before == 0) of_warp[warp * call.experts + e] = __popc(same);
        __syncthreads();
        if (item < call.end(blockIdx.x)) {
            std::int32_t place = -1;
            if (e >= 0) {
                place = next[e] + before;
                for (int w = 0; w < warp; ++w) place += of_warp[w * call.experts + e];
                call.choice[place] = item;
            }
            call.row[item / call.top_k * call.row_stride + item % call.top_k] = place;
        }
        __syncthreads();
        // Whoever was the last of its expert in this round moves the block's next row, and clears what its warp
        // counted.
        int total = 0;
        if (e >= 0 && before == 0) {
            bool last = true;
            for (int w = 0; w < SortCall::warps; ++w) {
                const int count = of_warp[w * call.experts + e];
                total += count;
                if (w > warp && count > 0) last = false;
            }
            if (!last) total = 0;
        }
        __syncthreads();
        if (e >= 0 && before == 0) {
            of_warp[warp * call.experts + e] = 0;
            if (total > 0) next[e] += total;
        }
        __syncthreads();
    }
}

}  // namespace steelyard::cuda
