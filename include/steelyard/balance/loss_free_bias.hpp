// Balancing without a loss: a selection bias that follows the load.
#pragma once

#include <cmath>
#include <string>

#include "steelyard/balance/objective.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard {

/// After each optimizer step: b_i += rate * sign(mean(c) - c_i)   (Auxiliary-Loss-Free Load Balancing, 2408.15664).
///
/// A starved expert's bias rises. Selection is by s + b, weights by s. The bias is float, gets no gradient, and
/// never sees the batch that it was computed from. The comparison is in integers: sign(sum(c) - E c_i), exact.
/// `centred` takes the mean of the update off, so that the biases keep their sum. Default rate: 1e-3, the paper's.
struct LossFreeBias {
    double rate = 1e-3;
    bool centred = false;

    [[nodiscard]] Status check() const {
        if (std::isfinite(rate)) return {};
        return Status::refuse(Code::invalid_argument, "balance", "rate", "a finite number", std::to_string(rate));
    }

    constexpr void update(view<const std::int64_t, 1> counts, view<float, 1> bias) const {
        const index_t experts = counts.extents[0];
        std::int64_t total = 0, signs = 0;
        for (index_t i = 0; i < experts; ++i) total += counts[i];
        const auto sign = [&](index_t i) {
            const std::int64_t starved = total - experts * counts[i];
            return (starved > 0) - (starved < 0);
        };
        for (index_t i = 0; i < experts; ++i) signs += sign(i);
        const double mean = centred ? static_cast<double>(signs) / static_cast<double>(experts) : 0.0;
        for (index_t i = 0; i < experts; ++i) bias[i] += static_cast<float>(rate * (sign(i) - mean));
    }

    friend bool operator==(const LossFreeBias&, const LossFreeBias&) = default;
};

static_assert(BiasObjective<LossFreeBias>);

}  // namespace steelyard
