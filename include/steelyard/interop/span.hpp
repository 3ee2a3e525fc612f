// Views of contiguous containers: std::span, std::vector, std::array.
#pragma once

#include <span>
#include <string>

#include "steelyard/core/status.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard {

/// A dense row-major view of `values`, whose size must be the product of the extents; throws `Error` otherwise.
///
///     std::vector<float> memory(T * d);   auto x = as_view(std::span(memory), T, d);   // [T, d]
template <class T, std::size_t Extent, class... Extents>
[[nodiscard]] view<T, static_cast<int>(sizeof...(Extents))> as_view(std::span<T, Extent> values, Extents... extents) {
    const view<T, static_cast<int>(sizeof...(Extents))> result(values.data(), extents...);
    if (result.size() != static_cast<index_t>(values.size()))
        throw Error(Status::refuse(Code::invalid_argument, "as_view", "span", std::to_string(result.size()) + " elements",
                                   std::to_string(values.size())));
    return result;
}

}  // namespace steelyard
