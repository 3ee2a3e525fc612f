// The counting sort of choices by expert, stable and without a word to the host: each block counts its choices, then
// each block adds up what it must know and places them. One block does both by itself.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/grouped_tiles.hpp"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

struct SortCall {
    static constexpr int threads = 256, warps = threads / 32;

    Matrix<const expert_t> choices;  // [T, K]
    int items = 0;                   // T K
    Divisor top_k;
    int experts = 0;
    int blocks = 0;
    int block_items = 0;             // a multiple of `threads`
    std::int32_t* counts = nullptr;  // [blocks, E]
    index_t* offsets = nullptr;      // [E + 1]
    std::int32_t* choice = nullptr;  // [N]
    Matrix<std::int32_t> row;        // [T, K]

    /// The expert of choice `item`, which ends where another's choices begin; -1 beyond.
    __device__ expert_t at(int item, int end) const {
        if (item >= end) return -1;
        return choices(top_k.quotient(item), top_k.remainder(item));
    }
    __device__ int begin(int block) const { return block * block_items; }
    __device__ int end(int block) const { return min(items, (block + 1) * block_items); }
};

/// counts [blocks, E] (=)
__global__ void count_choices(SortCall call) {
    extern __shared__ std::int32_t counted[];  // [E]
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x) counted[e] = 0;
    __syncthreads();
    const int end = call.end(blockIdx.x);
#pragma unroll 4
    for (int i = call.begin(blockIdx.x) + threadIdx.x; i < end; i += blockDim.x)
        if (const expert_t e = call.at(i, end); e >= 0) atomicAdd(&counted[e], 1);  // integers: exact in any order
    __syncthreads();
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x)
        call.counts[blockIdx.x * call.experts + e] = counted[e];
}

/// total [E] += the choices of each expert in all blocks, before [E] += those in the blocks before this one. Threads
/// share out experts, and blocks where there are threads to spare.
__device__ inline void add_up_counts(const SortCall& call, std::int32_t* total, std::int32_t* before) {
    const int thread = threadIdx.x, own_block = blockIdx.x, shares = max(1, SortCall::threads / call.experts);
    if (thread >= shares * call.experts) return;
    const int share = thread / call.experts;
    const int begin = share * call.blocks / shares, end = (share + 1) * call.blocks / shares;
    for (int e = thread % call.experts; e < call.experts; e += SortCall::threads) {
        std::int32_t all = 0, earlier = 0;
#pragma unroll 8
        for (int b = begin; b < end; ++b) {
            const std::int32_t count = call.counts[b * call.experts + e];
            all += count;
            earlier += b < own_block ? count : 0;
        }
        atomicAdd(&total[e], all);
        atomicAdd(&before[e], earlier);
    }
}

/// offsets, choice, row (=). A warp has a run of the block's choices: it counts them, learns where its rows of each
/// expert begin, and places them 32 at a time, of which those of lower lanes come first.
__global__ void place_choices(SortCall call) {
    extern __shared__ std::int32_t placing[];
    std::int32_t* const total = placing;                        // [E]  then where an expert's rows begin
    std::int32_t* const before = placing + call.experts;        // [E]
    std::int32_t* const next_of_warps = before + call.experts;  // [warps, E]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own_block = blockIdx.x;
    std::int32_t* const next = next_of_warps + warp * call.experts;
    for (int i = threadIdx.x; i < (SortCall::warps + 2) * call.experts; i += SortCall::threads) placing[i] = 0;
    __syncthreads();
    const int block_end = call.end(own_block), run = call.block_items / SortCall::warps;
    const int begin = min(block_end, call.begin(own_block) + warp * run), end = min(block_end, begin + run);
    for (int i = begin + lane; i < end; i += 32)
        if (const expert_t e = call.at(i, end); e >= 0) atomicAdd(&next[e], 1);
    if (call.blocks > 1) add_up_counts(call, total, before);
    __syncthreads();
    for (int e = threadIdx.x; e < call.experts; e += SortCall::threads) {
        std::int32_t sum = 0;
        for (int w = 0; w < SortCall::warps; ++w) {
            std::int32_t& of_warp = next_of_warps[w * call.experts + e];
            const std::int32_t own = of_warp;
            of_warp = sum;
            sum += own;
        }
        if (call.blocks == 1) total[e] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        const std::int32_t all = sums_before(total, call.experts);
        if (own_block == 0 && lane == 0) call.offsets[call.experts] = all;
    }
    __syncthreads();
    for (int e = lane; e < call.experts; e += 32) {
        if (own_block == 0 && warp == 0) call.offsets[e] = total[e];
        next[e] += total[e] + before[e];
    }
    __syncwarp();
    expert_t e = call.at(begin + lane, end);
    for (int i = begin; i < end; i += 32) {
        const int item = i + lane;
        const expert_t later = call.at(item + 32, end);  // on its way meanwhile
        const unsigned same = __match_any_sync(~0u, e);
        const int rank = __popc(same & ((1u << lane) - 1));
        std::int32_t place = -1;
        if (e >= 0) {
            place = next[e] + rank;
            call.choice[place] = item;
        }
        if (item < end) call.row(call.top_k.quotient(item), call.top_k.remainder(item)) = place;
        __syncwarp();
        if (e >= 0 && rank == 0) next[e] += __popc(same);
        __syncwarp();
        e = later;
    }
}

}  // namespace steelyard::cuda
