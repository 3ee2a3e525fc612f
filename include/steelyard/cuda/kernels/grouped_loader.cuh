// The warpgroup that brings the operands of a grouped product to shared memory.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/grouped_call.cuh"

namespace steelyard::cuda::detail {

/// The loading warpgroup.
template <Bring a, Bring b, class Block, class Finish>
struct ProductLoader {
    static constexpr bool gathers = is_gathered(a) || is_gathered(b), over_rows = is_turned(a);
    static constexpr int copied_bytes = (is_gathered(a) ? 0 : Block::a_bytes) + (is_gathered(b) ? 0 : Block::b_bytes);
    using Tile = ProductTile<over_rows>;

    const ProductMaps& maps;
    const GroupedProduct& of;
    ProductShared<Block> shared;
    int thread;      // 0 to 127
    int issued = 0;  // steps

    // A thread gathers 16 bytes, number thread % 8, of rows thread / 8, 16 further on, and so on. All of these are at
    // the same place of the swizzle.
    __device__ std::uint32_t place_in_rows() const { return thread / 8 * 128 + ((thread % 8 ^ thread / 8 % 8) << 4); }

    __device__ void run(int total) {
        TileWalk walk{shared.first()};
        for (int index = blockIdx.x; index < total; index += gridDim.x) {
            walk.seek(index);
            const Tile tile(of, walk, index);
            if constexpr (a == Bring::gathered)
                load_gathered(tile);
            else if constexpr (gathers)
                load_gathered_turned(tile);
            else
                for (int step = 0; step < tile.steps; ++step) {
                    copy_boxes(tile, step, free_stage());
                    ++issued;
                }
            for (int step = 0; step < Finish::template extra_steps<Block>; ++step) {
                const int stage = free_stage();
                if (thread == 0) {
                    hopper::arrive_expecting(shared.full(stage), Finish::template extra_bytes<Block>());
                    Finish::template bring<Block>(maps, tile, step, shared.a(stage), shared.full(stage));
                }
                close_step();
            }
        }
        if constexpr (gathers)
            for (int step = issued > Block::lag ? issued - Block::lag : 0; step < issued; ++step) say_full<0>(step);
    }

    /// The next step's stage, when it is free. What was gathered `lag` steps ago has come by then.
    __device__ int free_stage() const {
        if constexpr (gathers)
            if (issued >= Block::lag) say_full<Block::lag - 1>(issued - Block::lag);
        const int stage = issued % Block::stages;
        hopper::wait(shared.empty(stage), issued / Block::stages % 2 ^ 1);
        return stage;
    }
    __device__ void close_step() {
        if constexpr (gathers) hopper::close_copies();
        ++issued;
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
        const int segment = over_rows || step < of.k_steps ? 0 : 1, k = (step - segment * of.k_steps) * Block::depth;
        const int row = static_cast<int>(tile.first_row);
        if constexpr (a == Bring::rows) hopper::copy_box(to_a, maps.a[segment], full, k, row + tile.m * Block::rows);
        if constexpr (a == Bring::rows_turned)
            for (int i = 0; i < Block::multipliers; ++i)
                hopper::copy_box(to_a + i * Block::turned_block, maps.a[tile.matrix], full,
                                 tile.m * Block::rows + 64 * i, row + k);
        if constexpr (b == Bring::weights) {
            constexpr int half = Block::columns / 2;
            const int n = tile.n * (of.halved ? half : Block::columns), second = of.halved ? 0 : half;
            hopper::copy_box(to_b, maps.b[0], full, k, n, tile.expert);
            hopper::copy_box(to_b + Block::b_bytes / 2, maps.b[1], full, k, n + second, tile.expert);
        }
        if constexpr (b == Bring::weights_turned)
            for (int i = 0; i < Block::columns / 64; ++i)
                hopper::copy_box(to_b + i * Block::turned_block, maps.b[segment], full,
                                 tile.n * Block::columns + 64 * i, k, tile.expert);
        if constexpr (b == Bring::rows_turned)
            for (int i = 0; i < Block::columns / 64; ++i)
                hopper::copy_box(to_b + i * Block::turned_block, maps.b[0], full, tile.n * Block::columns + 64 * i,
                                 row + k);
    }

    /// All steps of a tile whose rows are tokens', k along them.
    __device__ void load_gathered(const Tile& tile) {
        constexpr int own_rows = Block::rows / 16;
        const bf16* from[own_rows];
        for (int i = 0; i < own_rows; ++i) {
            const int row = tile.m * Block::rows + thread / 8 + 16 * i;
            from[i] =
                row < tile.rows
                    ? of.tokens + of.top_k.quotient(of.choice[tile.first_row + row]) * of.token_stride + thread % 8 * 8
                    : nullptr;
        }
        for (int step = 0; step < tile.steps; ++step) {
            const int stage = free_stage(), k = step * Block::depth;
            if (thread == 0) copy_boxes(tile, step, stage);
            const bool inside = k + thread % 8 * 8 < of.token_width;
            const std::uint32_t to = shared.a(stage) + place_in_rows();
#pragma unroll
            for (int i = 0; i < own_rows; ++i) {
                const bool read = inside && from[i] != nullptr;
                hopper::copy_16(to + i * 2048, read ? from[i] + k : of.tokens, read);
            }
            close_step();
        }
    }

    /// All steps of a tile whose k are tokens. Rows behind the expert's last become 0.
    __device__ void load_gathered_turned(const Tile& tile) {
        constexpr int blocks = is_gathered(a) ? Block::multipliers : Block::columns / 64;
        const int column = (is_gathered(a) ? tile.m * Block::rows : tile.n * Block::columns) + thread % 8 * 8;
        // This thread's rows, counted from its first; `last` is -1 or less where it has none.
        const int last = tile.rows - 1 - thread / 8;
        const std::int32_t* const choice = of.choice + tile.first_row + (last < 0 ? last : 0) + thread / 8;
        const bf16* const tokens = of.tokens + column;
        const int left = of.token_width - column;  // columns from this thread's on
        // Looked up a step ahead; behind the last row, a choice of some token, which is not read.
        std::int32_t next[4];
        const auto find = [&](int step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) next[i] = choice[max(0, min(step * Block::depth + 16 * i, last))];
        };
        find(0);
        for (int step = 0; step < tile.steps; ++step) {
            const bf16* from[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) from[i] = tokens + of.top_k.quotient(next[i]) * of.token_stride;
            find(step + 1);
            const int stage = free_stage();
            if (thread == 0) copy_boxes(tile, step, stage);
            const std::uint32_t to = (is_gathered(a) ? shared.a(stage) : shared.b(stage)) + place_in_rows();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool row = step * Block::depth + 16 * i <= last;
#pragma unroll
                for (int block = 0; block < blocks; ++block) {
                    const bool read = row && 64 * block < left;
                    hopper::copy_16(to + i * 2048 + block * Block::turned_block,
                                    read ? from[i] + 64 * block : of.tokens, read);
                }
            }
            close_step();
        }
    }
};

}  // namespace steelyard::cuda::detail
