// Attention's kernels. A block is eight warps: eight queries, or eight keys, of one head of one sequence, a warp for
// each. The other side of a product comes through shared memory, 32 rows and 32 columns at a time. See attention.hpp.
#pragma once

#include "kernels.cuh"

namespace pretrain::kernels {

inline constexpr int attention_warps = 8;

/// Rows of the other side, with a column more so that a warp can read down a column too.
template <class T>
using Tile = T[32][33];

/// tile (=) rows [begin, begin + 32) and columns [column, column + 32) of b [rows, columns], zeros outside.
template <class T>
__device__ void load_tile(const T* b, index_t stride, index_t begin, index_t rows, index_t column, index_t columns,
                          Tile<T>& tile) {
    __syncthreads();  // what was in it has been read
    for (int at = static_cast<int>(threadIdx.x); at < 32 * 32; at += 32 * attention_warps) {
        const index_t r = begin + at / 32, c = column + at % 32;
        tile[at / 32][at % 32] = r < rows && c < columns ? b[r * stride + c] : T(0);
    }
    __syncthreads();
}

/// In each lane: a · row begin + lane of b [rows, head]. All warps of the block call it, each with an a [head] of its
/// own, or null.
template <class T>
__device__ T dot_with_row(const T* a, const T* b, index_t stride, index_t begin, index_t rows, index_t head,
                          Tile<T>& tile) {
    const int lane = lane_of_warp();
    T dot = 0;
    for (index_t column = 0; column < head; column += 32) {
        load_tile(b, stride, begin, rows, column, head, tile);
        const T mine = a != nullptr && column + lane < head ? a[column + lane] : T(0);
        for (int c = 0; c < 32; ++c) dot += __shfl_sync(~0u, mine, c) * tile[lane][c];
    }
    return dot;
}

/// y (=) the sum over n in [begin, rows) of weight(n) times row n of b [rows, head]; weight is asked for each n by one
/// lane of the warp. All warps of the block call it, each with a y [head] of its own, or null.
template <class T, class Weight>
__device__ void sum_of_rows(Weight weight, const T* b, index_t stride, index_t begin, index_t rows, index_t head,
                            Tile<T>& tile, T* y) {
    const int lane = lane_of_warp();
    for (index_t column = 0; column < head; column += 32) {
        T sum = 0;
        for (index_t first = begin; first < rows; first += 32) {
            load_tile(b, stride, first, rows, column, head, tile);
            const T mine = first + lane < rows ? weight(first + lane) : T(0);
            for (int n = 0; n < 32; ++n) sum += __shfl_sync(~0u, mine, n) * tile[n][lane];
        }
        if (y != nullptr && column + lane < head) y[column + lane] = sum;
    }
}

/// Where the head of a sequence that this block works on lies, and which of its positions are this block's.
struct Place {
    index_t width, stride, length;
    index_t unit;         ///< sequence · heads + head
    index_t token, head;  ///< the sequence's first token, the head's first channel
    index_t first, mine;  ///< positions: the block's first, this warp's
    bool here;            ///< this warp's is one

    __device__ Place(index_t length_of, index_t heads, index_t head_width)
        : width(heads * head_width),
          stride(3 * width),
          length(length_of),
          unit(blockIdx.x),
          token(unit / heads * length_of),
          head(unit % heads * head_width),
          first(static_cast<index_t>(blockIdx.y) * attention_warps),
          mine(first + threadIdx.x / 32),
          here(mine < length_of) {}

