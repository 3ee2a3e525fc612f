#include <doctest/doctest.h>

#include <vector>

#include "steelyard/balance/load_balancing_loss.hpp"

namespace {

using namespace steelyard;

/// One segment and the gradient that the loss writes.
struct Segment {
    std::vector<std::int64_t> counts;
    std::int64_t tokens;
    std::vector<double> prob_sums;
    std::int64_t own_tokens;
    index_t top_k;
    std::vector<double> gradient = std::vector<double>(counts.size(), -7.0);

    double loss(const LoadBalancingLoss& objective) {
        const auto experts = static_cast<index_t>(counts.size());
        return objective.loss({{counts.data(), experts}, tokens, {prob_sums.data(), experts}, own_tokens, top_k},
                              {gradient.data(), experts});
    }
};

}  // namespace

TEST_CASE("the load-balancing loss of two experts by hand") {
    // f = (3/4, 1/4), P = (0.6, 0.4): 2 (0.45 + 0.1) = 1.1; dL/dP = 2 f.
    Segment segment{{3, 1}, 4, {2.4, 1.6}, 4, 1};
    CHECK(segment.loss({}) == doctest::Approx(1.1).epsilon(1e-15));
    CHECK(segment.gradient == std::vector<double>{1.5, 0.5});
}

TEST_CASE("f may come from other tokens than P") {
    // f = (30, 10, 40, 0) / 80 over 40 tokens of 2 choices; P over 2 tokens.
    Segment segment{{30, 10, 40, 0}, 40, {1.0, 0.5, 0.25, 0.25}, 2, 2};
    CHECK(segment.loss({}) == doctest::Approx(4 * (0.375 * 0.5 + 0.125 * 0.25 + 0.5 * 0.125)).epsilon(1e-15));
    CHECK(segment.gradient == std::vector<double>{1.5, 0.5, 2.0, 0.0});
}

TEST_CASE("perfect balance is worth exactly 1 by choice, and exactly K by token") {
    Segment segment{{6, 6, 6, 6}, 8, {2.0, 3.0, 1.0, 2.0}, 8, 3};
    CHECK(segment.loss({}) == 1.0);
    CHECK(segment.gradient == std::vector<double>(4, 1.0));
    CHECK(segment.loss({1.0, LoadNormalization::by_token}) == 3.0);
    CHECK(segment.gradient == std::vector<double>(4, 3.0));
}

TEST_CASE("all choices on one of E experts, which all probability goes to, is worth E") {
    Segment segment{{0, 9, 0}, 9, {0.0, 9.0, 0.0}, 9, 1};
    CHECK(segment.loss({}) == 3.0);
}

TEST_CASE("no tokens, here or in the whole scope, is worth 0 and pulls at nothing") {
    Segment none{{4, 2}, 6, {0.0, 0.0}, 0, 1};
    CHECK(none.loss({}) == 0.0);
    CHECK(none.gradient == std::vector<double>(2, 0.0));
    Segment no_past{{0, 0}, 0, {1.0, 2.0}, 3, 1};
    CHECK(no_past.loss({}) == 0.0);
    CHECK(no_past.gradient == std::vector<double>(2, 0.0));
}

TEST_CASE("the coefficient is the policy's to apply, not the loss's") {
    Segment segment{{3, 1}, 4, {2.4, 1.6}, 4, 1};
    CHECK(segment.loss({.coefficient = 1e6}) == segment.loss({.coefficient = 0.0}));
    CHECK(LoadBalancingLoss{}.coefficient == 0.008);
}
