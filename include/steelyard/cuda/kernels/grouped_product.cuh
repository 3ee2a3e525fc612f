// One kernel for the products of all experts: tiles are dealt out from the plan's counts, on the device.
#pragma once

#include <cstdint>

#include "steelyard/core/bf16.hpp"
#include "steelyard/cuda/grouped_tiles.hpp"
#include "steelyard/cuda/kernels/hopper.cuh"

namespace steelyard::cuda {

/// How an operand of a grouped product reaches shared memory, for each expert. "Turned": k runs over the matrix's rows,
/// m or n along them.
enum class Bring {
    weights,          ///< b: a weight [E, n, k]
    weights_turned,   ///< b: a weight [E, k, n]
    rows,             ///< a: grouped rows [N, k]
    rows_turned,      ///< a or b: grouped rows, summed over
    gathered,         ///< a: rows of tokens, [T, k] through the plan
    gathered_turned,  ///< a or b: rows of tokens, summed over
};

constexpr bool is_turned(Bring bring) {
    return bring == Bring::weights_turned || bring == Bring::rows_turned || bring == Bring::gathered_turned;
}
constexpr bool is_gathered(Bring bring) { return bring == Bring::gathered || bring == Bring::gathered_turned; }

/// Tensors that the copy engine reads. Two of each: gate and up.
struct ProductMaps {
    hopper::TensorMap a[2], b[2];
};

struct GroupedProduct {
    const index_t* offsets = nullptr;  // [E + 1]
    int experts = 0;
    TileCount tiles;
    const std::int32_t* choice = nullptr;  // [N]
    int top_k = 1;
    const bf16* tokens = nullptr;  // what is gathered, [T, width]
    index_t token_stride = 0;
    int token_width = 0;
    int segments = 1;  ///< a_0 b_0 + a_1 b_1
    int k_steps = 0;   ///< of 64 in each segment, where k is not over rows
    int n_step = 256;  ///< columns of b from one tile to the next; 128 where half a tile is of each of two weights
    int m_tiles_of_one = 0;  ///< results that rows are summed into: tiles of rows of the first of two
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

/// Sizes of a block: `multipliers` warpgroups that each multiply 64 rows by 256 columns, and one that loads.
template <int multipliers>
struct ProductBlock {
    static constexpr int threads = 128 * (multipliers + 1);
    static constexpr int rows = 64 * multipliers, columns = 256, depth = 64;
    static constexpr int a_bytes = rows * depth * 2, b_bytes = columns * depth * 2, stage_bytes = a_bytes + b_bytes;
    static constexpr int stages = multipliers == 2 ? 4 : 5;
    static constexpr int chunk_bytes = 16 * 144;  // a warp's, on the way to global memory
    static constexpr int turned_block = 64 * 128;  // 64 k of 64 m or n
    /// Loads wait this many steps before they say that they have come.
    static constexpr int lag = 2;

    static constexpr int shared_bytes(int experts) {
        return 1024 + stages * stage_bytes + 4 * multipliers * chunk_bytes + 2 * stages * 8 + (experts + 1) * 4;
    }
};

namespace detail {

/// Where a block's parts lie in shared memory.
template <int multipliers>
struct ProductShared {
    using Block = ProductBlock<multipliers>;
    char* base;
    __device__ explicit ProductShared(char* raw) {
        base = raw + (1024 - hopper::shared_address(raw) % 1024) % 1024;
    }
    __device__ std::uint32_t a(int stage) const { return hopper::shared_address(base) + stage * Block::stage_bytes; }
    __device__ std::uint32_t b(int stage) const { return a(stage) + Block::a_bytes; }
    __device__ char* chunk(int warp) const { return base + Block::stages * Block::stage_bytes + warp * Block::chunk_bytes; }
    __device__ std::uint32_t full(int stage) const {
        return hopper::shared_address(chunk(4 * multipliers)) + 8 * stage;
    }
    __device__ std::uint32_t empty(int stage) const { return full(Block::stages + stage); }
    __device__ int* first() const { return reinterpret_cast<int*>(chunk(4 * multipliers) + 16 * Block::stages); }
};

/// first [E + 1] (=): a warp's running sum of the experts' tiles.
__device__ inline void count_tiles(const GroupedProduct& of, int lane, int* first) {
    int before = 0;
    if (lane == 0) first[0] = 0;
    for (int begin = 0; begin < of.experts; begin += 32) {
        const int e = begin + lane;
        int sum = e < of.experts ? of.tiles(of.offsets[e + 1] - of.offsets[e]) : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (e < of.experts) first[e + 1] = before + sum;
        before += __shfl_sync(~0u, sum, 31);
    }
}

/// One tile as loaders and multipliers see it.
template <int multipliers, bool over_rows>
struct ProductTile {
    int expert, m, n, matrix, steps;
    index_t first_row;  // of the expert
    int rows;           // of the expert

