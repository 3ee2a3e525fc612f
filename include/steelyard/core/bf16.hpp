// bfloat16: the upper half of a float.
#pragma once

#include <bit>
#include <cstdint>

namespace steelyard {

/// One sign bit, eight of exponent, seven of fraction. A storage format: arithmetic is done in float.
struct bf16 {
    std::uint16_t bits = 0;

    constexpr bf16() = default;
    /// To the nearest, ties to even; a NaN stays one.
    explicit constexpr bf16(float value) : bits(rounded(std::bit_cast<std::uint32_t>(value))) {}
    explicit constexpr operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

    friend constexpr bool operator==(const bf16&, const bf16&) = default;

private:
    static constexpr std::uint16_t rounded(std::uint32_t word) {
        if ((word & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>((word >> 16) | 0x40);
        return static_cast<std::uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    }
};

}  // namespace steelyard
