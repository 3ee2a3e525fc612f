// The best of a row of keys, and the largest of many, against a stable sort.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/instruction_sets.hpp"
#include "steelyard/cpu/router_token.hpp"
#include "steelyard/cpu/take_largest.hpp"

using namespace steelyard;
using steelyard::testing::instruction_sets;

TEST_CASE_TEMPLATE("The best of a row: any number of them, equal ones by index, however they are found", B,
                   std::int32_t, std::int64_t) {
    constexpr B none = std::numeric_limits<B>::min(), highest = std::numeric_limits<B>::max();
    constexpr index_t lanes = 64 / static_cast<index_t>(sizeof(B));
    std::mt19937 random(3);
    for (const Isa isa : instruction_sets())
        for (const index_t experts : {1, 3, 8, 16, 17, 60, 64, 100, 256, 300, 512, 1030})
            for (const int kinds : {1, 2, 7, 1000000}) {
                const index_t size = (experts + lanes - 1) / lanes * lanes;
                std::vector<B> keys(static_cast<std::size_t>(size), none);
                for (index_t j = 0; j < experts; ++j)
                    keys[static_cast<std::size_t>(j)] =
                        static_cast<B>(random() % static_cast<unsigned>(kinds)) - kinds / 2;
                if (kinds == 7) keys[0] = none + 1, keys[static_cast<std::size_t>(experts / 2)] = highest;
                std::vector<expert_t> order(static_cast<std::size_t>(experts));
                std::iota(order.begin(), order.end(), 0);
                std::stable_sort(order.begin(), order.end(), [&](expert_t a, expert_t b) {
                    return keys[static_cast<std::size_t>(a)] > keys[static_cast<std::size_t>(b)];
                });
                for (const index_t count :
                     {index_t{1}, index_t{2}, index_t{9}, index_t{11}, experts / 4, experts / 2, experts}) {
                    if (count < 1 || count > experts) continue;
                    CAPTURE(name_of(isa));
                    CAPTURE(experts);
                    CAPTURE(kinds);
                    CAPTURE(count);
                    auto key = keys;
                    std::vector<std::int64_t> ranked(static_cast<std::size_t>(size));
                    std::vector<expert_t> out(static_cast<std::size_t>(count) + 1, -7);
                    cpu::detail::take_best<B>(isa, key.data(), size, count, out.data(), ranked.data());
                    CHECK(std::equal(out.begin(), out.end() - 1, order.begin()));
                    CHECK(out.back() == -7);
                }
            }
}

TEST_CASE("The largest of many keys, also where a sample of them is no guide") {
    std::mt19937_64 random(5);
    using Keys = std::vector<std::int64_t>;
    for (const index_t count : {1, 2, 100, 1023, 1024, 4096, 5000}) {
        Keys plain(static_cast<std::size_t>(count)), hidden(plain), equal(plain), rising(plain);
        for (index_t i = 0; i < count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            plain[at] = static_cast<std::int64_t>(random());
            // What a sample of equal steps sees is above all others, or below.
            hidden[at] = i % std::max<index_t>(1, count / 128) == 0 ? 1000000 - i : -i;
            equal[at] = i % 3;
            rising[at] = i;
        }
        Keys sunk = hidden;
        for (auto& key : sunk) key = -key;
        for (const Keys& keys : {plain, hidden, sunk, equal, rising})
            for (const index_t n : {index_t{1}, index_t{2}, count / 16, count / 5, count / 2, count}) {
                if (n < 1 || n > count) continue;
                CAPTURE(count);
                CAPTURE(n);
                Keys sorted = keys, room(keys.size());
                std::sort(sorted.begin(), sorted.end(), std::greater<>());
                cpu::take_largest(keys.data(), count, n, room.data());
                CHECK(room[static_cast<std::size_t>(n - 1)] == sorted[static_cast<std::size_t>(n - 1)]);
                std::sort(room.begin(), room.begin() + n, std::greater<>());
                CHECK(std::equal(room.begin(), room.begin() + n, sorted.begin()));
            }
    }
}
