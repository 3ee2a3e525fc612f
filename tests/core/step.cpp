#include <doctest/doctest.h>

#include "steelyard/core/step.hpp"

using namespace steelyard;

TEST_CASE("a step says nothing special until told") {
    constexpr StepInfo step;
    static_assert(step.step == 0 && step.micro_step == 0 && step.token_offset == 0);
    CHECK(step.total_tokens == 0);  // 0: this call is the whole optimizer step
    CHECK(step.grad_scale == 1.0);
}

TEST_CASE("a step is an aggregate whose fields are named where it is made") {
    const StepInfo step{.step = 7, .micro_step = 3, .total_tokens = 4096, .token_offset = 1024, .grad_scale = 4.0};
    CHECK(step.step == 7);
    CHECK(step.micro_step == 3);
    CHECK(step.total_tokens == 4096);
    CHECK(step.token_offset == 1024);
    CHECK(step.grad_scale == 4.0);
}
