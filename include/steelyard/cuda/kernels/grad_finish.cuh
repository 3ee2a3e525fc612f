// What a grouped product does with its sums, where these are gradients of weights: they are added to what is there, or
// replace it.
#pragma once

#include <cstdint>

#include "steelyard/core/view.hpp"
#include "steelyard/cuda/kernels/finish_rooms.cuh"

namespace steelyard::cuda {

/// Gradients of weights (+= or =), [E, m, n]. Map `out`, of 16 rows, and map `extra`, of 128, are the same tensor.
template <Write write>
struct FinishGradient {
    static constexpr int warps_of_store = 1;
    /// What is added to, and leaves from the same place: 128 columns at a time, in two boxes.
    template <class Block>
    static constexpr int extra_steps = Block::columns / 128;
    template <class Block>
    static constexpr int extra_bytes() {
        return write == Write::add ? 2 * Block::rows * 128 : 0;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps& maps, const Tile& tile, int step, std::uint32_t to,
                                 std::uint32_t full) {
        constexpr int rows = Block::rows;
        if constexpr (write == Write::add)
            for (int box = 0; box < 2; ++box)
                hopper::copy_box(to + box * rows * 128, maps.extra[tile.matrix], full,
                                 tile.n * Block::columns + 128 * step + 64 * box, tile.m * rows, tile.expert);
    }

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
#pragma unroll
        for (int step = 0; step < extra_steps<Block>; ++step) {
            const std::uint32_t rooms = steps.take() + steps.row * 128;
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const std::uint32_t at = detail::matrices_at(rooms + c * Block::rows * 128, steps.lane, j);
                    std::uint32_t pairs[4];
                    if constexpr (write == Write::add) hopper::load_matrices(at, pairs);
                    detail::write_pairs<write>(pairs, &d[64 * step + 32 * c + 8 * j]);
                    hopper::store_matrices(at, pairs);
                }
            hopper::publish_shared();
            __syncwarp();
            if (steps.lane == 0) {
                // What lies outside the matrix is not written.
                for (int c = 0; c < 2; ++c)
                    hopper::store_box(steps.maps.out[tile.matrix], rooms + c * Block::rows * 128,
                                      tile.n * Block::columns + 128 * step + 64 * c, tile.m, tile.expert);
                hopper::close_stores();
            }
            steps.give_when_stored();
        }
    }
};

/// Gradients of weights (+= or =), [E, n, m]: sums lie turned in them. Of one matrix, or of two beside each other. Map
/// `extra`, of 128 rows, is the tensor; it is read and written by it.
template <Write write>
struct FinishGradientTurned {
    /// A warp's sums are 16 columns of 256 rows here: narrow for a store, so that the four of a warpgroup store
    /// together.
    static constexpr int warps_of_store = 4;
    /// What is added to, and leaves from the same place: 128 rows at a time, in boxes of 64 columns, one for each
    /// warpgroup.
    template <class Block>
    static constexpr int extra_steps = Block::columns / 128;
    template <class Block>
    static constexpr int extra_bytes() {
        return write == Write::add ? Block::multipliers * box_bytes : 0;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps& maps, const Tile& tile, int step, std::uint32_t to,
                                 std::uint32_t full) {
        if constexpr (write == Write::add)
            for (int box = 0; box < Block::multipliers; ++box)
                hopper::copy_box(to + box * box_bytes, maps.extra[tile.matrix], full, tile.m * Block::rows + 64 * box,
                                 tile.n * Block::columns + 128 * step, tile.expert);
    }

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        constexpr int barrier = 2;  // the first of one for each warpgroup
        const int group = steps.row / 64, warp = steps.row % 64 / 16;
        // Lane l's row of the matrices that are moved together: l % 8 of 8 or 16 rows, in one of two chunks.
        const int row = steps.lane / 16 * 8 + steps.lane % 8;
        const int within = row * 128 + ((2 * warp + steps.lane / 8 % 2 ^ steps.lane % 8) << 4);
#pragma unroll
        for (int step = 0; step < extra_steps<Block>; ++step) {
            const std::uint32_t box = steps.take() + group * box_bytes;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                std::uint32_t pairs[4];
                if constexpr (write == Write::add) hopper::load_matrices_turned(box + j * 2048 + within, pairs);
                detail::write_pairs<write>(pairs, &d[64 * step + 8 * j]);
                hopper::store_matrices_turned(box + j * 2048 + within, pairs);
            }
            hopper::publish_shared();
            hopper::sync_threads_of(barrier + group, 128);
            if (warp == 0 && steps.lane == 0) {
                // What lies outside the matrix is not written.
                hopper::store_box(steps.maps.extra[tile.matrix], box, tile.m, tile.n * Block::columns + 128 * step,
                                  tile.expert);
                hopper::close_stores();
            }
            steps.give_when_stored();
        }
    }

private:
    static constexpr int box_bytes = 128 * 128;  // 128 rows of 64
};

/// Gradients (=) of an expert without rows, of which no product is told: 0. Tensors [E, rows, columns].
struct IdleGradients {
    struct Tensor {
        bf16* data;
        index_t expert_stride, row_stride;
        int rows, columns;  // columns and strides are multiples of 8
    };
    Tensor tensors[3];
    const index_t* offsets;  // [E + 1]
};
/// Blocks: x takes parts of a matrix, y counts experts, z tensors.
__global__ void clear_idle_gradients(IdleGradients of) {
    const int e = blockIdx.y;
    if (of.offsets[e + 1] > of.offsets[e]) return;
    const IdleGradients::Tensor& to = of.tensors[blockIdx.z];
    const int chunks = to.columns / 8;
    for (int row = blockIdx.x; row < to.rows; row += gridDim.x) {
        auto* const line = reinterpret_cast<uint4*>(to.data + e * to.expert_stride + row * to.row_stride);
        for (int i = threadIdx.x; i < chunks; i += blockDim.x) line[i] = uint4{};
    }
}

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
