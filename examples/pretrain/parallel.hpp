// Threads: equal pieces of work whose borders don't depend on the number of threads.
#pragma once

#include <algorithm>

#include "memory.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/parallel.hpp"

namespace pretrain {

using steelyard::index_t;
using steelyard::view;

/// Rows of a tile: the unit of work that one thread takes. Sums never cross a tile's border in an order that
/// depends on the threads, so results are bit-identical for any number of them (in memory that is aligned alike).
inline constexpr index_t tile_rows = 128;

constexpr index_t tiles_of(index_t count, index_t tile) { return (count + tile - 1) / tile; }

/// The threads of one rank, with the scratch memory that matrix products need on each: the CPU as a model's device.
///
/// A device of a model names its memory, and every operation of the model is a function on it: on the CPU those of
/// attention.hpp, rms_norm.hpp, ... and host.hpp, on a GPU those of cuda/gpu_ops.hpp.
class Threads {
public:
    using space = steelyard::HostSpace;
    using Memory = Bytes;      ///< what the device computes in
    using HostMemory = Bytes;  ///< what both the device and the program reach

    explicit Threads(int count) : device_{count}, scratch_(count * bytes_each) {}

    /// Calls `work(i, scratch)` for each i in [0, count).
    template <class Work>
    void each(index_t count, const Work& work) const {
        steelyard::cpu::parallel_for(device_, count,
                                     [&](index_t i, int thread) { work(i, scratch_.data() + thread * bytes_each); });
    }

    /// Calls `work(begin, end, scratch)` for each tile of [0, count).
    template <class Work>
    void tiles(index_t count, index_t tile, const Work& work) const {
        each(tiles_of(count, tile), [&](index_t i, std::byte* scratch) {
            const index_t begin = i * tile;
            work(begin, begin + tile < count ? begin + tile : count, scratch);
        });
    }

private:
    static constexpr index_t bytes_each =
        std::max(steelyard::cpu::gemm_scratch_bytes<float>(), steelyard::cpu::gemm_scratch_bytes<double>());
    steelyard::Cpu device_;
    Bytes scratch_;
};

}  // namespace pretrain
