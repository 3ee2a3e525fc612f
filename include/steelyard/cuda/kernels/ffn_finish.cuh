// What a grouped product does with its sums: the activation, its gradient, a plain store, an addition.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "steelyard/cuda/kernels/ffn_function.cuh"
#include "steelyard/cuda/kernels/grouped_product.cuh"

namespace steelyard::cuda {

/// A matrix of bf16 with rows `stride` elements apart; or none.
struct RowsOut {
    bf16* data = nullptr;
    index_t stride = 0;
};

namespace detail {

__device__ inline std::uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
}
__device__ inline float2 unpack_bf16(std::uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

/// 16 bytes, number `chunk`, of a row of 64 columns that the copy engine brought, swizzled, to 1,024-aligned memory.
__device__ inline const char* swizzled(const char* box, int row, int chunk) {
    return box + row * 128 + ((chunk ^ row % 8) << 4);
}
/// Of a box that was brought: this warp's 16 rows, from `row` on. Pair 2 j + i of a lane is row lane / 4 + 8 i, columns
/// 8 j + 2 (lane % 4) and the next: the order of hopper::multiply.
__device__ inline void read_box(const char* box, int row, int lane, std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int p = 0; p < 16; ++p)
        pairs[p] =
            *reinterpret_cast<const std::uint32_t*>(swizzled(box, row + lane / 4 + 8 * (p % 2), p / 2) + lane % 4 * 4);
}

/// A warp's 16 rows by 64 columns, in the same order, to shared memory, swizzled; it alternates between two places. The
/// copy engine is done with that place then. Answers with it.
template <class Steps>
__device__ std::uint32_t lay_out(const std::uint32_t (&pairs)[16], const Steps& steps) {
    const int lane = steps.lane, row = lane % 16, half = lane / 16;
    if (lane == 0) hopper::wait_stores_read<1>();
    __syncwarp();
    const std::uint32_t at = steps.chunk + steps.stores++ % 2 * 2048;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        hopper::store_matrices(at + row * 128 + ((j + half ^ row % 8) << 4), pairs[2 * j], pairs[2 * j + 1],
                               pairs[2 * j + 2], pairs[2 * j + 3]);
    hopper::publish_shared();
    __syncwarp();
    return at;
}
/// The first `rows` of 16 rows and `width` of 64 columns, a multiple of 8, from where they were laid out.
__device__ inline void store_lines(std::uint32_t at, int lane, const RowsOut& out, index_t row, int column, int rows,
                                   int width) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = 4 * i + lane / 8, chunk = lane % 8;
        if (r >= rows || chunk * 8 >= width) continue;
        uint4 line;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                     : "r"(at + r * 128 + ((chunk ^ r % 8) << 4)));
        *reinterpret_cast<uint4*>(out.data + (row + r) * out.stride + column + chunk * 8) = line;
    }
}
/// Grouped rows: whole ones by the copy engine, those of an expert's last tile line by line: behind them are another
/// expert's. `which` is the map of `out`.
template <class Steps>
__device__ void store_rows(const std::uint32_t (&pairs)[16], const Steps& steps, int which, const RowsOut& out,
                           const FinishedTile& tile, int column, int width) {
    const std::uint32_t at = lay_out(pairs, steps);
    if (tile.rows == 16) {
        if (steps.lane == 0) hopper::store_box(steps.maps.out[which], at, column, static_cast<int>(tile.row));
    } else {
        store_lines(at, steps.lane, out, tile.row, column, tile.rows, width - column);
    }
    if (steps.lane == 0) hopper::close_stores();
}

/// For a finish that reads nothing.
struct NothingExtra {
    template <class Block>
    static constexpr int extra_steps = 0;
    template <class Block>
    static constexpr int extra_bytes() {
        return 0;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps&, const Tile&, int, std::uint32_t, std::uint32_t) {}
};

}  // namespace detail

