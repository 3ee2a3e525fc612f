// A grouped product as its kernel is told of it: what is multiplied, in which tiles, and where these lie in shared
// memory.
#pragma once

#include <cstdint>

#include "steelyard/core/bf16.hpp"
#include "steelyard/cuda/grouped_tiles.hpp"
#include "steelyard/cuda/kernels/hopper.cuh"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

/// How an operand of a grouped product reaches shared memory, for each expert. "Turned": k runs over the matrix's rows,
/// m or n along them.
enum class Bring {
    weights,          ///< b: a weight [E, n, k]
    weights_turned,   ///< b: a weight [E, k, n]
    rows,             ///< a: grouped rows [N, k]
    rows_turned,      ///< b: grouped rows, summed over
    gathered,         ///< a: rows of tokens, [T, k] through the plan
    gathered_turned,  ///< a: rows of tokens, summed over
};

constexpr bool is_turned(Bring bring) {
    return bring == Bring::weights_turned || bring == Bring::rows_turned || bring == Bring::gathered_turned;
}
constexpr bool is_gathered(Bring bring) { return bring == Bring::gathered || bring == Bring::gathered_turned; }

/// Tensors that the copy engine reads and writes; two of a kind are gate and up. `extra` is what the finish reads,
/// `out` what it writes.
struct ProductMaps {
    hopper::TensorMap a[2], b[2], extra[2], out[3];
};

struct GroupedProduct {
    const index_t* offsets = nullptr;  // [E + 1]
    int experts = 0;
    TileCount tiles;
    const std::int32_t* choice = nullptr;  // [N]
    Divisor top_k;
    const bf16* tokens = nullptr;  // what is gathered, [T, width]
    index_t token_stride = 0;
    int token_width = 0;
    int segments = 1;        ///< a_0 b_0 + a_1 b_1
    int k_steps = 0;         ///< of 64 in each segment, where k is not over rows
    bool halved = false;     ///< half of a tile's columns are of each of two weights
    int n_tiles_of_one = 0;  ///< of two results beside each other that rows are summed into: those of the first
};

/// What a finish is told of its tile.
struct FinishedTile {
    int expert = 0;
    index_t row = 0;  ///< first grouped row, where rows are the result's
    int rows = 0;     ///< of these, how many are the expert's
    int m = 0;        ///< first row of the result within the expert
    int n = 0;        ///< tile of columns
    int matrix = 0;   ///< which of two results
};

/// Sizes of a block: `multiplying` warpgroups that each multiply 64 rows by `width` columns, and one that loads. Blocks
/// in `pairs` (clusters of two) compute two tiles with the same b where they can, and bring half of it each, to both.
template <int multiplying, int width, bool in_pairs>
struct ProductBlock {
    static constexpr bool pairs = in_pairs;
    static constexpr int cluster = in_pairs ? 2 : 1;
    static constexpr int multipliers = multiplying, threads = 128 * (multipliers + 1);
    static constexpr int rows = 64 * multipliers, columns = width, depth = 64;
    static constexpr int sums = columns / 2;  // of a thread
    static constexpr int a_bytes = rows * depth * 2, b_bytes = columns * depth * 2, stage_bytes = a_bytes + b_bytes;
    static constexpr int stages = (200 << 10) / stage_bytes;
    static constexpr int chunk_bytes = 2 * 16 * 128;  // a warp's, on the way to global memory
    static constexpr int turned_block = 64 * 128;     // 64 k of 64 m or n

    static constexpr int shared_bytes(int experts) {
        return stages * stage_bytes + 4 * multipliers * chunk_bytes + 2 * stages * 8 + (experts + 1) * 4;
    }
};

namespace detail {

/// Where a block's parts lie in shared memory.
template <class Block>
struct ProductShared {
    char* base;  // a multiple of 1,024
    __device__ std::uint32_t a(int stage) const { return hopper::shared_address(base) + stage * Block::stage_bytes; }
    __device__ std::uint32_t b(int stage) const { return a(stage) + Block::a_bytes; }
    __device__ char* chunk(int warp) const {
        return base + Block::stages * Block::stage_bytes + warp * Block::chunk_bytes;
    }
    __device__ std::uint32_t full(int stage) const {
        return hopper::shared_address(chunk(4 * Block::multipliers)) + 8 * stage;
    }
    __device__ std::uint32_t empty(int stage) const { return full(Block::stages + stage); }
    __device__ int* first() const { return reinterpret_cast<int*>(chunk(4 * Block::multipliers) + 16 * Block::stages); }
};

/// first [E + 1] (=): the running sum of the experts' tiles, or pairs of them, by all threads of the block. Counts are
/// read together, before one warp adds them up: few tokens are done before they would have been read one after the
/// other.
template <bool pairs>
__device__ void count_tiles(const GroupedProduct& of, int* first) {
    for (int e = threadIdx.x; e <= of.experts; e += blockDim.x) {
        const index_t rows = e == of.experts ? 0 : of.offsets[e + 1] - of.offsets[e];
        first[e] = pairs ? of.tiles.pairs(rows) : of.tiles(rows);
    }
    __syncthreads();
    if (threadIdx.x < 32) sums_before(first, of.experts + 1);
    __syncthreads();
}

/// One tile as loaders and multipliers see it.
template <bool over_rows, bool pairs>
struct ProductTile {
    int expert, m, n, matrix, steps;
    index_t first_row;  // of the expert
    int rows;           // of the expert; of a pair's tile that is none and has rows of a result: 0
    bool shares_b;

    __device__ ProductTile(const GroupedProduct& of, const TileWalk& walk, int index, int rank) {
        expert = walk.expert;
        first_row = of.offsets[expert];
        rows = static_cast<int>(of.offsets[expert + 1] - first_row);
        const int within = index - walk.first[expert], m_tiles = of.tiles.m(rows), n_tiles = of.tiles.n_tiles;
        const TilePlace place =
            pairs ? place_in_pair(within, rank, m_tiles, n_tiles) : place_of(within, m_tiles, n_tiles);
        m = place.m;
        n = place.n;
        shares_b = place.shares_b;
        steps = over_rows ? tiles_of(rows, 64) : of.segments * of.k_steps;
        matrix = 0;
        if (over_rows && n_tiles > of.n_tiles_of_one && n >= of.n_tiles_of_one) {
            matrix = 1;
            n -= of.n_tiles_of_one;
        }
        // What lies behind the last column is read as 0 and not written; but of rows, a finish writes more.
        if (!over_rows && n >= n_tiles) rows = 0;
    }
};

}  // namespace detail

}  // namespace steelyard::cuda
