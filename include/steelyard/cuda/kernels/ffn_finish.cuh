// What a grouped product does with its sums: the activation, its gradient, a plain store, an addition.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "steelyard/cuda/kernels/ffn_function.cuh"
#include "steelyard/cuda/kernels/grouped_product.cuh"

namespace steelyard::cuda {

namespace detail {

__device__ inline std::uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
}
__device__ inline float2 unpack_bf16(std::uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

/// 16 rows by 64 columns of bf16 on their way between a warp's registers and global memory, through shared memory: so
/// that global accesses are whole lines. In registers, pair 2 j + i of a lane is row lane / 4 + 8 i, columns
/// 8 j + 2 (lane % 4) and the next: the order of hopper::multiply_256. Rows in shared memory are 144 bytes apart, which
/// spreads either order over the banks.
struct WarpChunk {
    static constexpr int pitch = 144, columns = 64;
    char* at;
    int lane;

    __device__ std::uint32_t* pair(int j, int i) const {
        return reinterpret_cast<std::uint32_t*>(at + (lane / 4 + 8 * i) * pitch + j * 16 + lane % 4 * 4);
    }
    /// Of the first `rows` rows and `width` columns, a multiple of 8.
    __device__ void store(const std::uint32_t (&pairs)[16], bf16* to, index_t stride, int rows, int width) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            *pair(j, 0) = pairs[2 * j];
            *pair(j, 1) = pairs[2 * j + 1];
        }
        __syncwarp();
        each_line(rows, width, [&](int row, int column, char* line) {
            *reinterpret_cast<uint4*>(to + row * stride + column) = *reinterpret_cast<const uint4*>(line);
        });
        __syncwarp();
    }
    /// Elements outside become 0.
    __device__ void load(std::uint32_t (&pairs)[16], const bf16* from, index_t stride, int rows, int width) const {
        each_line(16, columns, [&](int row, int column, char* line) {
            const bool inside = row < rows && column < width;
            *reinterpret_cast<uint4*>(line) =
                inside ? *reinterpret_cast<const uint4*>(from + row * stride + column) : uint4{};
        });
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            pairs[2 * j] = *pair(j, 0);
            pairs[2 * j + 1] = *pair(j, 1);
        }
        __syncwarp();
    }

private:
    template <class Body>
    __device__ void each_line(int rows, int width, Body&& body) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 4 * i + lane / 8, column = lane % 8 * 8;
            if (row < rows && column < width) body(row, column, at + row * pitch + lane % 8 * 16);
        }
    }
};

}  // namespace detail

/// A matrix of bf16 with rows of `width` elements, `stride` apart; or none.
struct RowsOut {
    bf16* data = nullptr;
    index_t stride = 0;
};

/// gate and up (=) as they are, where wanted, and inner (=) their activation. Gated: a tile is 128 columns of each.
template <bool gated, bool swiglu>
struct FinishHidden {
    FunctionOf function;
    RowsOut gate, up, inner;
    int width = 0;  // h

    __device__ void operator()(const FinishedTile& tile, const float (&d)[128], char* at, int lane) const {
        constexpr int tile_columns = gated ? 128 : 256;
        if (tile.rows <= 0) return;
        const detail::WarpChunk chunk{at, lane};
#pragma unroll
        for (int c = 0; c < tile_columns / 64; ++c) {
            const int column = tile.n * tile_columns + 64 * c, columns = width - column;
            if (columns <= 0) break;
            std::uint32_t pairs[16];
            const auto store = [&](const RowsOut& out) {
                chunk.store(pairs, out.data + tile.row * out.stride + column, out.stride, tile.rows, columns);
            };
            if (up.data != nullptr) {
                constexpr int half = gated ? 64 : 0;
                if constexpr (gated) {
#pragma unroll
                    for (int p = 0; p < 16; ++p) pairs[p] = detail::pack_bf16(d[32 * c + 2 * p], d[32 * c + 2 * p + 1]);
                    store(gate);
                }
#pragma unroll
                for (int p = 0; p < 16; ++p)
                    pairs[p] = detail::pack_bf16(d[half + 32 * c + 2 * p], d[half + 32 * c + 2 * p + 1]);
                store(up);
            }
            if (inner.data == nullptr) continue;
#pragma unroll
            for (int p = 0; p < 16; ++p) {
                const int i = 32 * c + 2 * p;
                pairs[p] = detail::pack_bf16(value(d, i), value(d, i + 1));
            }
            store(inner);
        }
    }

private:
    __device__ float value(const float (&d)[128], int i) const {
        if constexpr (swiglu) return swiglu_point(d[i], d[i + 64]).a;
        if constexpr (gated) return point_of(function, d[i], d[i + 64]).a;
        return point_of(function, 0.0f, d[i]).a;
    }
};

/// rows (=) the sums.
struct FinishRows {
    RowsOut rows;
    int width = 0;

    __device__ void operator()(const FinishedTile& tile, const float (&d)[128], char* at, int lane) const {
        if (tile.rows <= 0) return;
        const detail::WarpChunk chunk{at, lane};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int column = tile.n * 256 + 64 * c, columns = width - column;
            if (columns <= 0) break;
            std::uint32_t pairs[16];
#pragma unroll
            for (int p = 0; p < 16; ++p) pairs[p] = detail::pack_bf16(d[32 * c + 2 * p], d[32 * c + 2 * p + 1]);
            chunk.store(pairs, rows.data + tile.row * rows.stride + column, rows.stride, tile.rows, columns);
        }
    }
};

