// The tally of a sample of tokens. Each decision of the draw depends on the one before.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/tally.cuh"

namespace steelyard::cuda {

/// load [E + 1] (=) the tally of the tokens that are drawn. One block of `SeenTokens::threads`: one thread decides,
/// random numbers and tally are everybody's.
template <class Value>
__global__ void tally_drawn(SeenTokens seen, TokenDraw draw, Value value_of, std::int64_t* load) {
    constexpr int threads = SeenTokens::threads, warps = threads / 32;
    extern __shared__ unsigned long long drawn_tallied[];  // [E + 1]
    __shared__ std::uint32_t number[threads];
    __shared__ bool take[threads];
    __shared__ int before_warp[warps + 1];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    for (int e = thread; e <= seen.experts; e += threads) drawn_tallied[e] = 0;
    std::int64_t taken = 0;  // of thread 0

    const auto draw_number = [&](std::int64_t position) {
        return draw.stream.words(static_cast<std::uint64_t>(position))[0];
    };
    // Decisions on `count` positions, whose numbers are there: Knuth's algorithm S.
    const auto decide = [&](std::int64_t position, int count) {
        __syncthreads();
        for (int i = 0; thread == 0 && i < count; ++i) {
            const auto left = static_cast<std::uint32_t>(draw.population - position - i);
            const auto below = static_cast<std::uint32_t>((std::uint64_t{number[i]} * left) >> 32);
            take[i] = static_cast<std::int64_t>(below) < draw.drawn - taken;
            taken += take[i] ? 1 : 0;
        }
        __syncthreads();
    };

    for (std::int64_t position = 0; position < draw.first; position += threads) {  // of ranks before this one
        const std::int64_t left = draw.first - position;
        const int count = left < threads ? static_cast<int>(left) : threads;
        if (thread < count) number[thread] = draw_number(position + thread);
        decide(position, count);
    }
    std::int64_t position = draw.first;
    for (index_t begin = 0; begin < seen.tokens; begin += threads) {
        const index_t t = begin + thread;
        const bool valid = t < seen.tokens && (seen.mask == nullptr || seen.mask[t] != 0);
        const unsigned of_warp = __ballot_sync(~0u, valid);
        if (lane == 0) before_warp[warp + 1] = __popc(of_warp);
        __syncthreads();
        if (thread == 0) {
            before_warp[0] = 0;
            for (int w = 0; w < warps; ++w) before_warp[w + 1] += before_warp[w];
        }
        __syncthreads();
        const int own = before_warp[warp] + __popc(of_warp & ((1u << lane) - 1)), count = before_warp[warps];
        if (valid) number[own] = draw_number(position + own);
        decide(position, count);
        if (valid && take[own] && seen.counts(t)) {
            value_of.each(seen, t, [&](int e, std::int64_t value) {
                atomicAdd(&drawn_tallied[e], static_cast<unsigned long long>(value));
            });
            atomicAdd(&drawn_tallied[seen.experts], 1ull);
        }
        position += count;
    }
    __syncthreads();
    for (int e = thread; e <= seen.experts; e += threads) load[e] = static_cast<std::int64_t>(drawn_tallied[e]);
}

}  // namespace steelyard::cuda