    /// Keys that any query of the block sees.
    [[nodiscard]] __device__ index_t seen() const {
        return first + attention_warps < length ? first + attention_warps : length;
    }
    /// The head's channels of the sequence's first token in qkv: of queries, keys or values.
    template <class T>
    [[nodiscard]] __device__ T* of(T* qkv, int which) const {
        return qkv + token * stride + which * width + head;
    }
    /// Those of y or dy.
    template <class T>
    [[nodiscard]] __device__ T* of_output(T* y) const {
        return y + token * width + head;
    }
    /// This warp's row of [S, H, L, L].
    template <class T>
    [[nodiscard]] __device__ T* row(T* scores) const {
        return scores + (unit * length + mine) * length;
    }
};

/// Every lane reads of a row what it has written itself: position j is lane j % 32's.
template <class T>
__global__ void attend(const T* qkv, index_t length, index_t heads, index_t head, T scale, T* probabilities, T* y) {
    __shared__ Tile<T> tile;
    const Place at(length, heads, head);
    const int lane = lane_of_warp();
    const T* query = at.here ? at.of(qkv, 0) + at.mine * at.stride : nullptr;
    T* p = at.row(probabilities);
    const index_t end = at.here ? at.mine + 1 : 0;  // keys that this query sees
    T top = -INFINITY;
    for (index_t begin = 0; begin < at.seen(); begin += 32) {
        const T score = dot_with_row(query, at.of(qkv, 1), at.stride, begin, at.seen(), head, tile);
        if (begin + lane >= end) continue;
        p[begin + lane] = score;
        top = max(top, score);
    }
    top = warp_max(top);
    T sum = 0;
    for (index_t j = lane; j < end; j += 32) {
        const T e = exp(scale * (p[j] - top));
        p[j] = e;
        sum += e;
    }
    const T share = T(1) / warp_sum(sum);
    for (index_t j = lane; j < end; j += 32) p[j] *= share;
    const auto weight = [&](index_t j) { return j < end ? p[j] : T(0); };
    sum_of_rows(weight, at.of(qkv, 2), at.stride, 0, at.seen(), head, tile,
                at.here ? at.of_output(y) + at.mine * at.width : nullptr);
}

/// The scores' gradients, and from them those of the queries.
template <class T>
__global__ void attend_gradient_of_queries(const T* qkv, const T* probabilities, const T* dy, index_t length,
                                           index_t heads, index_t head, T scale, T* dscores, T* dqkv) {
    __shared__ Tile<T> tile;
    const Place at(length, heads, head);
    const int lane = lane_of_warp();
    const T* dout = at.here ? at.of_output(dy) + at.mine * at.width : nullptr;
    const T* p = at.row(probabilities);
    T* ds = at.row(dscores);
    const index_t end = at.here ? at.mine + 1 : 0;
    T along = 0;
    for (index_t begin = 0; begin < at.seen(); begin += 32) {
        const T dp = dot_with_row(dout, at.of(qkv, 2), at.stride, begin, at.seen(), head, tile);
        if (begin + lane >= end) continue;
        ds[begin + lane] = dp;
        along += p[begin + lane] * dp;
    }
    along = warp_sum(along);
    for (index_t j = lane; j < end; j += 32) ds[j] = p[j] * (ds[j] - along) * scale;
    const auto weight = [&](index_t j) { return j < end ? ds[j] : T(0); };
    sum_of_rows(weight, at.of(qkv, 1), at.stride, 0, at.seen(), head, tile,
                at.here ? at.of(dqkv, 0) + at.mine * at.stride : nullptr);
}

/// The gradients of keys and values, from all queries that see them.
template <class T>
__global__ void attend_gradient_of_keys(const T* qkv, const T* probabilities, const T* dy, const T* dscores,
                                        index_t length, index_t heads, index_t head, T* dqkv) {
    __shared__ Tile<T> tile;
    const Place at(length, heads, head);
    const auto column_of = [&](const T* scores) {
        const T* column = scores + at.unit * length * length + at.mine;
        return [=](index_t i) { return at.here && i >= at.mine ? column[i * length] : T(0); };
    };
    sum_of_rows(column_of(dscores), at.of(qkv, 0), at.stride, at.first, length, head, tile,
                at.here ? at.of(dqkv, 1) + at.mine * at.stride : nullptr);
    sum_of_rows(column_of(probabilities), at.of_output(dy), at.width, at.first, length, head, tile,
                at.here ? at.of(dqkv, 2) + at.mine * at.stride : nullptr);
}

}  // namespace pretrain::kernels
