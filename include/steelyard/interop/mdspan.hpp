// Views of mdspan-like tensors: std::mdspan (C++23), Kokkos::mdspan, cuda::std::mdspan with a strided mapping.
#pragma once

#include <concepts>
#include <cstddef>

#include "steelyard/core/view.hpp"

namespace steelyard {

/// What mdspan and its kin have in common. Named here, so that none of them has to be included.
template <class M>
concept MdspanLike = requires(const M& tensor, std::size_t r) {
    { M::rank() } -> std::convertible_to<std::size_t>;
    { tensor.extent(r) } -> std::convertible_to<index_t>;
    { tensor.stride(r) } -> std::convertible_to<index_t>;
    tensor.data_handle();
};

/// A view of the same elements with the same strides. Layers ask for contiguous rows and say so if they are not.
template <MdspanLike M>
[[nodiscard]] auto as_view(const M& tensor) {
    view<typename M::element_type, static_cast<int>(M::rank())> result;
    result.data = tensor.data_handle();
    for (std::size_t r = 0; r < M::rank(); ++r) {
        result.extents[r] = static_cast<index_t>(tensor.extent(r));
        result.strides[r] = static_cast<index_t>(tensor.stride(r));
    }
    return result;
}

}  // namespace steelyard
