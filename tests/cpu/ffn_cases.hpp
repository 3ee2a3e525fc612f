// The calls that the tests of feed-forward experts make.
#pragma once

#include "cpu/ffn_run.hpp"
#include "cpu/instruction_sets.hpp"

namespace steelyard::testing {

/// Sizes on either side of tiles, panels, and blocks of the depth and of the hidden layer.
inline std::vector<FfnCase> awkward_calls() {
    using A = Activation;
    const ClampedSwish clamp{.limit = 0.8, .alpha = 1.702};
    std::vector<FfnCase> cases = {
        {.rows = {0, 0}, .width = 3, .hidden = 16, .dropped = 4},
        {.rows = {1}, .function = A::silu, .gated = true, .weighted = false},
        {.rows = {0, 1, 2, 3, 4, 5},
         .width = 17,
         .hidden = 33,
         .function = A::silu,
         .gated = true,
         .bias = true,
         .top_k = 2,
         .padding = 3,
         .dropped = 5},
        {.rows = {11, 12, 13, 25}, .width = 48, .hidden = 65, .function = A::relu, .bias = true, .top_k = 3},
        {.rows = {64}, .width = 130, .hidden = 31, .function = A::gelu, .padding = 1},
        {.rows = {0, 71, 0}, .width = 16, .hidden = 15, .function = A::relu2, .weighted = false, .top_k = 2},
        {.rows = {4, 3, 0, 30},
         .width = 7,
         .hidden = 9,
         .function = A::gelu_tanh,
         .gated = true,
         .bias = true,
         .top_k = 2,
         .padding = 2,
         .first_row = 37,
         .dropped = 9},
        {.rows = {1, 2}, .width = 2100, .hidden = 70, .function = A::silu, .gated = true, .bias = true},
        {.rows = {3}, .width = 17, .hidden = 2100, .function = clamp, .gated = true, .padding = 5},
        {.rows = {401}, .width = 7, .hidden = 9, .function = FfnFunction::linear(0.25), .bias = true},
        {.rows = std::vector<index_t>(160, 1), .width = 31, .hidden = 3, .function = A::gelu, .bias = true},
    };
    if (few_sizes) return cases;
    const FfnCase long_ones[] = {
        {.rows = {257}, .width = 33, .hidden = 130, .function = clamp, .gated = true, .bias = true},
        {.rows = {3, 300, 0}, .width = 15, .hidden = 48, .function = A::silu, .gated = true, .top_k = 2},
        {.rows = {25, 0, 5}, .width = 513, .hidden = 65, .function = A::silu, .gated = true},
        {.rows = {13, 1}, .width = 2100, .hidden = 17, .function = A::silu, .gated = true},
        {.rows = {2, 13}, .width = 65, .hidden = 2100, .function = A::relu2},
        {.rows = {12}, .width = 600, .hidden = 1100, .function = A::gelu_tanh, .bias = true},
        {.rows = {801, 1}, .width = 15, .hidden = 31, .function = FfnFunction::linear(0.25), .bias = true, .top_k = 2},
    };
    cases.insert(cases.end(), std::begin(long_ones), std::end(long_ones));
    return cases;
}

}  // namespace steelyard::testing
