// Where a warp lays its results out in shared memory, and how they leave from there.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

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

/// pairs (+= or =) the eight sums that lie with them.
template <Write write>
__device__ void write_pairs(std::uint32_t (&pairs)[4], const float* sums) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const float2 old = write == Write::add ? unpack_bf16(pairs[q]) : float2{};
        pairs[q] = pack_bf16(old.x + sums[2 * q], old.y + sums[2 * q + 1]);
    }
}

/// A room is 16 rows of 64 columns, swizzled as the copy engine has them. It is written and read 16 columns at a time,
/// as four 8 x 8 matrices: this lane's row of these. Register q of a lane is then row lane / 4 + 8 (q % 2), columns
/// 16 part + 8 (q / 2) + 2 (lane % 4) and the next, which hopper::multiply has in d[8 part + 2 q] and the next.
constexpr int room_bytes = 16 * 128;
__device__ inline std::uint32_t matrices_at(std::uint32_t room, int lane, int part) {
    const int row = lane % 16, chunk = 2 * part + lane / 16;
    return room + row * 128 + ((chunk ^ row % 8) << 4);
}

/// room (=) value(i) of the sum i of 32 that this lane has of its columns.
template <class Value>
__device__ void fill_room(std::uint32_t room, int lane, const Value& value) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        std::uint32_t matrices[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) matrices[q] = pack_bf16(value(8 * part + 2 * q), value(8 * part + 2 * q + 1));
        hopper::store_matrices(matrices_at(room, lane, part), matrices);
    }
}

/// The first `rows` of 16 rows and `width` of 64 columns, a multiple of 8, of a room.
__device__ inline void store_lines(std::uint32_t room, int lane, const RowsOut& out, index_t row, int column, int rows,
                                   int width) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = 4 * i + lane / 8, chunk = lane % 8;
        if (r >= rows || chunk * 8 >= width) continue;
        uint4 line;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                     : "r"(room + r * 128 + ((chunk ^ r % 8) << 4)));
        *reinterpret_cast<uint4*>(out.data + (row + r) * out.stride + column + chunk * 8) = line;
    }
}
/// See Rooms::send. The caller has published what was written, and closes the group of stores.
template <class Steps>
__device__ void store_room(std::uint32_t room, const Steps& steps, int which, const RowsOut& out,
                           const FinishedTile& tile, int column, int width) {
    if (tile.rows == 16) {
        if (steps.lane == 0) hopper::store_box(steps.maps.out[which], room, column, static_cast<int>(tile.row));
    } else {
        store_lines(room, steps.lane, out, tile.row, column, tile.rows, width - column);
    }
}

/// For a finish that reads nothing, and writes up to `rooms` rooms for 128 columns of a tile: two of the warp's own,
/// and where these are too few those of one step that brings nothing.
template <int rooms>
struct FinishOfRooms {
    static constexpr int warps_of_store = 1;
    template <class Block>
    static constexpr int extra_steps = Block::columns / 128 * rooms > Block::chunk_bytes / room_bytes ? 1 : 0;
    template <class Block>
    static constexpr int extra_bytes() {
        return 0;
    }
    template <class Block, class Tile>
    __device__ static void bring(const ProductMaps&, const Tile&, int, std::uint32_t, std::uint32_t) {}
};

/// The rooms of such a finish for one tile. Each is free when the warp comes to it, almost always without a wait: while
/// the copy engine reads them, the warp goes on to the products of its next tile.
template <class Steps, class Finish>
class Rooms {
public:
    __device__ explicit Rooms(const Steps& steps)
        : steps_(steps), step_(has_step ? steps.take() + steps.row * 128 : 0) {}

    /// Number `i`, known at compile time once the loops around are unrolled. Numbers ascend; some may be left out.
    __device__ std::uint32_t operator()(int i) const {
        if (i < own) {
            // Of the tile before: long done.
            if (i == 0)
                wait_for_all_but<0>();
            else
                wait_for_all_but<own - 1>();
            return steps_.chunk + i * room_bytes;
        }
        if (has_step && i < own + of_step) return step_ + (i - own) * Block::rows * 128;
        // The own ones again.
        if (i < 2 * own + of_step)
            wait_for_all_but<own + of_step - 1>();
        else
            wait_for_all_but<own - 1>();
        return steps_.chunk + (i - of_step) % own * room_bytes;
    }
    /// A room that was filled, to grouped rows: whole ones by the copy engine, those of an expert's last tile line by
    /// line: behind them are another expert's. `which` is the map of `out`.
    __device__ void send(std::uint32_t room, int which, const RowsOut& out, const FinishedTile& tile, int column,
                         int width) const {
        hopper::publish_shared();
        __syncwarp();
        store_room(room, steps_, which, out, tile, column, width);
        if (steps_.lane == 0) hopper::close_stores();
    }
    /// Every tile of every warp ends so.
    __device__ void close() const {
        if constexpr (has_step) steps_.give_when_stored();
    }

private:
    using Block = typename Steps::Block;
    static constexpr bool has_step = Finish::template extra_steps<Block> > 0;
    static constexpr int own = Block::chunk_bytes / room_bytes;
    static constexpr int of_step = has_step ? Block::stage_bytes / (Block::rows * 128) : 0;

    template <int left>
    __device__ void wait_for_all_but() const {
        if (steps_.lane == 0) hopper::wait_stores_read<left>();
        __syncwarp();
    }

    const Steps& steps_;
    std::uint32_t step_;
};

}  // namespace detail

}  // namespace steelyard::cuda