    __device__ ProductTile(const GroupedProduct& of, const TileWalk& walk, int index) {
        expert = walk.expert;
        first_row = of.offsets[expert];
        rows = static_cast<int>(of.offsets[expert + 1] - first_row);
        const TilePlace place = place_of(index - walk.first[expert], of.tiles.m(rows), of.tiles.n_tiles);
        m = place.m;
        n = place.n;
        matrix = 0;
        if (over_rows && m >= of.m_tiles_of_one) {
            matrix = 1;
            m -= of.m_tiles_of_one;
        }
        steps = over_rows ? tiles_of(rows, 64) : of.segments * of.k_steps;
    }
};

/// The loading warpgroup.
template <Bring a, Bring b, int multipliers>
struct ProductLoader {
    using Block = ProductBlock<multipliers>;
    static constexpr bool gathers = is_gathered(a) || is_gathered(b), over_rows = is_turned(a);
    static constexpr int copied_bytes = (is_gathered(a) ? 0 : Block::a_bytes) + (is_gathered(b) ? 0 : Block::b_bytes);
    using Tile = ProductTile<multipliers, over_rows>;

    const ProductMaps& maps;
    const GroupedProduct& of;
    ProductShared<multipliers> shared;
    int thread;       // 0 to 127
    int issued = 0;   // steps
    // Rows that this thread gathers are `thread / 8`, 16 further on, and so on; of each it copies 16 bytes.
    const bf16* source[Block::rows / 16];

    __device__ void run(int total) {
        TileWalk walk{shared.first()};
        for (int index = blockIdx.x; index < total; index += gridDim.x) {
            walk.seek(index);
            const Tile tile(of, walk, index);
            if constexpr (a == Bring::gathered) find_rows(tile);
            int next[4];
            if constexpr (gathers && over_rows) find_tokens(tile, 0, next);
            for (int step = 0; step < tile.steps; ++step) {
                const int stage = issued % Block::stages;
                hopper::wait(shared.empty(stage), issued / Block::stages % 2 ^ 1);
                if (thread == 0) copy_boxes(tile, step, stage);
                if constexpr (a == Bring::gathered) gather_rows(step, stage);
                if constexpr (gathers && over_rows) {
                    gather_turned(tile, next, stage);
                    if (step + 1 < tile.steps) find_tokens(tile, step + 1, next);
                }
                ++issued;
                if constexpr (gathers) {
                    hopper::close_copies();
                    if (issued > Block::lag) say_full<Block::lag>(issued - 1 - Block::lag);
                }
            }
        }
        if constexpr (gathers)
            for (int step = issued > Block::lag ? issued - Block::lag : 0; step < issued; ++step) say_full<0>(step);
    }

    template <int left>
    __device__ void say_full(int step) const {
        hopper::wait_copies<left>();
        hopper::publish_shared();
        hopper::arrive(shared.full(step % Block::stages));
    }

