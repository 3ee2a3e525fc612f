// WithShared: an expert that every token visits, beside the routed ones.
#pragma once

#include "steelyard/expert/concept.hpp"

namespace steelyard {

/// Routed experts and one shared expert (DeepSeekMoE, 2401.06066).
///
///     y[t] = f_shared(x[t]) + sum_k weight[t,k] f_{expert[t,k]}(x[t])
///
/// A value without kernels: the layer runs `shared` as one expert over all valid tokens with weight 1. The router
/// and the balance loss never see it. S shared experts of width h are one of width S h: the sum of their outputs
/// is the output of their concatenation, so `WithShared{SwiGlu{h}, SwiGlu{2 * h}}` has two.
///
/// Its own tensors stand beside the routed ones under the name "shared", with E = 1.
template <class RoutedT, class SharedT = RoutedT>
struct WithShared {
    RoutedT routed;
    SharedT shared;

    friend bool operator==(const WithShared&, const WithShared&) = default;
};

// Written out for compilers that do not deduce aggregates' arguments.
template <class RoutedT, class SharedT>
WithShared(RoutedT, SharedT) -> WithShared<RoutedT, SharedT>;

}  // namespace steelyard
