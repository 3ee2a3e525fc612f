// The warpgroup that brings the operands of a grouped product to shared memory.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/grouped_call.cuh"

namespace steelyard::cuda::detail {

/// The loading warpgroup.
template <Bring a, Bring b, class Block, class Finish>
struct ProductLoader {
    static_assert(!is_gathered(b), "what is gathered is a, the smaller one");
    static constexpr bool gathers = is_gathered(a), over_rows = is_turned(a);
    static constexpr int rows_at_once = 16;  // that the warpgroup gathers, 16 bytes a thread
    static constexpr int copied_bytes = (gathers ? 0 : Block::a_bytes) + Block::b_bytes;
    using Tile = ProductTile<over_rows, Block::pairs>;

    const ProductMaps& maps;
    const GroupedProduct& of;
    ProductShared<Block> shared;
    int thread;      // 0 to 127
    int rank;        // of the block in its pair
    int issued = 0;  // steps

    // A thread gathers 16 bytes, number thread % 8, of rows thread / 8, and so on in steps of 16. All of these are at
    // the same place of the swizzle.
    __device__ std::uint32_t place_in_rows() const { return thread / 8 * 128 + ((thread % 8 ^ thread / 8 % 8) << 4); }

    __device__ void run(int total) {
        TileWalk walk(shared.first(), of.experts);
        for (int index = blockIdx.x / Block::cluster; index < total; index += gridDim.x / Block::cluster) {
            walk.seek(index);
            const Tile tile(of, walk, index, rank);
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
    }

    /// The next step's stage, when it is free.
    __device__ int free_stage() const {
        const int stage = issued % Block::stages;
        hopper::wait(shared.empty(stage), issued / Block::stages % 2 ^ 1);
        return stage;
    }
    /// The stage is full when what every thread has copied to it has come: nobody here waits for that.
    __device__ void close_step() {
        if constexpr (gathers) hopper::arrive_when_copied(shared.full(issued % Block::stages));
        ++issued;
    }

    __device__ void copy_boxes(const Tile& tile, int step, int stage) const {
        const std::uint32_t full = shared.full(stage), to_a = shared.a(stage), to_b = shared.b(stage);
        hopper::arrive_expecting(full, copied_bytes);  // the other block's half of b too
        const int segment = over_rows || step < of.k_steps ? 0 : 1, k = (step - segment * of.k_steps) * Block::depth;
        const int row = static_cast<int>(tile.first_row);
        if constexpr (a == Bring::rows) hopper::copy_box(to_a, maps.a[segment], full, k, row + tile.m * Block::rows);
        for (int half = 0; half < 2; ++half) {
            if (tile.shares_b && half != rank) continue;  // the other block's, for both
            const auto copy = [&](const auto&... what) {
                if (tile.shares_b)
                    hopper::share_box(what...);
                else
                    hopper::copy_box(what...);
            };
            if constexpr (b == Bring::weights) {
                constexpr int width = Block::columns / 2;
                const int n = of.halved ? tile.n * width : tile.n * Block::columns + half * width;
                copy(to_b + half * Block::b_bytes / 2, maps.b[half], full, k, n, tile.expert);
            } else {
                constexpr int boxes = Block::columns / 128;
                for (int i = half * boxes; i < (half + 1) * boxes; ++i) {
                    const std::uint32_t to = to_b + i * Block::turned_block;
                    const int n = tile.n * Block::columns + 64 * i;
                    if constexpr (b == Bring::weights_turned)
                        copy(to, maps.b[segment], full, n, k, tile.expert);
                    else
                        copy(to, maps.b[tile.matrix], full, n, row + k);
                }
            }
        }
    }

    /// The first chunk of a token's row, in units of 16 bytes: half the registers of a pointer, and one instruction
    /// to make an address of it.
    __device__ std::uint32_t token_at(std::int32_t choice) const {
        return static_cast<std::uint32_t>(of.top_k.quotient(choice)) * static_cast<std::uint32_t>(of.token_stride / 8);
    }
    __device__ const uint4* chunks() const { return reinterpret_cast<const uint4*>(of.tokens); }

    /// All steps of a tile whose rows are tokens', k along them. Rows behind the expert's last become 0.
    __device__ void load_gathered(const Tile& tile) {
        constexpr int own_rows = Block::rows / rows_at_once;
        std::uint32_t from[own_rows];
        const std::int32_t* const choice = of.choice + tile.first_row + tile.m * Block::rows;
        const int last = tile.rows - 1 - tile.m * Block::rows;  // below 0: a tile that is none, and may read any token
        for (int i = 0; i < own_rows; ++i) {
            const int row = min(thread / 8 + rows_at_once * i, last);
            from[i] = row < 0 ? 0 : token_at(choice[row]) + thread % 8;
        }
        for (int step = 0; step < tile.steps; ++step) {
            const int stage = free_stage();
            if (thread == 0) copy_boxes(tile, step, stage);
            const bool inside = step * Block::depth + thread % 8 * 8 < of.token_width;
            const int bytes = inside ? 16 : 0;
            const uint4* const at = chunks() + (inside ? step * (Block::depth / 8) : 0);
            const std::uint32_t to = shared.a(stage) + place_in_rows();
            const auto copy = [&](auto is_row) {
#pragma unroll
                for (int i = 0; i < own_rows; ++i)
                    hopper::copy_16(to + i * rows_at_once * 128, at + from[i], is_row(i) ? bytes : 0);
            };
            if (last + 1 >= Block::rows)
                copy([](int) { return true; });
            else
                copy([&](int i) { return thread / 8 + rows_at_once * i <= last; });
            close_step();
        }
    }

    /// All steps of a tile whose k are tokens. Rows behind the expert's last become 0.
    __device__ void load_gathered_turned(const Tile& tile) {
        constexpr int blocks = Block::multipliers, own_rows = Block::depth / rows_at_once;
        const int last = tile.rows - 1;
        const std::int32_t* const choice = of.choice + tile.first_row;
        int bytes[blocks];
        std::uint32_t column[blocks];
        for (int block = 0; block < blocks; ++block) {
            const int first = tile.m * Block::rows + 64 * block + thread % 8 * 8;
            bytes[block] = first < of.token_width ? 16 : 0;
            column[block] = first < of.token_width ? first / 8 : 0;
        }
        // Looked up a step ahead; behind the last row, the last again.
        std::int32_t next[own_rows];
        const auto find = [&](int step) {
#pragma unroll
            for (int i = 0; i < own_rows; ++i)
                next[i] = choice[min(step * Block::depth + thread / 8 + rows_at_once * i, last)];
        };
        find(0);
        for (int step = 0; step < tile.steps; ++step) {
            std::uint32_t from[own_rows];
#pragma unroll
            for (int i = 0; i < own_rows; ++i) from[i] = token_at(next[i]);
            find(step + 1);
            const int stage = free_stage();
            if (thread == 0) copy_boxes(tile, step, stage);
            const std::uint32_t to = shared.a(stage) + place_in_rows();
            const auto copy = [&](auto is_row) {
#pragma unroll
                for (int i = 0; i < own_rows; ++i)
#pragma unroll
                    for (int block = 0; block < blocks; ++block)
                        hopper::copy_16(to + i * rows_at_once * 128 + block * Block::turned_block,
                                        chunks() + (from[i] + column[block]), is_row(i) ? bytes[block] : 0);
            };
            if ((step + 1) * Block::depth <= tile.rows)
                copy([](int) { return true; });
            else
                copy([&](int i) { return step * Block::depth + thread / 8 + rows_at_once * i <= last; });
            close_step();
        }
    }
};

}  // namespace steelyard::cuda::detail
