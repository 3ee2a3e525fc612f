#include "steelyard/cpu/parallel.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "steelyard/cpu/expert_rows.hpp"

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

namespace {

using cpu::detail::expert::Tiling;

std::vector<index_t> offsets_of(const std::vector<index_t>& counts) {
    std::vector<index_t> offsets(counts.size() + 1, 0);
    std::partial_sum(counts.begin(), counts.end(), offsets.begin() + 1);
    return offsets;
}

Tiling tiling_of(int threads, std::vector<index_t>& offsets, index_t most) {
    return {Cpu{threads}, view<index_t, 1>(offsets.data(), static_cast<index_t>(offsets.size())), most};
}

/// How busy threads are that take the tiles one by one, if a row takes as long as any other.
double busy_share(const Tiling& tiling, int threads) {
    std::vector<index_t> until(static_cast<std::size_t>(threads), 0);
    index_t rows = 0;
    for (index_t i = 0; i < tiling.tiles(); ++i) {
        const auto tile = tiling.tile(i);
        *std::min_element(until.begin(), until.end()) += tile.end - tile.begin;
        rows += tile.end - tile.begin;
    }
    return static_cast<double>(rows) / threads / static_cast<double>(*std::max_element(until.begin(), until.end()));
}

}  // namespace

TEST_CASE("tiles hold every row once, in order, of one expert each") {
    for (const int threads : {1, 2, 7})
        for (const auto& counts :
             {std::vector<index_t>{0, 0}, {1}, {1000}, {0, 3, 0, 289, 288, 47, 0}, {5, 4000, 96}}) {
            auto offsets = offsets_of(counts);
            const Tiling tiling = tiling_of(threads, offsets, 288);
            index_t row = 0;
            for (index_t i = 0; i < tiling.tiles(); ++i) {
                const auto tile = tiling.tile(i);
                CHECK(tile.begin == row);
                CHECK(tile.end > tile.begin);
                CHECK(tile.end - tile.begin <= 288);
                CHECK(tile.begin >= offsets[static_cast<std::size_t>(tile.expert)]);
                CHECK(tile.end <= offsets[static_cast<std::size_t>(tile.expert + 1)]);
                row = tile.end;
            }
            CHECK(row == offsets.back());
        }
}

TEST_CASE("a thread takes tiles as large as they may be; many threads get smaller ones at the end, and end together") {
    std::vector<index_t> counts;
    for (index_t e = 0; e < 64; ++e) counts.push_back(200 + e * 37 % 113);
    auto offsets = offsets_of(counts);
    CHECK(tiling_of(1, offsets, 288).tiles() == 64 + 14);  // 14 of more than 288 rows are cut in two
    for (const int threads : {2, 8, 16, 32}) {
        CAPTURE(threads);
        CHECK(busy_share(tiling_of(threads, offsets, 288), threads) > 0.93);
    }
}
