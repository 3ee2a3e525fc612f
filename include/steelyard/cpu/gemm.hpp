// Matrix products of one thread, with one fixed order of accumulation.
//
// Every element of the result is a chain of multiply-adds over ascending k, cut into blocks of `k_block`:
//
//     c (= or +=) sum of block 0;   c += sum of block 1;   ...
//
// The same register kernel computes whole and partial tiles (missing lanes are padded), so an element depends
// only on its own row of a, its own column of b, k, and what c held: not on m, n, the position in a tile, the
// strides or the alignment of a pointer. Bits change with the compiler and its target flags (fused multiply-add or
// not).
//
// Why not Eigen's products: they allocate their packing blocks, start threads of their own, and switch to other
// code with another order of accumulation where a matrix is small.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "steelyard/cpu/vector.hpp"

namespace steelyard::cpu {

using steelyard::Write;

namespace detail::gemm {

/// Sizes of the product's blocks. One operand (*broadcast*) is read element by element, `rows` rows at a time; the
/// other (*panel*) is packed into `panel_block x k_block` elements, read as whole vectors, `vectors` at a time.
template <class T>
struct Blocks {
    static constexpr int lanes = Simd<T>::lanes;
    static constexpr int rows = vector_registers == 32 ? 8 : 6;
    static constexpr int vectors = vector_registers == 32 ? 3 : 2;
    static constexpr int width = vectors * lanes;            // columns of one panel
    static constexpr int panel_block = 192 / width * width;  // columns that are packed at once
    static constexpr int k_block = 2048 / static_cast<int>(sizeof(T));
};

/// tile[r][j] = sum_p a[r][p] * panel[p][j], in registers. Row r of `a` starts at a_rows[r]; `step` apart in p.
template <class T, int Vectors, int Step>
void register_tile(index_t k, const T* const* a_rows, const T* panel, T* tile) {
    using B = Blocks<T>;
    using vec = typename Simd<T>::vec;
    vec sum[B::rows][Vectors] = {};
    const T* a[B::rows];
    for (int r = 0; r < B::rows; ++r) a[r] = a_rows[r];
    for (index_t p = 0; p < k; ++p) {
        vec b[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) b[v] = load(panel + p * B::width + v * B::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < B::rows; ++r) {
            const T left = a[r][p * Step];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sum[r][v] += left * b[v];
        }
    }
    for (int r = 0; r < B::rows; ++r)
        for (int v = 0; v < Vectors; ++v) store(tile + r * B::width + v * B::lanes, sum[r][v]);
}

template <class T, int Step>
void register_tile(index_t k, index_t columns, const T* const* a_rows, const T* panel, T* tile) {
    constexpr int lanes = Blocks<T>::lanes;
    if (columns <= lanes)
        register_tile<T, 1, Step>(k, a_rows, panel, tile);
    else if (columns <= 2 * lanes)
        register_tile<T, 2, Step>(k, a_rows, panel, tile);
    else
        register_tile<T, Blocks<T>::vectors, Step>(k, a_rows, panel, tile);
}

/// panel[p][j] = from[p][j], missing columns 0.
template <class T>
void pack_rows(const T* from, index_t stride, index_t k, index_t columns, T* panel) {
    constexpr index_t width = Blocks<T>::width;
    for (index_t p = 0; p < k; ++p, panel += width, from += stride) {
        if (columns == width) {
            std::memcpy(panel, from, width * sizeof(T));
        } else {
            std::memcpy(panel, from, static_cast<std::size_t>(columns) * sizeof(T));
            std::memset(panel + columns, 0, static_cast<std::size_t>(width - columns) * sizeof(T));
        }
    }
}

/// panel[p][j] = from[j][p], missing columns 0.
template <class T>
void pack_columns(const T* from, index_t stride, index_t k, index_t columns, T* panel) {
    constexpr index_t width = Blocks<T>::width;
    for (index_t j = 0; j < columns; ++j)
        for (index_t p = 0; p < k; ++p) panel[p * width + j] = from[j * stride + p];
    for (index_t j = columns; j < width; ++j)
        for (index_t p = 0; p < k; ++p) panel[p * width + j] = T(0);
}

/// out[r][j] (= or +=) tile[r][j]
template <class T>
void write_rows(const T* tile, index_t rows, index_t columns, T* out, index_t stride, bool add) {
    for (index_t r = 0; r < rows; ++r, tile += Blocks<T>::width, out += stride) {
        if (add)
            for (index_t j = 0; j < columns; ++j) out[j] += tile[j];
        else
            std::memcpy(out, tile, static_cast<std::size_t>(columns) * sizeof(T));
    }
}

/// out[j][r] (= or +=) tile[r][j]: one visit of each row of `out`, which may all fall on one set of the cache.
template <class T>
void write_columns(const T* tile, index_t rows, index_t columns, T* out, index_t stride, bool add) {
    constexpr index_t width = Blocks<T>::width;
    for (index_t j = 0; j < columns; ++j, ++tile, out += stride) {
        if (add)
            for (index_t r = 0; r < rows; ++r) out[r] += tile[r * width];
        else
            for (index_t r = 0; r < rows; ++r) out[r] = tile[r * width];
    }
}

/// Which operand of a product is which: how `left` (broadcast) and `right` (panel) lie in memory.
enum class Form { nt, nn, tn };

/// The one product behind all forms: out[i][j] = sum_p left[i][p] * right[p][j].
template <class T, Form F>
void product(index_t m, index_t n, index_t k, const T* left, index_t left_stride, const T* right, index_t right_stride,
             T* out, index_t out_stride, Write write, std::byte* scratch) {
    using B = Blocks<T>;
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    T* const panels = reinterpret_cast<T*>(scratch + (64 - address % 64) % 64);
    T* const slab = panels + index_t{B::panel_block} * B::k_block;
    T* const tile = slab + index_t{B::rows} * B::k_block;

    for (index_t j0 = 0; j0 < n; j0 += B::panel_block) {
        const index_t j1 = std::min<index_t>(j0 + B::panel_block, n);
        for (index_t p0 = 0; p0 == 0 || p0 < k; p0 += B::k_block) {
            const index_t depth = std::min<index_t>(B::k_block, k - p0);
            const bool add = write == Write::add || p0 > 0;
            for (index_t j = j0; j < j1; j += B::width) {
                const index_t columns = std::min<index_t>(B::width, j1 - j);
                T* const panel = panels + (j - j0) * B::k_block;
                if constexpr (F == Form::nt)
                    pack_columns(right + j * right_stride + p0, right_stride, depth, columns, panel);
                else
                    pack_rows(right + p0 * right_stride + j, right_stride, depth, columns, panel);
            }
            for (index_t i = 0; i < m; i += B::rows) {
                const index_t rows = std::min<index_t>(B::rows, m - i);
                const T* a[B::rows];
                if constexpr (F == Form::tn) {
                    const T* from = left + p0 * left_stride + i;
                    if (rows == B::rows)
                        for (index_t p = 0; p < depth; ++p, from += left_stride)
                            std::memcpy(slab + p * B::rows, from, B::rows * sizeof(T));
                    else
                        for (index_t p = 0; p < depth; ++p, from += left_stride)
                            for (index_t r = 0; r < rows; ++r) slab[p * B::rows + r] = from[r];
                    for (index_t r = 0; r < B::rows; ++r) a[r] = slab + std::min(r, rows - 1);
                } else {  // rows that are missing repeat the last one; their sums are not written
                    for (index_t r = 0; r < B::rows; ++r) a[r] = left + (i + std::min(r, rows - 1)) * left_stride + p0;
                }
                for (index_t j = j0; j < j1; j += B::width) {
                    const index_t columns = std::min<index_t>(B::width, j1 - j);
                    if constexpr (F != Form::nt)  // large results come from memory while the tile is computed
                        for (index_t r = 0; r < rows; ++r)
                            for (index_t q = j; q < j + columns; q += B::lanes)
                                __builtin_prefetch(out + (i + r) * out_stride + q, 1);
                    register_tile<T, F == Form::tn ? B::rows : 1>(depth, columns, a, panels + (j - j0) * B::k_block,
                                                                  tile);
                    if constexpr (F == Form::nt)
                        write_columns(tile, rows, columns, out + j * out_stride + i, out_stride, add);
                    else
                        write_rows(tile, rows, columns, out + i * out_stride + j, out_stride, add);
                }
            }
        }
    }
}

}  // namespace detail::gemm

/// Bytes of scratch that one product needs, whatever its sizes. Any alignment.
template <class T>
[[nodiscard]] constexpr index_t gemm_scratch_bytes() {
    using B = detail::gemm::Blocks<T>;
    const index_t elements = index_t{B::panel_block + B::rows} * B::k_block + B::rows * B::width;
    return elements * static_cast<index_t>(sizeof(T)) + 64;
}

/// c (= or +=) a b^T. Rows are contiguous, at any stride; m, n and k may be 0 (k = 0 assigns zeros).
/// `b` is read in place, once for each block of 192 rows of a: the form for weights [out, in].
template <class T>
void gemm_nt(view<const T, 2> a,  // [m, k]
             view<const T, 2> b,  // [n, k]
             view<T, 2> c,        // [m, n]
             Write write, std::byte* scratch) {
    detail::gemm::product<T, detail::gemm::Form::nt>(b.extents[0], a.extents[0], a.extents[1], b.data, b.strides[0],
                                                     a.data, a.strides[0], c.data, c.strides[0], write, scratch);
}

/// c (= or +=) a b. Otherwise as gemm_nt.
template <class T>
void gemm_nn(view<const T, 2> a,  // [m, k]
             view<const T, 2> b,  // [k, n]
             view<T, 2> c,        // [m, n]
             Write write, std::byte* scratch) {
    detail::gemm::product<T, detail::gemm::Form::nn>(a.extents[0], b.extents[1], a.extents[1], a.data, a.strides[0],
                                                     b.data, b.strides[0], c.data, c.strides[0], write, scratch);
}

/// c (= or +=) a^T b. Otherwise as gemm_nt.
template <class T>
void gemm_tn(view<const T, 2> a,  // [k, m]
             view<const T, 2> b,  // [k, n]
             view<T, 2> c,        // [m, n]
             Write write, std::byte* scratch) {
    detail::gemm::product<T, detail::gemm::Form::tn>(a.extents[1], b.extents[1], a.extents[0], a.data, a.strides[0],
                                                     b.data, b.strides[0], c.data, c.strides[0], write, scratch);
}

}  // namespace steelyard::cpu
