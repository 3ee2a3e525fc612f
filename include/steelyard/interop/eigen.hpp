// Views of row-major Eigen matrices, and Eigen maps of views. The one header that needs Eigen.
#pragma once

#include <Eigen/Core>
#include <type_traits>

#include "steelyard/core/view.hpp"

namespace steelyard {

/// A view of a row-major Eigen matrix, Map or Ref with contiguous rows. Does not keep it alive.
template <class Derived>
[[nodiscard]] auto as_view(const Eigen::MatrixBase<Derived>& matrix) {
    static_assert(Derived::IsRowMajor,
                  "steelyard: views are row-major: give Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>");
    using T = std::remove_reference_t<decltype(*matrix.derived().data())>;
    view<T, 2> result(matrix.derived().data(), matrix.rows(), matrix.cols());
    result.strides[0] = matrix.derived().outerStride();
    result.strides[1] = matrix.derived().innerStride();
    return result;
}

/// The same for one that may be written through.
template <class Derived>
[[nodiscard]] auto as_view(Eigen::MatrixBase<Derived>& matrix) {
    const auto read_only = as_view(static_cast<const Eigen::MatrixBase<Derived>&>(matrix));
    using T = std::remove_reference_t<decltype(*matrix.derived().data())>;
    view<T, 2> result(matrix.derived().data(), matrix.rows(), matrix.cols());
    result.strides[0] = read_only.strides[0];
    result.strides[1] = read_only.strides[1];
    return result;
}

/// An Eigen map of a matrix view with contiguous rows.
template <class T>
[[nodiscard]] auto as_eigen(const view<T, 2>& matrix) {
    using Matrix = Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    using Mapped = std::conditional_t<std::is_const_v<T>, const Matrix, Matrix>;
    return Eigen::Map<Mapped, 0, Eigen::OuterStride<>>(matrix.data, matrix.extents[0], matrix.extents[1],
                                                       Eigen::OuterStride<>(matrix.strides[0]));
}

}  // namespace steelyard
