// What every benchmark needs: the sizes of a layer, a clock, made-up numbers.
#pragma once

#include <chrono>
#include <cstdint>

#include "steelyard/core/random.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard_bench {

using namespace steelyard;

/// Tokens, widths and experts of one measured layer.
struct Shape {
    const char* name;
    index_t tokens, width, hidden, experts;
    int top_k;

    [[nodiscard]] double forward_flops() const {  // three products of a SwiGLU for each routed row
        return 6.0 * static_cast<double>(tokens * top_k) * static_cast<double>(width * hidden);
    }
};

/// The shapes of the published comparisons that fit this kind of machine.
inline constexpr Shape shape_a{"A", 4096, 512, 1408, 64, 4};
inline constexpr Shape shape_b{"B", 2048, 1024, 2816, 8, 2};

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Standard normal values, the same in every run.
template <class V>
void fill_normal(const V& tensor, std::uint64_t seed, double scale = 1.0) {
    const Philox random(seed, Stream::user);
    for (index_t i = 0; i < tensor.size(); ++i)
        tensor.data[i] = static_cast<typename V::value_type>(scale * random.normal(static_cast<std::uint64_t>(i)));
}

}  // namespace steelyard_bench
