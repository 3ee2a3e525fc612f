// What the router's kernels are called with. They are compiled for each instruction set; this is not.
#pragma once

#include <cstdint>

#include "steelyard/core/routing.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard::cpu {

/// Most tokens of one call of a kernel: one bit of the answer for each.
inline constexpr index_t select_block = 64;

/// Most choices that are kept in registers, in order.
inline constexpr int select_choices = 16;

/// Scratch of one thread for `select`: values with the experts one below the other and a token in each lane.
template <class T>
struct SelectColumns {
    view<T, 1> value;  // [E, lanes], and on to the next multiple of the most lanes
    view<T, 1> group;  // [groups, lanes], no more than E

    template <class Field>
    void fields(Field&& field, index_t experts) {
        field("value", value, padded<T>(experts) * row_lanes<T>);
        field("group", group, experts * row_lanes<T>);
    }
};

/// Everything that is the same for all blocks of tokens.
template <class T>
struct SelectCall {
    SelectionRule rule;
    view<const float, 1> bias;         // [E], finite, or absent
    view<const std::uint8_t, 1> mask;  // [T], or absent
    Routing<T> routing;
    bool choose = true;  // false: the experts are there already, and only weighed
};

}  // namespace steelyard::cpu
