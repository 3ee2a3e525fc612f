// What forward keeps for backward: the experts' inner activations, or nothing but the routing.
#pragma once

#include <concepts>

namespace steelyard {

/// Keep the experts' pre-activations in the context: 2 h values for each routed row of a SwiGlu.
struct KeepActivations {
    static constexpr bool keeps = true;
};

/// Compute them again in backward from x, through the same plan. The context shrinks to the routing; backward costs
/// one more pass over the first expert products. Routing is not repeated: nothing is counted twice and f is the same.
struct RecomputeActivations {
    static constexpr bool keeps = false;
};

template <class R>
concept Retention = requires {
    { R::keeps } -> std::convertible_to<bool>;
};

}  // namespace steelyard
