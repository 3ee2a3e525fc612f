#include <doctest/doctest.h>

#include "steelyard/core/shape.hpp"

using namespace steelyard;

TEST_CASE("a shape holds one sequence and one micro-step unless told, and compares by value") {
    constexpr LayerShape shape{.tokens = 64, .width = 16, .experts = 8};
    static_assert(shape.sequences == 1 && shape.micro_steps == 1);
    CHECK(shape == LayerShape{64, 16, 8, 1, 1});
    CHECK(shape != LayerShape{64, 16, 8, 1, 2});
}
