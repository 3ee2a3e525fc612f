// Packing weights in fewer bits: once, so plainly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "steelyard/core/bf16.hpp"
#include "steelyard/cpu/packed_ffn.hpp"

namespace steelyard::cpu {

/// The matrices of one operand [depth, columns] as they lie in memory: one, or a gate and an up.
struct PackedSource {
    const float* from[2] = {};  // [columns, depth]
    index_t stride = 0;
    index_t depth = 0, columns = 0;
    bool paired = false;

    /// The row of a panel's column, or null where there is none: the first half of a panel of two matrices is the first
    /// one's.
    [[nodiscard]] const float* row(index_t panel, index_t column, index_t width) const {
        const index_t half = width / 2, each = paired ? half : width;
        const index_t j = panel * each + (paired ? column % half : column);
        return j < columns ? (paired ? from[column / half] : from[0]) + j * stride : nullptr;
    }
};

/// Words [panels][steps][width] of two elements rounded to bf16, the lower one first.
inline void pack_bf16(const PackedSource& source, const PackedHeader& header, std::byte* panels) {
    const index_t width = header.panel, steps = header.steps(source.depth);
    auto* const words = reinterpret_cast<std::uint32_t*>(panels);
    for (index_t q = 0; q < header.panels(source.columns, source.paired); ++q)
        for (index_t j = 0; j < width; ++j) {
            const float* const row = source.row(q, j, width);
            for (index_t p = 0; p < steps; ++p) {
                const auto at = [&](index_t i) -> std::uint32_t {
                    return row != nullptr && i < source.depth ? bf16(row[i]).bits : 0;
                };
                words[(q * steps + p) * width + j] = at(2 * p) | (at(2 * p + 1) << 16);
            }
        }
}

/// Words [panels][steps][width] of four elements, each 128 above its value in multiples of the scale of its group, then
/// the scales [panels][groups][width]: the largest magnitude / 127. A group that is not finite has the scale NaN.
inline void pack_int8(const PackedSource& source, const PackedHeader& header, std::byte* panels) {
    const index_t width = header.panel, steps = header.steps(source.depth), groups = header.groups(source.depth);
    const index_t count = header.panels(source.columns, source.paired);
    auto* const words = reinterpret_cast<std::uint32_t*>(panels);
    auto* const scales = reinterpret_cast<float*>(words + count * steps * width);
    for (index_t q = 0; q < count; ++q)
        for (index_t j = 0; j < width; ++j) {
            const float* const row = source.row(q, j, width);
            for (index_t g = 0; g < groups; ++g) {
                const index_t begin = g * int8_group, end = std::min(source.depth, begin + int8_group);
                float most = 0;
                bool finite = true;
                for (index_t i = begin; row != nullptr && i < end; ++i) {
                    most = std::max(most, std::abs(row[i]));
                    finite = finite && std::isfinite(row[i]);
                }
                const float inverse = finite && most > 0 ? 127.0f / most : 0.0f;
                scales[(q * groups + g) * width + j] = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
                for (index_t p = begin / 4; p < (end + 3) / 4; ++p) {
                    std::uint32_t word = 0;
                    for (index_t i = 0; i < 4; ++i) {
                        const bool here = row != nullptr && finite && 4 * p + i < end;
                        const float value = here ? std::nearbyint(row[4 * p + i] * inverse) : 0.0f;
                        word |= static_cast<std::uint32_t>(static_cast<std::int32_t>(value) + 128) << (8 * i);
                    }
                    words[(q * steps + p) * width + j] = word;
                }
            }
        }
}

}  // namespace steelyard::cpu
