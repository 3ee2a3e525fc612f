#include "steelyard/cuda/grouped_tiles.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <vector>

using namespace steelyard;
using namespace steelyard::cuda;

TEST_CASE("a divisor gives quotient and remainder of every number") {
    constexpr int largest = std::numeric_limits<int>::max();
    for (int by : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 31, 60, 127, 160, 512, 641, 65537, largest - 1, largest}) {
        CAPTURE(by);
        const Divisor divisor(by);
        const auto check = [&](std::int64_t number) {
            if (number < 0 || number > largest) return;
            CAPTURE(number);
            REQUIRE(divisor.quotient(static_cast<int>(number)) == number / by);
            REQUIRE(divisor.remainder(static_cast<int>(number)) == number % by);
        };
        for (std::int64_t number = 0; number < 2000; ++number) check(number);
        // Where quotients change is where a factor that is too small or too large shows.
        for (std::int64_t multiple = by; multiple <= largest; multiple += by * ((largest / by) / 1000 + 1))
            for (int off : {-1, 0, 1}) check(multiple + off);
        for (int below = 0; below < 5; ++below) check(largest - below);
    }
}

TEST_CASE("every tile of an expert has one place") {
    for (int m = 1; m <= 40; m += m < 18 ? 1 : 7)
        for (int n : {1, 2, 3, 8}) {
            CAPTURE(m);
            CAPTURE(n);
            std::vector<int> seen(static_cast<std::size_t>(m * n));
            for (int index = 0; index < m * n; ++index) {
                const TilePlace place = place_of(index, m, n);
                REQUIRE(place.m >= 0);
                REQUIRE(place.m < m);
                REQUIRE(place.n >= 0);
                REQUIRE(place.n < n);
                ++seen[static_cast<std::size_t>(place.m * n + place.n)];
            }
            for (int count : seen) REQUIRE(count == 1);
        }
    // Sixteen tiles of rows share columns before the next columns come.
    CHECK(place_of(15, 40, 3).n == 0);
    CHECK(place_of(16, 40, 3).n == 1);
    CHECK(place_of(48, 40, 3).m == 16);
}

TEST_CASE("pairs of blocks have every tile of an expert once, and say truly whether they share columns") {
    for (int m = 1; m <= 40; m += m < 18 ? 1 : 7)
        for (int n : {1, 2, 3, 8, 11}) {
            CAPTURE(m);
            CAPTURE(n);
            std::vector<int> seen(static_cast<std::size_t>(m * n));
            int missing = 0;
            for (int index = 0; index < pairs_of(m, n); ++index) {
                const TilePlace pair[] = {place_in_pair(index, 0, m, n), place_in_pair(index, 1, m, n)};
                REQUIRE(pair[0].shares_b == pair[1].shares_b);
                REQUIRE(pair[0].shares_b == (pair[0].n == pair[1].n));
                for (const TilePlace& place : pair) {
                    REQUIRE(place.m >= 0);
                    REQUIRE(place.m < m);
                    REQUIRE(place.n >= 0);
                    if (place.n == n)
                        ++missing;
                    else
                        ++seen[static_cast<std::size_t>(place.m * n + place.n)];
                }
            }
            for (int count : seen) REQUIRE(count == 1);
            REQUIRE(missing == (m % 2) * (n % 2));
        }
}

TEST_CASE("tiles of an expert are counted from its rows") {
    const TileCount of_rows{128, 3};
    CHECK(of_rows(0) == 0);
    CHECK(of_rows(1) == 3);
    CHECK(of_rows(128) == 3);
    CHECK(of_rows(129) == 6);
    // A sum over rows has the tiles of its result, and none where there is nothing to add.
    const TileCount of_sum{128, 3, 5};
    CHECK(of_sum(0) == 0);
    CHECK(of_sum(1) == 15);
    CHECK(of_sum(100000) == 15);
}

TEST_CASE("a walk passes over experts without tiles") {
    const int first[] = {0, 0, 4, 4, 4, 5, 9, 9};
    TileWalk walk(first, 7);
    std::vector<int> experts;
    for (int index = 0; index < 9; index += 2) {
        walk.seek(index);
        experts.push_back(walk.expert);
    }
    CHECK(experts == std::vector<int>{1, 1, 4, 5, 5});
}

TEST_CASE("a walk finds the expert of every tile, however far it is") {
    std::mt19937 generator(3);
    for (const int experts : {1, 2, 3, 160, 512})
        for (const int every : {1, 7, 300}) {  // one expert in so many has tiles
            std::vector<int> first(static_cast<std::size_t>(experts) + 1), owner;
            for (int e = 0; e < experts; ++e) {
                const int tiles =
                    generator() % static_cast<unsigned>(every) == 0 ? static_cast<int>(generator() % 5) : 0;
                first[static_cast<std::size_t>(e) + 1] = first[static_cast<std::size_t>(e)] + tiles;
                owner.insert(owner.end(), static_cast<std::size_t>(tiles), e);
            }
            for (const std::size_t stride : {1, 4, 131}) {
                TileWalk walk(first.data(), experts);
                bool right = true;
                for (std::size_t index = 0; index < owner.size(); index += stride) {
                    walk.seek(static_cast<int>(index));
                    right = right && walk.expert == owner[index];
                }
                CHECK(right);
            }
        }
}