/// gate and up (=) as they are, where wanted, and inner (=) their activation. Gated: a tile is 128 columns of each.
template <bool gated, bool swiglu>
struct FinishHidden : detail::NothingExtra {
    FunctionOf function;
    RowsOut gate, up, inner;  // maps 0, 1, 2
    int width = 0;            // h

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        constexpr int tile_columns = gated ? Block::columns / 2 : Block::columns, half = gated ? Block::sums / 2 : 0;
        if (tile.rows <= 0) return;
#pragma unroll
        for (int c = 0; c < tile_columns / 64; ++c) {
            const int column = tile.n * tile_columns + 64 * c;
            if (column >= width) break;
            std::uint32_t pairs[16];
            if (up.data != nullptr) {
                if constexpr (gated) {
#pragma unroll
                    for (int p = 0; p < 16; ++p) pairs[p] = detail::pack_bf16(d[32 * c + 2 * p], d[32 * c + 2 * p + 1]);
                    detail::store_rows(pairs, steps, 0, gate, tile, column, width);
                }
#pragma unroll
                for (int p = 0; p < 16; ++p)
                    pairs[p] = detail::pack_bf16(d[half + 32 * c + 2 * p], d[half + 32 * c + 2 * p + 1]);
                detail::store_rows(pairs, steps, 1, up, tile, column, width);
            }
            if (inner.data == nullptr) continue;
#pragma unroll
            for (int p = 0; p < 16; ++p) {
                const int i = 32 * c + 2 * p;
                pairs[p] = detail::pack_bf16(value<half>(d, i), value<half>(d, i + 1));
            }
            detail::store_rows(pairs, steps, 2, inner, tile, column, width);
        }
    }

private:
    template <int half, int sums>
    __device__ float value(const float (&d)[sums], int i) const {
        if constexpr (swiglu)
            return swiglu_point(d[i], d[i + half]).a;
        else if constexpr (gated)
            return point_of(function, d[i], d[i + half]).a;
        else
            return point_of(function, 0.0f, d[i]).a;
    }
};

/// rows (=) the sums.
struct FinishRows : detail::NothingExtra {
    RowsOut rows;  // map 0
    int width = 0;

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        if (tile.rows <= 0) return;
#pragma unroll
        for (int c = 0; c < Block::columns / 64; ++c) {
            const int column = tile.n * Block::columns + 64 * c;
            if (column >= width) break;
            std::uint32_t pairs[16];
#pragma unroll
            for (int p = 0; p < 16; ++p) pairs[p] = detail::pack_bf16(d[32 * c + 2 * p], d[32 * c + 2 * p + 1]);
            detail::store_rows(pairs, steps, 0, rows, tile, column, width);
        }
    }
};

/// The sums are da, without the combine weight w: dgate, dup, inner (=) w da a', w a, and for each tile of columns of a
/// row its part (=) of the weight's gradient, <da, a>.
template <bool gated, bool swiglu>
struct FinishHiddenGradient {
    FunctionOf function;
    RowsOut dgate, dup, inner;  // maps 0, 1, 2
    const float* weight;        // [T, K], or null: 1
    index_t weight_stride;
    const std::int32_t* choice;
    Divisor top_k;
    float* parts;  // [N, n_tiles], or null
    int n_tiles;
    int width;  // h

