#include <doctest/doctest.h>

#include <cstddef>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"

using namespace steelyard;

namespace {

struct alignas(layout_alignment) Memory {
    std::byte bytes[4096];
};

}  // namespace

TEST_CASE("a routing is laid out for T tokens, E experts and K choices, and its first rows are the same memory") {
    Memory memory;
    const auto routing = place<Routing<float>>(memory.bytes, index_t{6}, index_t{5}, index_t{2});
    CHECK(check_view("router", "logits", routing.logits, 6, 5).ok());
    CHECK(check_view("router", "probs", routing.probs, 6, 5).ok());
    CHECK(check_view("router", "expert", routing.expert, 6, 2).ok());
    CHECK(check_view("router", "weight", routing.weight, 6, 2).ok());

    const auto few = routing.first(4);
    CHECK(few.logits.data == routing.logits.data);
    CHECK(check_view("router", "expert", few.expert, 4, 2).ok());
    CHECK(check_view("router", "probs", few.probs, 4, 5).ok());
}

TEST_CASE("a routing gradient has the shapes of what it is the gradient of") {
    Memory memory;
    const auto gradient = place<RoutingGrad<double>>(memory.bytes, index_t{6}, index_t{5}, index_t{2}).first(3);
    CHECK(check_view("router", "weight", gradient.weight, 3, 2).ok());
    CHECK(check_view("router", "probs", gradient.probs, 3, 5).ok());
    CHECK(check_view("router", "logits", gradient.logits, 3, 5).ok());
}

TEST_CASE("a plan knows its experts and choices, also for its first tokens") {
    Memory memory;
    const auto plan = place<Plan<>>(memory.bytes, index_t{6}, index_t{5}, index_t{2});
    CHECK(plan.experts() == 5);
    CHECK(plan.top_k() == 2);
    CHECK(check_view("plan", "choice", plan.choice, 12).ok());
    const auto few = plan.first(4);
    CHECK(few.experts() == 5);
    CHECK(check_view("plan", "choice", few.choice, 8).ok());
    CHECK(check_view("plan", "row", few.row, 4, 2).ok());
}

TEST_CASE("tokens are all valid, one sequence and in training unless told") {
    const TokenInfo<> tokens;
    CHECK_FALSE(tokens.mask.present());
    CHECK_FALSE(tokens.sequences.present());
    CHECK(tokens.mode == Mode::train);
    CHECK(tokens.step.step == 0);
}