    __device__ void copy_boxes(const Tile& tile, int step, int stage) const {
        const std::uint32_t full = shared.full(stage), to_a = shared.a(stage), to_b = shared.b(stage);
        hopper::arrive_expecting(full, copied_bytes);
        const int segment = over_rows ? 0 : step / of.k_steps, k = (over_rows ? step : step % of.k_steps) * Block::depth;
        const int row = static_cast<int>(tile.first_row);
        if constexpr (a == Bring::rows)
            hopper::copy_box(to_a, maps.a[segment], full, k, row + tile.m * Block::rows);
        if constexpr (a == Bring::rows_turned)
            for (int i = 0; i < multipliers; ++i)
                hopper::copy_box(to_a + i * Block::turned_block, maps.a[tile.matrix], full,
                                 tile.m * Block::rows + 64 * i, row + k);
        if constexpr (b == Bring::weights) {
            const int n = tile.n * of.n_step, second = of.n_step == 256 ? 128 : 0;
            hopper::copy_box(to_b, maps.b[0], full, k, n, tile.expert);
            hopper::copy_box(to_b + Block::b_bytes / 2, maps.b[1], full, k, n + second, tile.expert);
        }
        if constexpr (b == Bring::weights_turned)
            for (int i = 0; i < 4; ++i)
                hopper::copy_box(to_b + i * Block::turned_block, maps.b[segment], full, tile.n * 256 + 64 * i, k,
                                 tile.expert);
        if constexpr (b == Bring::rows_turned)
            for (int i = 0; i < 4; ++i)
                hopper::copy_box(to_b + i * Block::turned_block, maps.b[0], full, tile.n * 256 + 64 * i, row + k);
    }

    // Gathered with k along the rows.

    __device__ void find_rows(const Tile& tile) {
        for (int i = 0; i < Block::rows / 16; ++i) {
            const int row = tile.m * Block::rows + thread / 8 + 16 * i;
            source[i] = row < tile.rows
                            ? of.tokens + of.choice[tile.first_row + row] / of.top_k * of.token_stride + thread % 8 * 8
                            : nullptr;
        }
    }
    __device__ void gather_rows(int step, int stage) const {
        const int k = step * Block::depth;
        const bool inside = k + thread % 8 * 8 < of.token_width;
#pragma unroll
        for (int i = 0; i < Block::rows / 16; ++i) {
            const int row = thread / 8 + 16 * i;
            const bool read = inside && source[i] != nullptr;
            hopper::copy_16(shared.a(stage) + row * 128 + ((thread % 8 ^ row % 8) << 4),
                            read ? source[i] + k : of.tokens, read);
        }
    }

    // Gathered with k over them. Rows behind the expert's last become 0.