    /// What forward kept, 64 columns at a time: of the gate, where there is one, and behind it of `up`.
    template <class Block>
    static constexpr int extra_steps = Block::columns / 64;
    template <class Block>
    static constexpr int extra_bytes() {
        return (gated ? 2 : 1) * Block::rows * 128;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps& maps, const Tile& tile, int step, std::uint32_t to,
                                 std::uint32_t full) {
        constexpr int rows = Block::rows;
        const int column = tile.n * Block::columns + 64 * step, row = static_cast<int>(tile.first_row) + tile.m * rows;
        if (gated) hopper::copy_box(to, maps.extra[0], full, column, row);
        hopper::copy_box(to + (gated ? rows * 128 : 0), maps.extra[1], full, column, row);
    }

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        const int lane = steps.lane;
        float factor[2] = {1.0f, 1.0f}, part[2] = {0.0f, 0.0f};
        for (int i = 0; i < 2; ++i) {
            const int row = lane / 4 + 8 * i;
            if (weight == nullptr || row >= tile.rows) continue;
            const std::int32_t which = choice[tile.row + row];
            factor[i] = weight[top_k.quotient(which) * weight_stride + top_k.remainder(which)];
        }
#pragma unroll
        for (int c = 0; c < Block::columns / 64; ++c) {
            const int column = tile.n * Block::columns + 64 * c;
            const char* const box = steps.take();
            std::uint32_t of_gate[16], of_up[16], of_inner[16];
            if constexpr (gated) detail::read_box(box, tile.in_tile, lane, of_gate);
            detail::read_box(box + (gated ? Block::rows * 128 : 0), tile.in_tile, lane, of_up);
            steps.give();
            if (column >= width || tile.rows <= 0) continue;
#pragma unroll
            for (int p = 0; p < 16; ++p) {
                const float w = factor[p % 2];
                const float2 g = gated ? detail::unpack_bf16(of_gate[p]) : float2{}, u = detail::unpack_bf16(of_up[p]);
                const float da0 = d[32 * c + 2 * p], da1 = d[32 * c + 2 * p + 1];
                const FunctionPoint p0 = point(g.x, u.x), p1 = point(g.y, u.y);
                part[p % 2] += da0 * p0.a + da1 * p1.a;
                const float wda0 = w * da0, wda1 = w * da1;
                if constexpr (gated) of_gate[p] = detail::pack_bf16(wda0 * p0.by_gate, wda1 * p1.by_gate);
                of_up[p] = detail::pack_bf16(wda0 * p0.by_up, wda1 * p1.by_up);
                of_inner[p] = detail::pack_bf16(w * p0.a, w * p1.a);
            }
            if constexpr (gated) detail::store_rows(of_gate, steps, 0, dgate, tile, column, width);
            detail::store_rows(of_up, steps, 1, dup, tile, column, width);
            detail::store_rows(of_inner, steps, 2, inner, tile, column, width);
        }
        for (int i = 0; i < 2; ++i) {
            part[i] += __shfl_xor_sync(~0u, part[i], 1);
            part[i] += __shfl_xor_sync(~0u, part[i], 2);
            const int row = lane / 4 + 8 * i;
            if (parts != nullptr && lane % 4 == 0 && row < tile.rows)
                parts[(tile.row + row) * n_tiles + tile.n] = part[i];
        }
    }

private:
    __device__ FunctionPoint point(float g, float u) const {
        if constexpr (swiglu)
            return swiglu_point(g, u);
        else
            return point_of(function, g, u);
    }
};

/// Gradients of weights (+=), [E, m, n]. Map `out`, of 16 rows, and map `extra`, of 128, are the same tensor.
struct FinishAdd {
    /// What is added to: 128 columns at a time, in two boxes.
    template <class Block>
    static constexpr int extra_steps = Block::columns / 128;
    template <class Block>
    static constexpr int extra_bytes() {
        return 2 * Block::rows * 128;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps& maps, const Tile& tile, int step, std::uint32_t to,
                                 std::uint32_t full) {
        constexpr int rows = Block::rows;
        for (int box = 0; box < 2; ++box)
            hopper::copy_box(to + box * rows * 128, maps.extra[tile.matrix], full,
                             tile.n * Block::columns + 128 * step + 64 * box, tile.m * rows, tile.expert);
    }

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        const char* box = nullptr;
#pragma unroll
        for (int c = 0; c < Block::columns / 64; ++c) {
            if (c % 2 == 0) box = steps.take();
            std::uint32_t pairs[16];
            detail::read_box(box + c % 2 * Block::rows * 128, tile.in_tile, steps.lane, pairs);
            if (c % 2 == 1) steps.give();
#pragma unroll
            for (int p = 0; p < 16; ++p) {
                const float2 old = detail::unpack_bf16(pairs[p]);
                pairs[p] = detail::pack_bf16(old.x + d[32 * c + 2 * p], old.y + d[32 * c + 2 * p + 1]);
            }
            const std::uint32_t at = detail::lay_out(pairs, steps);
            if (steps.lane != 0) continue;
            // What lies outside the matrix is not written.
            hopper::store_box(steps.maps.out[tile.matrix], at, tile.n * Block::columns + 64 * c, tile.m, tile.expert);
            hopper::close_stores();
        }
    }
};

