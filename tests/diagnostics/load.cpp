#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "steelyard/diagnostics/load.hpp"

namespace {

using namespace steelyard;

LoadSummary summary_of(const std::vector<std::int64_t>& counts) {
    std::vector<std::int64_t> sorted(counts.size());
    return summarize_load(counts, sorted);
}

}  // namespace

TEST_CASE("choices are counted by expert, added to what is there, and none is no choice") {
    const std::vector<expert_t> chosen{0, 2, -1, -1, 2, 1};
    Routing<float> routing;
    routing.expert = {const_cast<expert_t*>(chosen.data()), 3, 2};
    std::vector<std::int64_t> counts{10, 0, 0, 0};
    count_choices(routing, std::span(counts));
    CHECK(counts == std::vector<std::int64_t>{11, 1, 2, 0});
}

TEST_CASE("a load of four experts by hand") {
    const auto s = summary_of({8, 0, 2, 6});
    CHECK(s.mean == 4.0);
    CHECK(s.deviation == doctest::Approx(std::sqrt((16 + 16 + 4 + 4) / 4.0)));
    CHECK(s.smallest == 0);
    CHECK(s.largest == 8);
    CHECK(s.max_violation == 1.0);  // 8 / 4 - 1
    CHECK(s.dead == 1);
    CHECK(s.entropy == doctest::Approx(-(0.5 * std::log(0.5) + 0.125 * std::log(0.125) + 0.375 * std::log(0.375))));
    CHECK(s.utilization == doctest::Approx(std::exp(s.entropy) / 4));
    CHECK(s.p50 == 4.0);                       // between 2 and 6
    CHECK(s.p25 == doctest::Approx(1.5));      // three quarters of the way from 0 to 2
    CHECK(s.p75 == doctest::Approx(6.5));
    CHECK(s.p05 == doctest::Approx(0.3));
    CHECK(s.p95 == doctest::Approx(7.7));
}

TEST_CASE("perfect balance has no violation and the entropy log(E); one expert alone has entropy 0") {
    const auto even = summary_of({7, 7, 7, 7, 7});
    CHECK(even.max_violation == doctest::Approx(0.0));
    CHECK(even.entropy == doctest::Approx(std::log(5.0)));
    CHECK(even.utilization == doctest::Approx(1.0));
    CHECK(even.deviation == 0.0);
    CHECK(even.dead == 0);
    const auto collapsed = summary_of({0, 0, 35, 0, 0});
    CHECK(collapsed.max_violation == 4.0);  // E - 1, the most there can be
    CHECK(collapsed.entropy == 0.0);
    CHECK(collapsed.utilization == doctest::Approx(0.2));
    CHECK(collapsed.dead == 4);
}

TEST_CASE("the entropy lies between 0 and log(E), and MaxVio between 0 and E - 1, whatever the load") {
    std::uint64_t state = 1;
    for (int trial = 0; trial < 200; ++trial) {
        std::vector<std::int64_t> counts(1 + static_cast<std::size_t>(trial % 9));
        for (auto& c : counts) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            c = static_cast<std::int64_t>((state >> 33) % 50) * static_cast<std::int64_t>((state >> 60) % 2);
        }
        const auto s = summary_of(counts);
        const auto experts = static_cast<double>(counts.size());
        CHECK(s.entropy >= 0.0);
        CHECK(s.entropy <= std::log(experts) + 1e-12);
        CHECK(s.max_violation >= 0.0);
        CHECK(s.max_violation <= experts - 1 + 1e-12);
        CHECK(s.smallest <= s.p05);
        CHECK(s.p05 <= s.p25);
        CHECK(s.p25 <= s.p50);
        CHECK(s.p50 <= s.p75);
        CHECK(s.p75 <= s.p95);
        CHECK(s.p95 <= static_cast<double>(s.largest) + 1e-12);
    }
}

TEST_CASE("an empty load is all zeros, and all its experts are dead") {
    const auto s = summary_of({0, 0, 0});
    CHECK(s.mean == 0.0);
    CHECK(s.max_violation == 0.0);
    CHECK(s.entropy == 0.0);
    CHECK(s.utilization == 0.0);
    CHECK(s.dead == 3);
    CHECK(percentile({}, 0.5) == 0.0);
}

TEST_CASE("MaxVio of a global load hides what its micro-batches show") {
    const std::vector<std::int64_t> first{4, 0}, second{0, 4}, both{4, 4};
    CHECK(summary_of(first).max_violation == 1.0);
    CHECK(summary_of(second).max_violation == 1.0);
    CHECK(summary_of(both).max_violation == 0.0);
}
