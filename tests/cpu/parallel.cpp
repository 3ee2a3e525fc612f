#include "steelyard/cpu/parallel.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <vector>

using namespace steelyard;

TEST_CASE("parallel_for runs every task once, on a thread number that the device has") {
    for (const int threads : {-1, 0, 1, 2, 3, 7})
        for (const index_t tasks : {index_t{0}, index_t{1}, index_t{2}, index_t{1000}}) {
            CAPTURE(threads);
            CAPTURE(tasks);
            std::vector<int> visits(static_cast<std::size_t>(tasks), 0);
            std::atomic<int> outside{0};
            cpu::parallel_for(Cpu{threads}, tasks, [&](index_t task, int thread) {
                ++visits[static_cast<std::size_t>(task)];
                if (thread < 0 || thread >= (threads < 1 ? 1 : threads)) ++outside;
            });
            CHECK(outside == 0);
            for (const int n : visits) CHECK(n == 1);
        }
}

TEST_CASE("a thread number is never used by two tasks at the same time") {
    const int threads = 3;
    std::atomic<int> busy[threads] = {};
    std::atomic<int> collisions{0};
    cpu::parallel_for(Cpu{threads}, 500, [&](index_t, int thread) {
        if (busy[thread].fetch_add(1) != 0) ++collisions;
        for (int spin = 0; spin < 200; ++spin) busy[thread].load();
        busy[thread].fetch_sub(1);
    });
    CHECK(collisions == 0);
}

TEST_CASE("one task or one thread runs on thread 0") {
    cpu::parallel_for(Cpu{4}, 1, [](index_t, int thread) { CHECK(thread == 0); });
    cpu::parallel_for(Cpu{1}, 5, [](index_t, int thread) { CHECK(thread == 0); });
}
