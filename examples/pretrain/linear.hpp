// The linear map y = x Wᵀ and its two gradients.
#pragma once

#include <Eigen/Core>
#include <type_traits>

#include "parallel.hpp"

namespace pretrain {

using steelyard::Write;
using steelyard::cpu::gemm_nn;
using steelyard::cpu::gemm_nt;
using steelyard::cpu::gemm_tn;

template <class T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using RowArray = Eigen::Array<T, 1, Eigen::Dynamic>;

/// A view as an Eigen matrix on the same memory.
template <class T>
auto matrix(view<T, 2> v) {
    using Plain = RowMajor<std::remove_const_t<T>>;
    using Held = std::conditional_t<std::is_const_v<T>, const Plain, Plain>;
    return Eigen::Map<Held, Eigen::Unaligned, Eigen::OuterStride<>>(v.data, v.extents[0], v.extents[1],
                                                                    Eigen::OuterStride<>(v.strides[0]));
}

/// A contiguous row of numbers as an Eigen array.
template <class T>
auto row(T* data, index_t size) {
    using Plain = RowArray<std::remove_const_t<T>>;
    using Held = std::conditional_t<std::is_const_v<T>, const Plain, Plain>;
    return Eigen::Map<Held>(data, size);
}

/// Columns [begin, end) of a matrix.
template <class T>
view<T, 2> columns(view<T, 2> m, index_t begin, index_t end) {
    m.data += begin;
    m.extents[1] = end - begin;
    return m;
}

/// y = x Wᵀ, row by row. Writes y (=).
template <class T>
void linear_forward(const Threads& threads, view<const T, 2> x,  // [T, in]
                    view<const T, 2> weight,                     // [out, in]
                    view<T, 2> y) {                              // [T, out]
    threads.tiles(x.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte* scratch) {
        gemm_nt<T>(x.slice(begin, end), weight, y.slice(begin, end), Write::assign, scratch);
    });
}

/// dx = dy W. Writes dx (=).
template <class T>
void linear_backward_input(const Threads& threads, view<const T, 2> dy,  // [T, out]
                           view<const T, 2> weight,                      // [out, in]
                           view<T, 2> dx) {                              // [T, in]
    threads.tiles(dy.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte* scratch) {
        gemm_nn<T>(dy.slice(begin, end), weight, dx.slice(begin, end), Write::assign, scratch);
    });
}

/// dW += dyᵀ x, summed over tokens. A thread owns whole rows of dW and goes over all tokens in order.
template <class T>
void linear_backward_weight(const Threads& threads, view<const T, 2> dy,  // [T, out]
                            view<const T, 2> x,                           // [T, in]
                            view<T, 2> dweight) {                         // [out, in]
    const index_t tile = 96;
    threads.tiles(dweight.extents[0], tile, [&](index_t begin, index_t end, std::byte* scratch) {
        gemm_tn<T>(columns(dy, begin, end), x, dweight.slice(begin, end), Write::add, scratch);
    });
}

}  // namespace pretrain
