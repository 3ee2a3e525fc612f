// The type of what a router computes.
#pragma once

#include <type_traits>

#include "steelyard/core/bf16.hpp"

namespace steelyard {

/// Logits, probabilities, combine weights and their gradients of a layer of T: T itself, but float for bf16, in which a
/// softmax would lose what tells experts apart.
template <class T>
using gate_t = std::conditional_t<std::is_same_v<T, bf16>, float, T>;

}  // namespace steelyard
