// The router z-loss, which keeps logits small.
#pragma once

#include <cmath>

#include "steelyard/balance/objective.hpp"

namespace steelyard {

/// z-loss = mean_t (log sum_i exp z_ti)^2   (ST-MoE, 2202.08906). Gradient: 2 lse_t softmax(z_t) / T.
///
/// Stable for any finite logits. Default coefficient: 1e-3, that of ST-MoE.
struct ZLoss {
    double coefficient = 1e-3;

    template <class T>
    double loss(view<const T, 1> logits) const {
        const double lse = static_cast<double>(log_sum_exp(logits));
        return lse * lse;
    }

    template <class T>
    void gradient(view<const T, 1> logits, double factor, view<T, 1> dlogits) const {
        const T lse = log_sum_exp(logits);
        const T scale = static_cast<T>(2.0 * factor) * lse;
        const index_t experts = logits.extents[0];
        for (index_t i = 0; i < experts; ++i) dlogits.data[i] += scale * std::exp(logits.data[i] - lse);
    }

    friend bool operator==(const ZLoss&, const ZLoss&) = default;

private:
    template <class T>
    static T log_sum_exp(view<const T, 1> logits) {
        const index_t experts = logits.extents[0];
        T largest = logits.data[0];
        for (index_t i = 1; i < experts; ++i) largest = logits.data[i] > largest ? logits.data[i] : largest;
        T sum = 0;
        for (index_t i = 0; i < experts; ++i) sum += std::exp(logits.data[i] - largest);
        return largest + std::log(sum);
    }
};

static_assert(TokenObjective<ZLoss>);

}  // namespace steelyard
