// The n largest of many keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "steelyard/core/view.hpp"

namespace steelyard::cpu {

/// Leaves the n largest of `count` keys in room[0, n) in any order, of which room[n - 1] is the smallest; 1 <= n <=
/// count. `room` has place for `count` keys.
///
/// Where n is a small part, a sample tells a number that about 2 n keys reach. Those are gathered without a branch, and
/// partitioning, which guesses half of its branches wrongly, has few left.
inline void take_largest(const std::int64_t* key, index_t count, index_t n, std::int64_t* room) {
    constexpr index_t samples = 128, margin = 8;
    const auto larger = [](std::int64_t a, std::int64_t b) { return a > b; };
    const index_t rank = 2 * n * samples / count + margin;
    index_t kept = 0;
    if (count >= 8 * samples && rank < samples / 2) {
        std::int64_t sample[samples];
        for (index_t i = 0; i < samples; ++i) sample[i] = key[i * (count / samples)];
        std::nth_element(sample, sample + rank, sample + samples, larger);
        for (index_t i = 0; i < count; ++i) {
            room[kept] = key[i];
            kept += key[i] >= sample[rank] ? 1 : 0;
        }
    }
    if (kept < n) kept = std::copy_n(key, count, room) - room;
    std::nth_element(room, room + n - 1, room + kept, larger);
}

}  // namespace steelyard::cpu
