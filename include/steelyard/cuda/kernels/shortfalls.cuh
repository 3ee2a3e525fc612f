// What each expert lacks to be chosen, as histograms: for quantile balancing.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/tally.cuh"
#include "steelyard/cuda/score_math.hpp"

namespace steelyard::cuda {

/// A `Shortfalls` as kernels take it.
struct ShortfallCall {
    static constexpr int bins_at_once = 8192;  // of a block, in shared memory

    SeenTokens seen;
    bool sigmoid;
    int bins;
    const float* bias;  // [E]  on the GPU
    double* cutoff;     // [T]  what an expert must pass to be chosen; -infinity: the token is left out

    __device__ double score(index_t t, int e) const {
        return static_cast<double>(sigmoid ? sigmoid_score(seen.logits(t, e)) : seen.probs(t, e));
    }
};

/// cutoff [T] (=): the largest s + bias among the experts that were not chosen. A warp for each token.
__global__ void find_cutoffs(ShortfallCall call) {
    const SeenTokens& seen = call.seen;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const index_t t = (static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (t >= seen.tokens) return;
    double cutoff = -INFINITY;
    for (int e = lane; e < seen.experts && seen.counts(t); e += 32) {
        bool chosen = false;
        for (int k = 0; k < seen.top_k; ++k) chosen = chosen || seen.expert(t, k) == e;
        if (!chosen) cutoff = fmax(cutoff, call.score(t, e) + static_cast<double>(call.bias[e]));
    }
    for (int step = 16; step > 0; step /= 2) cutoff = fmax(cutoff, __shfl_xor_sync(~0u, cutoff, step));
    if (lane == 0) call.cutoff[t] = isfinite(cutoff) ? cutoff : -INFINITY;
}

/// load [rows, E bins + 1] (=): the histogram of expert blockIdx.y over segment blockIdx.x; behind the last expert's,
/// the number of choices.
__global__ void tally_shortfalls(ShortfallCall call, std::int64_t* load, index_t stride) {
    __shared__ unsigned counts[ShortfallCall::bins_at_once];  // below 2^32 tokens
    __shared__ double lowest, width;
    const SeenTokens& seen = call.seen;
    const int e = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
    const index_t begin = seen.by_segment ? seen.begin(blockIdx.x) : 0;
    const index_t end = seen.by_segment ? seen.end(blockIdx.x) : seen.tokens;
    std::int64_t* const row = load + blockIdx.x * stride;
    if (e == seen.experts) {
        int choices = 0;
        for (index_t t = begin + thread; t < end; t += blockDim.x)
            for (int k = 0; k < seen.top_k && call.cutoff[t] != -INFINITY; ++k)
                choices += seen.expert(t, k) >= 0 ? 1 : 0;
        const int sum = sum_of_block(choices);
        if (thread == 0) row[static_cast<index_t>(e) * call.bins] = sum;
        return;
    }
    if (thread == 0) {
        const ShortfallBins bins(view<const float, 1>(call.bias, seen.experts), call.bins);
        lowest = bins.lowest, width = bins.width;
    }
    for (int first = 0; first < call.bins; first += ShortfallCall::bins_at_once) {
        const int here = min(ShortfallCall::bins_at_once, call.bins - first);
        for (int b = thread; b < here; b += static_cast<int>(blockDim.x)) counts[b] = 0;
        __syncthreads();
        ShortfallBins bins;
        bins.lowest = lowest, bins.width = width, bins.count = call.bins;
        for (index_t t = begin + thread; t < end; t += blockDim.x) {
            const double cutoff = call.cutoff[t];
            if (cutoff == -INFINITY) continue;
            const auto bin = static_cast<int>(bins.bin(cutoff - call.score(t, e))) - first;
            if (bin >= 0 && bin < here) atomicAdd(&counts[bin], 1u);
        }
        __syncthreads();
        for (int b = thread; b < here; b += static_cast<int>(blockDim.x))
            row[static_cast<index_t>(e) * call.bins + first + b] = counts[b];
        __syncthreads();
    }
}

}  // namespace steelyard::cuda
