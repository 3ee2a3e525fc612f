// The router z-loss, which keeps logits small.
#pragma once

#include "steelyard/balance/objective.hpp"

namespace steelyard {

/// z-loss = mean_t (log sum_i exp z_ti)^2   (ST-MoE, 2202.08906). Gradient: 2 lse_t softmax(z_t) / T.
///
/// Stable for any finite logits. Default coefficient: 1e-3, that of ST-MoE.
struct ZLoss {
    double coefficient = 1e-3;

    template <class T, class Math = RowMath>
    constexpr double loss(view<const T, 1> logits, Math math = {}) const {
        const double lse = static_cast<double>(math.log_sum_exp(logits));
        return lse * lse;
    }

    template <class T, class Math = RowMath>
    constexpr void gradient(view<const T, 1> logits, double factor, view<T, 1> dlogits, Math math = {}) const {
        const T lse = math.log_sum_exp(logits);
        math.add_exp(logits, lse, static_cast<T>(2.0 * factor) * lse, dlogits);
    }

    friend bool operator==(const ZLoss&, const ZLoss&) = default;
};

static_assert(TokenObjective<ZLoss>);

}  // namespace steelyard
