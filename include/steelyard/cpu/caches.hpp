// What the CPU device takes caches and memory to be like: sizes that a core has at least, and where processors differ.
#pragma once

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

/// Whether the processor reads a run of addresses faster when it is told ahead. An Intel Cascade Lake does, by 7 to
/// 20 %; an AMD Zen 4 took up to a third longer.
[[nodiscard]] inline bool fetches_runs() {
#if defined(__x86_64__)
    static const bool intel = __builtin_cpu_is("intel") != 0;
    return intel;
#else
    return false;
#endif
}

}  // namespace steelyard::cpu
