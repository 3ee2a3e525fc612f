// What the CPU device takes caches and memory to be like: sizes that a core has at least, and where processors differ.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "steelyard/core/view.hpp"

namespace steelyard::cpu {

/// Bytes of panels that a second-level cache of 1 MiB holds beside another operand.
inline constexpr index_t panels_in_cache_bytes = index_t{512} << 10;
/// Bytes of panels that a weight gradient reads over and over: three quarters of that cache.
inline constexpr index_t gathered_panels_bytes = index_t{768} << 10;
/// Bytes of gathered rows and of their results, which share that cache: a little more than it has, for weights are then
/// read less often.
inline constexpr index_t tile_rows_bytes = index_t{9} << 17;
/// Bytes of a row that backward takes through the activation together, of each of five tensors. In shorter pieces, row
/// by row, memory is slow: every piece begins on five other pages.
inline constexpr index_t finished_row_bytes = 1024;
/// What takes more bytes than this is out of every cache before it is read again.
inline constexpr index_t past_caches_bytes = index_t{16} << 20;
/// Whether so many elements are.
template <class T>
[[nodiscard]] constexpr bool exceeds_caches(index_t elements) {
    return elements * index_t{sizeof(T)} > past_caches_bytes;
}

/// How a processor is asked for memory so that it comes fastest, as measured.
struct Fetches {
    static constexpr index_t never = index_t{1} << 20;
    // Rows of a tile from which on it is told of its panel ahead, where that comes from memory for this tile alone: of
    // few rows, and of int8, which has a run of scales beside it. Other tiles wait for what their predecessors brought.
    index_t run_ahead = never, int8_run_ahead = never;
    bool lone_tiles_ahead = false;  // and whether tiles of many rows are, too
    bool side_by_side = false;      // several such runs are read in turn
    bool rows_nearest = false;  // rows far apart come into the first-level cache: elsewhere it waits for too few lines
};
[[nodiscard]] inline const Fetches& best_fetches() {
    static const Fetches best = []() -> Fetches {
#if defined(__x86_64__)
        // A Cascade Lake reads 7 to 20 % faster when it is told ahead.
        if (__builtin_cpu_is("intel")) return {.run_ahead = 1, .int8_run_ahead = 1};
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!__builtin_cpu_is("amd") || __get_cpuid(1, &a, &b, &c, &d) == 0) return {};
        const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
        // A Zen 5 reads up to three rows of floats 4 % slower when it is told ahead, four to six 5 to 17 % faster,
        // seven to twelve 20 % faster, int8 5 to 25 %; one row of floats 4 % faster side by side where two cores read.
        // Rows far apart come 10 % faster. Few rows on a Zen 4 took up to a third longer with any of this.
        if (family >= 0x1a)
            return {.run_ahead = 4,
                    .int8_run_ahead = 1,
                    .lone_tiles_ahead = true,
                    .side_by_side = true,
                    .rows_nearest = true};
#endif
        return {};
    }();
    return best;
}

}  // namespace steelyard::cpu
