// What this machine can do at most, measured in the same run as everything else.
#pragma once

namespace steelyard_bench {

/// Rates of one thread. The machine may be shared: only ratios within one run mean something.
struct Limits {
    double fma_gflops_float = 0;   ///< multiply-adds in registers, two operations each, widest vectors
    double fma_gflops_double = 0;
    double read_gbytes = 0;        ///< reading a block far larger than the caches
    double copy_gbytes = 0;        ///< memcpy of such a block, bytes read plus bytes written
};

/// Measured once, at the first call: the best of several tries.
const Limits& limits();

}  // namespace steelyard_bench
