// The linear map y = x Wᵀ and its two gradients.
#pragma once

#ifndef EIGEN_DONT_PARALLELIZE
#define EIGEN_DONT_PARALLELIZE  // threads are ours, by tiles
#endif
#include <Eigen/Core>
#include <type_traits>

#include "parallel.hpp"

namespace pretrain {

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

/// y = x Wᵀ, row by row. Writes y (=).
template <class T>
void linear_forward(int threads, view<const T, 2> x,  // [T, in]
                    view<const T, 2> weight,          // [out, in]
                    view<T, 2> y) {                   // [T, out]
    parallel_tiles(threads, x.extents[0], tile_rows, [&](index_t begin, index_t end) {
        matrix(y.slice(begin, end)).noalias() = matrix(x.slice(begin, end)) * matrix(weight).transpose();
    });
}

/// dx = dy W. Writes dx (=).
template <class T>
void linear_backward_input(int threads, view<const T, 2> dy,  // [T, out]
                           view<const T, 2> weight,           // [out, in]
                           view<T, 2> dx) {                   // [T, in]
    parallel_tiles(threads, dy.extents[0], tile_rows, [&](index_t begin, index_t end) {
        matrix(dx.slice(begin, end)).noalias() = matrix(dy.slice(begin, end)) * matrix(weight);
    });
}

/// dW += dyᵀ x, summed over tokens. A thread owns whole rows of dW and goes over all tokens in order.
template <class T>
void linear_backward_weight(int threads, view<const T, 2> dy,  // [T, out]
                            view<const T, 2> x,                // [T, in]
                            view<T, 2> dweight) {              // [out, in]
    const index_t tile = 96;
    parallel_tiles(threads, dweight.extents[0], tile, [&](index_t begin, index_t end) {
        matrix(dweight.slice(begin, end)).noalias() +=
            matrix(dy).middleCols(begin, end - begin).transpose() * matrix(x);
    });
}

}  // namespace pretrain
