// Counter-based random numbers: the same stream on every device, for any number of threads.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace steelyard {

/// What a random number is for. Part of the key, so that no two uses share a stream.
enum class Stream : std::uint32_t {
    jitter = 1,
    noise = 2,
    shuffle = 3,
    init = 4,
    data = 5,
    drop = 6,
    fill = 7,
    choice = 8,
    user = 16,
};

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
///
/// A pure function of (seed, stream, step, micro_step, layer, index): no state, so a replay, another
/// thread count or another device draws the same numbers.
class Philox {
public:
    static constexpr int rounds = 10;
    static constexpr std::uint32_t factor_0 = 0xD2511F53u, factor_1 = 0xCD9E8D57u;
    static constexpr std::uint32_t increment_0 = 0x9E3779B9u, increment_1 = 0xBB67AE85u;

    constexpr Philox(std::uint64_t seed, Stream stream, std::uint64_t step = 0, std::uint32_t layer = 0)
        : key_{static_cast<std::uint32_t>(seed) ^ (static_cast<std::uint32_t>(stream) * 0x9E3779B9u),
               static_cast<std::uint32_t>(seed >> 32) ^ (layer * 0x85EBCA6Bu)},
          high_(step) {}

    /// Four independent 32-bit words for position `index` of the stream.
    [[nodiscard]] constexpr std::array<std::uint32_t, 4> words(std::uint64_t index) const {
        std::uint32_t c0 = static_cast<std::uint32_t>(index), c1 = static_cast<std::uint32_t>(index >> 32);
        std::uint32_t c2 = static_cast<std::uint32_t>(high_), c3 = static_cast<std::uint32_t>(high_ >> 32);
        std::uint32_t k0 = key_[0], k1 = key_[1];
        for (int round = 0; round < rounds; ++round) {
            const std::uint64_t p0 = std::uint64_t{factor_0} * c0;
            const std::uint64_t p1 = std::uint64_t{factor_1} * c2;
            c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<std::uint32_t>(p1);
            c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<std::uint32_t>(p0);
            k0 += increment_0;
            k1 += increment_1;
        }
        return {c0, c1, c2, c3};
    }

    /// Uniform in [0, 1) with 53 bits.
    [[nodiscard]] constexpr double uniform(std::uint64_t index) const {
        const auto w = words(index);
        const std::uint64_t bits = (std::uint64_t{w[0]} << 32) | w[1];
        return static_cast<double>(bits >> 11) * 0x1.0p-53;
    }

    /// Standard normal by Box and Muller.
    [[nodiscard]] double normal(std::uint64_t index) const {
        const auto w = words(index);
        const double u = (static_cast<double>(w[0]) + 0.5) * 0x1.0p-32;  // in (0, 1): the logarithm is finite
        const double v = static_cast<double>(w[1]) * 0x1.0p-32;
        return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586476925 * v);
    }

    /// Uniform integer in [0, bound), `bound` below 2^32, by multiplication (bias below bound / 2^32).
    [[nodiscard]] constexpr std::uint32_t below(std::uint64_t index, std::uint32_t bound) const {
        return static_cast<std::uint32_t>((std::uint64_t{words(index)[0]} * bound) >> 32);
    }

    /// What all positions of the stream share: the key, and the upper half of the counter.
    [[nodiscard]] constexpr std::array<std::uint32_t, 2> key() const { return {key_[0], key_[1]}; }
    [[nodiscard]] constexpr std::uint64_t high() const { return high_; }

private:
    std::uint32_t key_[2];
    std::uint64_t high_;
};

}  // namespace steelyard
