// What this machine can do at most, measured in the same run as everything else.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

namespace steelyard_bench {

/// Bytes a second of memory far larger than the caches, by some number of threads together.
struct Bandwidth {
    double read_gbytes = 0;    ///< reading
    double copy_gbytes = 0;    ///< ordinary stores: bytes read plus bytes written
    double stream_gbytes = 0;  ///< a copy by non-temporal stores, which read no line before they write it
};

/// The machine may be shared: only ratios within one run mean something.
struct Limits {
    // Rates of one thread, two operations for each multiply-add, widest vectors; 0 where the processor has no such
    // instruction, or the program was compiled without it.
    double fma_gflops_float = 0;  ///< multiply-adds in registers
    double fma_gflops_double = 0;
    double dot_gflops_bf16 = 0;       ///< vdpbf16ps
    double dot_gops_int8 = 0;         ///< vpdpbusd
    std::map<int, Bandwidth> memory;  ///< by threads
};

/// Measures everything, the bandwidths with each of these numbers of threads: the best of several tries.
Limits measure_limits(const std::vector<int>& threads);

/// Measured once, at the first call, with one thread.
const Limits& limits();

/// One short look (milliseconds) at a limit as it is now, by so many threads at once; the sum of their rates.
double fma_gflops_now(int threads);
double dot_gflops_bf16_now(int threads);
double dot_gops_int8_now(int threads);
double read_gbytes_now(int threads);

/// Copies by ordinary and by non-temporal stores; both pointers are aligned to 64 bytes, and so is `bytes`.
void copy_ordinary(const void* from, void* to, std::size_t bytes);
void copy_streaming(const void* from, void* to, std::size_t bytes);

/// Reads so much that nothing of before is left in the caches.
void evict_caches();

}  // namespace steelyard_bench
