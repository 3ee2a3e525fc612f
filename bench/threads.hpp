// The threads of the benchmarks themselves.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "shape.hpp"

namespace steelyard_bench {

/// Calls body(thread) on each of `threads` threads at once.
template <class Body>
void on_threads(int threads, Body&& body) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
    body(omp_get_thread_num());
#else
    for (int thread = 0; thread < threads; ++thread) body(thread);
#endif
}

/// Calls body(task) for each task, handed out as threads become free.
template <class Body>
void for_each_task(int threads, index_t tasks, Body&& body) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
    for (index_t task = 0; task < tasks; ++task) body(task);
    (void)threads;
}

}  // namespace steelyard_bench
