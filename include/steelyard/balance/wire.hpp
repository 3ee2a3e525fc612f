// The integers that travel between ranks, dealt out to the policies of a layer in order.
#pragma once

#include <cstdint>

#include "steelyard/core/view.hpp"

namespace steelyard {

/// A run of integers that is summed over the data group as one. Each policy takes its words in turn, so that policies
/// compose without knowing of each other, and the wires of all layers can be summed in one reduction.
template <class Space = HostSpace>
class Wire {
public:
    Wire() = default;
    explicit constexpr Wire(view<std::int64_t, 1, Space> words) : words_(words) {}

    /// The next `count` words.
    [[nodiscard]] constexpr view<std::int64_t, 1, Space> take(index_t count) {
        const auto share = words_.slice(used_, used_ + count);
        used_ += count;
        return share;
    }

private:
    view<std::int64_t, 1, Space> words_;
    index_t used_ = 0;
};

}  // namespace steelyard
