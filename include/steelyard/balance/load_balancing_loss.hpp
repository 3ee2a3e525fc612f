// The load-balancing loss of GShard and Switch.
#pragma once

#include "steelyard/balance/objective.hpp"

namespace steelyard {

/// What "balanced" is worth.
enum class LoadNormalization {
    by_choice,  ///< f_i = c_i / (K T): perfect balance gives exactly 1, for any K
    by_token,   ///< f_i = c_i / T: perfect balance gives K (GShard, Switch at K = 1, several frameworks)
};

/// LBL = E * sum_i f_i P_i   (Demons in the Detail, 2501.11873, equation 2; Switch Transformer, 2101.03961).
///
/// f_i is the load fraction of the scope, P_i the mean probability over this call's tokens. f is a count, so
/// dLBL/dP_i = E f_i. If f_i = 1/E for all i the loss is 1 and its gradient by the logits is exactly 0.
/// Default coefficient: 0.008, the paper's.
struct LoadBalancingLoss {
    double coefficient = 0.008;
    LoadNormalization normalization = LoadNormalization::by_choice;

    constexpr double loss(const SegmentLoad& segment, view<double, 1> gradient) const {
        const index_t experts = segment.experts();
        const double choices = normalization == LoadNormalization::by_token ? static_cast<double>(segment.top_k) : 1.0;
        double sum = 0.0;
        for (index_t i = 0; i < experts; ++i) {
            const double slope =
                segment.own_tokens == 0 ? 0.0 : choices * static_cast<double>(experts) * segment.fraction(i);
            gradient[i] = slope;
            sum += slope * segment.mean_prob(i);
        }
        return sum;
    }

    friend bool operator==(const LoadBalancingLoss&, const LoadBalancingLoss&) = default;
};

static_assert(LoadObjective<LoadBalancingLoss>);

}  // namespace steelyard