/// Gradients of weights (+=), [E, n, m]: sums lie turned in them. Of one matrix, or of two beside each other. Map
/// `out`, of 64 rows, and map `extra`, of 128, of each are the same tensor.
struct FinishAddTurned {
    /// What is added to: 128 rows at a time, in boxes of 64 columns, one for each warpgroup.
    template <class Block>
    static constexpr int extra_steps = Block::columns / 128;
    template <class Block>
    static constexpr int extra_bytes() {
        return Block::multipliers * box_bytes;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps& maps, const Tile& tile, int step, std::uint32_t to,
                                 std::uint32_t full) {
        for (int box = 0; box < Block::multipliers; ++box)
            hopper::copy_box(to + box * box_bytes, maps.extra[tile.matrix], full, tile.m * Block::rows + 64 * box,
                             tile.n * Block::columns + 128 * step, tile.expert);
    }

    /// A warp's sums are 16 columns of 256 rows here: narrow for a store, so that the four of a warpgroup lay 64 by 64
    /// out together.
    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        constexpr int barrier = 2;  // the first of one for each warpgroup
        const int group = tile.in_tile / 64, warp = tile.in_tile % 64 / 16;
        // Lane l's row of the matrices that are moved together: l % 8 of 8 or 16 rows, in one of two chunks.
        const int row = steps.lane / 16 * 8 + steps.lane % 8;
        const int within = row * 128 + ((2 * warp + steps.lane / 8 % 2 ^ steps.lane % 8) << 4);
        const std::uint32_t room = steps.chunk - warp * Block::chunk_bytes;
        std::uint32_t box = 0;
#pragma unroll
        for (int c = 0; c < Block::columns / 64; ++c) {
            if (c % 2 == 0) box = hopper::shared_address(steps.take()) + group * box_bytes;
            std::uint32_t pairs[16];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                std::uint32_t of[4];
                hopper::load_matrices_turned(box + c % 2 * 8192 + j * 2048 + within, of);
#pragma unroll
                for (int q = 0; q < 4; ++q) pairs[4 * j + q] = of[q];
            }
            if (c % 2 == 1) steps.give();
#pragma unroll
            for (int p = 0; p < 16; ++p) {
                const float2 old = detail::unpack_bf16(pairs[p]);
                pairs[p] = detail::pack_bf16(old.x + d[32 * c + 2 * p], old.y + d[32 * c + 2 * p + 1]);
            }
            const std::uint32_t at = room + steps.stores++ % 2 * 8192;
            const bool stores = warp == 0 && steps.lane == 0;
            if (stores) hopper::wait_stores_read<1>();
            hopper::sync_threads_of(barrier + group, 128);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                hopper::store_matrices_turned(at + j * 2048 + within, pairs[4 * j], pairs[4 * j + 1], pairs[4 * j + 2],
                                              pairs[4 * j + 3]);
            hopper::publish_shared();
            hopper::sync_threads_of(barrier + group, 128);
            if (!stores) continue;
            // What lies outside the matrix is not written.
            hopper::store_box(steps.maps.out[tile.matrix], at, tile.m - 16 * warp, tile.n * Block::columns + 64 * c,
                              tile.expert);
            hopper::close_stores();
        }
    }

private:
    static constexpr int box_bytes = 128 * 128;  // 128 rows of 64
};

/// dweight[t, k] += the parts of row r, in order of the columns, for every row of the plan.
__global__ void add_weight_parts(const float* parts, int n_tiles, const index_t* offsets, int experts,
                                 const std::int32_t* choice, int top_k, float* dweight, index_t stride) {
    const index_t row = offsets[0] + static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= offsets[experts]) return;
    float sum = 0;
    for (int n = 0; n < n_tiles; ++n) sum += parts[row * n_tiles + n];
    const std::int32_t which = choice[row];
    dweight[which / top_k * stride + which % top_k] += sum;
}

}  // namespace steelyard::cuda