/// The sums are da, without the combine weight w: dgate, dup, inner (=) w da a', w a, and for each tile of columns of a
/// row its part (=) of the weight's gradient, <da, a>.
template <bool gated, bool swiglu>
struct FinishHiddenGradient {
    FunctionOf function;
    const bf16 *gate, *up;  // kept
    index_t gate_stride, up_stride;
    RowsOut dgate, dup, inner;
    const float* weight;  // [T, K], or null: 1
    index_t weight_stride;
    const std::int32_t* choice;
    int top_k;
    float* parts;  // [N, n_tiles], or null
    int n_tiles;
    int width;  // h

    __device__ void operator()(const FinishedTile& tile, const float (&d)[128], char* at, int lane) const {
        if (tile.rows <= 0) return;
        const detail::WarpChunk chunk{at, lane};
        float factor[2] = {1.0f, 1.0f}, part[2] = {0.0f, 0.0f};
        for (int i = 0; i < 2; ++i) {
            const int row = lane / 4 + 8 * i;
            if (weight == nullptr || row >= tile.rows) continue;
            const std::int32_t which = choice[tile.row + row];
            factor[i] = weight[which / top_k * weight_stride + which % top_k];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int column = tile.n * 256 + 64 * c, columns = width - column;
            if (columns <= 0) break;
            std::uint32_t of_gate[16], of_up[16], of_inner[16];
            if constexpr (gated)
                chunk.load(of_gate, gate + tile.row * gate_stride + column, gate_stride, tile.rows, columns);
            chunk.load(of_up, up + tile.row * up_stride + column, up_stride, tile.rows, columns);
#pragma unroll
            for (int p = 0; p < 16; ++p) {
                const float w = factor[p % 2];
                const float2 g = gated ? detail::unpack_bf16(of_gate[p]) : float2{}, u = detail::unpack_bf16(of_up[p]);
                const float da0 = d[32 * c + 2 * p], da1 = d[32 * c + 2 * p + 1];
                const FunctionPoint p0 = point(g.x, u.x), p1 = point(g.y, u.y);
                part[p % 2] += da0 * p0.a + da1 * p1.a;
                if constexpr (gated) of_gate[p] = detail::pack_bf16(w * da0 * p0.by_gate, w * da1 * p1.by_gate);
                of_up[p] = detail::pack_bf16(w * da0 * p0.by_up, w * da1 * p1.by_up);
                of_inner[p] = detail::pack_bf16(w * p0.a, w * p1.a);
            }
            const auto store = [&](const std::uint32_t(&pairs)[16], const RowsOut& out) {
                chunk.store(pairs, out.data + tile.row * out.stride + column, out.stride, tile.rows, columns);
            };
            if constexpr (gated) store(of_gate, dgate);
            store(of_up, dup);
            store(of_inner, inner);
        }
        for (int i = 0; i < 2; ++i) {
            part[i] += __shfl_xor_sync(~0u, part[i], 1);
            part[i] += __shfl_xor_sync(~0u, part[i], 2);
            const int row = lane / 4 + 8 * i;
            if (parts != nullptr && lane % 4 == 0 && row < tile.rows) parts[(tile.row + row) * n_tiles + tile.n] = part[i];
        }
    }

private:
    __device__ FunctionPoint point(float g, float u) const {
        if constexpr (swiglu) return swiglu_point(g, u);
        return point_of(function, g, u);
    }
};

/// Gradients of weights (+=), [E, m, n]: of one matrix, or of two that have the same rows of k.
struct FinishAdd {
    bf16* out[2];
    index_t expert_stride[2], stride[2];
    int m = 0, n = 0;

    __device__ void operator()(const FinishedTile& tile, const float (&d)[128], char* at, int lane) const {
        constexpr int pitch = detail::WarpChunk::pitch;
        const int rows = m - tile.m;
        if (rows <= 0 || out[tile.matrix] == nullptr) return;
        bf16* const to = out[tile.matrix] + tile.expert * expert_stride[tile.matrix] + tile.m * stride[tile.matrix];
        // In float until the sum is whole: 32 columns at a time.
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const int column = tile.n * 256 + 32 * c;
            if (column >= n) break;
#pragma unroll
            for (int p = 0; p < 8; ++p)
                *reinterpret_cast<float2*>(at + (lane / 4 + 8 * (p % 2)) * pitch + p / 2 * 32 + lane % 4 * 8) =
                    float2{d[16 * c + 2 * p], d[16 * c + 2 * p + 1]};
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = 8 * i + lane / 4, first = column + lane % 4 * 8;
                if (row >= rows || first >= n) continue;
                uint4* const place = reinterpret_cast<uint4*>(to + row * stride[tile.matrix] + first);
                const float4* const sums = reinterpret_cast<const float4*>(at + row * pitch + lane % 4 * 32);
                const float4 low = sums[0], high = sums[1];
                uint4 held = *place;
                held.x = add(held.x, low.x, low.y);
                held.y = add(held.y, low.z, low.w);
                held.z = add(held.z, high.x, high.y);
                held.w = add(held.w, high.z, high.w);
                *place = held;
            }
            __syncwarp();
        }
    }

private:
    __device__ static std::uint32_t add(std::uint32_t pair, float low, float high) {
        const float2 old = detail::unpack_bf16(pair);
        return detail::pack_bf16(old.x + low, old.y + high);
    }
};

/// dweight[t, k] += the parts of row r, in order of the columns, for every row of the plan.
__global__ inline void add_weight_parts(const float* parts, int n_tiles, const index_t* offsets, int experts,
                                        const std::int32_t* choice, int top_k, float* dweight, index_t stride) {
    const index_t row = offsets[0] + static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= offsets[experts]) return;
    float sum = 0;
    for (int n = 0; n < n_tiles; ++n) sum += parts[row * n_tiles + n];
    const std::int32_t which = choice[row];
    dweight[which / top_k * stride + which % top_k] += sum;
}

}  // namespace steelyard::cuda