    __device__ void find_tokens(const Tile& tile, int step, int (&token)[4]) const {
        for (int i = 0; i < 4; ++i) {
            const int row = step * Block::depth + thread / 8 + 16 * i;
            token[i] = row < tile.rows ? of.choice[tile.first_row + row] / of.top_k : -1;
        }
    }
    __device__ void gather_turned(const Tile& tile, const int (&token)[4], int stage) const {
        constexpr int blocks = is_gathered(a) ? multipliers : 4;
        const int column = (is_gathered(a) ? tile.m * Block::rows : tile.n * 256) + thread % 8 * 8;
        const std::uint32_t to = is_gathered(a) ? shared.a(stage) : shared.b(stage);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = thread / 8 + 16 * i;
            const bf16* from = of.tokens + token[i] * of.token_stride + column;
#pragma unroll
            for (int block = 0; block < blocks; ++block) {
                const bool read = token[i] >= 0 && column + 64 * block < of.token_width;
                hopper::copy_16(to + block * Block::turned_block + row * 128 + ((thread % 8 ^ row % 8) << 4),
                                read ? from + 64 * block : of.tokens, read);
            }
        }
    }
};

/// Rows of the expert behind the last k, which a copy of grouped rows brought along, become 0.
template <Bring a, Bring b, int multipliers>
__device__ void clear_tail(const ProductShared<multipliers>& shared, int stage, int valid, int thread) {
    using Block = ProductBlock<multipliers>;
    constexpr int blocks = a == Bring::rows_turned ? multipliers : 4;
    char* const at = shared.base + stage * Block::stage_bytes + (a == Bring::rows_turned ? 0 : Block::a_bytes);
    const int chunks = (Block::depth - valid) * 8;
    for (int i = thread; i < blocks * chunks; i += 128 * multipliers)
        *reinterpret_cast<uint4*>(at + i / chunks * Block::turned_block + valid * 128 + i % chunks * 16) = uint4{};
    hopper::publish_shared();
    hopper::sync_threads_of(1, 128 * multipliers);
}

}  // namespace detail

/// For every tile of every expert: d = sum over k of a b, then finish(tile, warp, d, chunk). Persistent blocks, one for
/// each multiprocessor, of ProductBlock<multipliers>. `finish` is told which 16 rows of the tile its warp holds (see
/// hopper::multiply_256). Sums run in ascending k; every tile is one block's, so that results have the same bits from
/// run to run.
template <Bring a, Bring b, int multipliers, class Finish>
__global__ void __launch_bounds__(ProductBlock<multipliers>::threads, 1)
    grouped_product(const __grid_constant__ ProductMaps maps, const __grid_constant__ GroupedProduct of,
                    const __grid_constant__ Finish finish) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Block = ProductBlock<multipliers>;
    using Loader = detail::ProductLoader<a, b, multipliers>;
    extern __shared__ char raw[];
    const detail::ProductShared<multipliers> shared(raw);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Block::stages; ++stage) {
            hopper::init_barrier(shared.full(stage), Loader::gathers ? 129 : 1);
            hopper::init_barrier(shared.empty(stage), 4 * multipliers);
        }
        hopper::publish_barriers();
    }
    if (warp == 1) detail::count_tiles(of, lane, shared.first());
    __syncthreads();
    const int total = shared.first()[of.experts];

    if (warp < 4) {
        if constexpr (multipliers == 2) hopper::give_registers<56>();
        if (Loader::gathers || threadIdx.x == 0) {
            Loader loader{maps, of, shared, static_cast<int>(threadIdx.x)};
            loader.run(total);
        }
    } else {
        if constexpr (multipliers == 2) hopper::take_registers<224>();
        const int own = warp / 4 - 1;  // which 64 rows
        constexpr bool a_by_k = !is_turned(a), b_by_k = !is_turned(b);
        float d[128];
        TileWalk walk{shared.first()};
        int step_of_all = 0;
        for (int index = blockIdx.x; index < total; index += gridDim.x) {
            walk.seek(index);
            const typename Loader::Tile tile(of, walk, index);
            for (int step = 0; step < tile.steps; ++step, ++step_of_all) {
                const int stage = step_of_all % Block::stages;
                hopper::wait(shared.full(stage), step_of_all / Block::stages % 2);
                if constexpr (Loader::over_rows)
                    if (tile.rows < (step + 1) * Block::depth)
                        detail::clear_tail<a, b, multipliers>(shared, stage, tile.rows - step * Block::depth,
                                                              threadIdx.x - 128);
                const std::uint64_t at_a = hopper::matrix_at(shared.a(stage) + own * 64 * 128, Block::turned_block);
                const std::uint64_t at_b = hopper::matrix_at(shared.b(stage), Block::turned_block);
                hopper::begin_products();
#pragma unroll
                for (int j = 0; j < Block::depth / 16; ++j)
                    hopper::multiply_256<a_by_k, b_by_k>(d, at_a + j * (a_by_k ? 2 : 128), at_b + j * (b_by_k ? 2 : 128),
                                                         step > 0 || j > 0);
                hopper::close_products();
                hopper::wait_products<1>();
                if (step > 0 && lane == 0) hopper::arrive(shared.empty((step_of_all - 1) % Block::stages));
            }
            hopper::wait_products<0>();
            if (lane == 0) hopper::arrive(shared.empty((step_of_all - 1) % Block::stages));
            hopper::settle(d);
            const int m = tile.m * Block::rows, row = 64 * own + 16 * (warp % 4);
            finish(FinishedTile{tile.expert, tile.first_row + m + row,
                                Loader::over_rows ? 16 : min(16, tile.rows - m - row), m + row, tile.n, tile.matrix},
                   d, shared.chunk(warp - 4), lane);
        }
    }
#endif
}

}  // namespace steelyard::cuda
