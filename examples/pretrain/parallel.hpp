// Threads: equal pieces of work whose borders don't depend on the number of threads.
#pragma once

#include "steelyard/cpu/parallel.hpp"

namespace pretrain {

using steelyard::index_t;
using steelyard::view;

/// Rows of a tile: the unit of work that one thread takes. Sums never cross a tile's border in an order that
/// depends on the threads, so results are bit-identical for any number of them (in memory that is aligned alike).
inline constexpr index_t tile_rows = 128;

constexpr index_t tiles_of(index_t count, index_t tile) { return (count + tile - 1) / tile; }

/// Calls `work(i)` for each i in [0, count).
template <class Work>
void parallel_for(int threads, index_t count, const Work& work) {
    steelyard::cpu::parallel_for(steelyard::Cpu{threads}, count, [&](index_t i, int) { work(i); });
}

/// Calls `work(begin, end)` for each tile of [0, count).
template <class Work>
void parallel_tiles(int threads, index_t count, index_t tile, const Work& work) {
    parallel_for(threads, tiles_of(count, tile), [&](index_t i) {
        const index_t begin = i * tile;
        work(begin, begin + tile < count ? begin + tile : count);
    });
}

}  // namespace pretrain
