// Threads of the CPU device: independent tasks, handed out as threads become free.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#elif defined(STEELYARD_CPU_PLAIN_THREADS)
#include <atomic>
#include <thread>
#include <vector>
#endif

#include "steelyard/cpu/device.hpp"

namespace steelyard::cpu {

namespace detail {

/// Tasks of `block` items that cover all of them.
inline index_t tasks_of(index_t items, index_t block) { return (items + block - 1) / block; }

}  // namespace detail

/// Calls `body(index_t task, int thread)` once for each task in [0, tasks); `thread` is in
/// [0, device.threads) and no two calls run on the same `thread` at the same time, so it may index scratch.
///
/// Which thread takes which task changes from run to run. Results are the same for any number of threads when
/// a task writes only what no other task reads or writes, and its arithmetic does not depend on `thread`.
/// A task should be worth some microseconds: group small items. `body` must not throw. Serial when there is at
/// most one task or one thread, or when the program is compiled without OpenMP.
template <class F>
void parallel_for(const Cpu& device, index_t tasks, F&& body) {
#if defined(_OPENMP)
    if (tasks > 1 && device.threads > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(device.threads)
        for (index_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
        return;
    }
#elif defined(STEELYARD_CPU_PLAIN_THREADS)
    // ThreadSanitizer cannot see into OpenMP's runtime: threads that it can see, for the sake of the tests.
    if (tasks > 1 && device.threads > 1) {
        std::atomic<index_t> next{0};
        std::vector<std::jthread> threads;
        for (int thread = 0; thread < device.threads; ++thread)
            threads.emplace_back([&, thread] {
                for (index_t task = next++; task < tasks; task = next++) body(task, thread);
            });
        return;
    }
#else
    (void)device;
#endif
    for (index_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace steelyard::cpu
