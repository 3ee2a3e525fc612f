// What a grouped product does with its sums, where rows are the result's: the activation, its gradient, a plain store.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/ffn_function.cuh"
#include "steelyard/cuda/kernels/finish_rooms.cuh"

namespace steelyard::cuda {

/// gate and up (=) as they are, where wanted, and inner (=) their activation. Gated: a tile is half columns of each.
template <bool gated, bool swiglu>
struct FinishHidden : detail::FinishOfRooms<gated ? 3 : 4> {
    FunctionOf function;
    RowsOut gate, up, inner;  // maps 0, 1, 2
    int width = 0;            // h

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        constexpr int tile_columns = gated ? Block::columns / 2 : Block::columns, half = gated ? Block::sums / 2 : 0;
        const detail::Rooms<Steps, FinishHidden> rooms(steps);
#pragma unroll
        for (int c = 0; c < tile_columns / 64; ++c) {
            const int column = tile.n * tile_columns + 64 * c;
            if (column >= width || tile.rows <= 0) break;
            const auto send = [&](int number, int which, const RowsOut& out, const auto& value) {
                const std::uint32_t room = rooms(number);
                detail::fill_room(room, steps.lane, [&](int i) { return value(32 * c + i); });
                rooms.send(room, which, out, tile, column, width);
            };
            constexpr int each = gated ? 3 : 2;
            if (up.data != nullptr) {
                if constexpr (gated) send(each * c, 0, gate, [&](int i) { return d[i]; });
                send(each * c + each - 2, 1, up, [&](int i) { return d[half + i]; });
            }
            if (inner.data != nullptr) send(each * c + each - 1, 2, inner, [&](int i) { return value<half>(d, i); });
        }
        rooms.close();
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
struct FinishRows : detail::FinishOfRooms<2> {
    RowsOut rows;  // map 0
    int width = 0;

    template <class Steps>
    __device__ void operator()(const FinishedTile& tile, const float (&d)[Steps::Block::sums],
                               const Steps& steps) const {
        using Block = typename Steps::Block;
        const detail::Rooms<Steps, FinishRows> rooms(steps);
#pragma unroll
        for (int c = 0; c < Block::columns / 64; ++c) {
            const int column = tile.n * Block::columns + 64 * c;
            if (column >= width || tile.rows <= 0) break;
            const std::uint32_t room = rooms(c);
            detail::fill_room(room, steps.lane, [&](int i) { return d[32 * c + i]; });
            rooms.send(room, 0, this->rows, tile, column, width);
        }
        rooms.close();
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

    static constexpr int warps_of_store = 1;
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
        // Results lie where gate and up came, and beside them.
        constexpr int place = Block::rows * 128, places = gated ? 3 : 2;
        static_assert(places * place <= Block::stage_bytes);
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
            const std::uint32_t of_gate = steps.take() + steps.row * 128, of_up = of_gate + (places - 2) * place,
                                of_inner = of_up + place;
            if (column >= width || tile.rows <= 0) {
                steps.give();
                continue;
            }
            // Read one part ahead: reads of shared memory don't overtake writes to it.
            std::uint32_t next_gates[4], next_ups[4];
            const auto read = [&](int j) {
                if constexpr (gated) hopper::load_matrices(detail::matrices_at(of_gate, lane, j), next_gates);
                hopper::load_matrices(detail::matrices_at(of_up, lane, j), next_ups);
            };
            read(0);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                std::uint32_t gates[4], ups[4], inners[4];
#pragma unroll
                for (int q = 0; q < 4; ++q) gates[q] = gated ? next_gates[q] : 0, ups[q] = next_ups[q];
                if (j < 3) read(j + 1);
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    const float w = factor[q % 2];
                    const float2 g = gated ? detail::unpack_bf16(gates[q]) : float2{}, u = detail::unpack_bf16(ups[q]);
                    const float da0 = d[32 * c + 8 * j + 2 * q], da1 = d[32 * c + 8 * j + 2 * q + 1];
                    const FunctionPoint p0 = point(g.x, u.x), p1 = point(g.y, u.y);
                    part[q % 2] += da0 * p0.a + da1 * p1.a;
                    const float wda0 = w * da0, wda1 = w * da1;
                    if constexpr (gated) gates[q] = detail::pack_bf16(wda0 * p0.by_gate, wda1 * p1.by_gate);
                    ups[q] = detail::pack_bf16(wda0 * p0.by_up, wda1 * p1.by_up);
                    inners[q] = detail::pack_bf16(w * p0.a, w * p1.a);
                }
                if constexpr (gated) hopper::store_matrices(detail::matrices_at(of_gate, lane, j), gates);
                hopper::store_matrices(detail::matrices_at(of_up, lane, j), ups);
                hopper::store_matrices(detail::matrices_at(of_inner, lane, j), inners);
            }
            hopper::publish_shared();
            __syncwarp();
            if constexpr (gated) detail::store_room(of_gate, steps, 0, dgate, tile, column, width);
            detail::store_room(of_up, steps, 1, dup, tile, column, width);
            detail::store_room(of_inner, steps, 2, inner, tile, column, width);
            if (lane == 0) hopper::close_stores();
            steps.give_when_stored();
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

}  // namespace steelyard::cuda
