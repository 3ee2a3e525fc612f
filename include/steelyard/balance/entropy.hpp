// Entropy losses: decided tokens, and experts that are all of use.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "steelyard/balance/objective.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard {

/// H(softmax(z_t)), in nats, of each token (LIMoE's local loss, 2206.02770): small where the token is decided.
///
///     H = sum_i p_i (lse - z_i),    dH/dz_j = p_j ((lse - z_j) - H)
///
/// A negative coefficient keeps tokens undecided. The softmax is of the logits, also for routers with other scores.
/// Default coefficient: 0.01.
struct LocalEntropy {
    double coefficient = 0.01;

    template <class T, class Math = RowMath>
    constexpr double loss(view<const T, 1> logits, Math math = {}) const {
        return static_cast<double>(entropy(logits, math.log_sum_exp(logits), math));
    }

    template <class T, class Math = RowMath>
    constexpr void gradient(view<const T, 1> logits, double factor, view<T, 1> dlogits, Math math = {}) const {
        const T lse = math.log_sum_exp(logits), of_row = entropy(logits, lse, math), scale = static_cast<T>(factor);
        const index_t experts = logits.extents[0];
        for (index_t i = 0; i < experts; ++i) {
            const T surprise = lse - logits.data[i];
            dlogits.data[i] += scale * math.exp(-surprise) * (surprise - of_row);
        }
    }

    friend bool operator==(const LocalEntropy&, const LocalEntropy&) = default;

private:
    template <class T, class Math>
    static constexpr T entropy(const view<const T, 1>& logits, T lse, Math math) {
        T sum = 0;
        for (index_t i = 0; i < logits.extents[0]; ++i) {
            const T surprise = lse - logits.data[i];
            sum += math.exp(-surprise) * surprise;
        }
        return sum;
    }
};

/// -H(m), in nats, of the mean probabilities m over the scope (LIMoE's global loss, 2206.02770): small where all
/// experts have their share. With a threshold, max(0, threshold - H(m)): only below that entropy, that is with fewer
/// than exp(threshold) experts in use, does it pull.
///
///     dloss/dm_i = log m_i + 1,  or 0 at and above the threshold
///
/// A mean of 0 is taken as the smallest that fixed-point sums hold, so that the gradient is finite. A negative
/// coefficient minimises the entropy: over the tokens of one task it is that of H(e | task), as in Mod-Squad
/// (2212.08066). Default coefficient: 0.01.
struct GlobalEntropy {
    static constexpr Quantity quantity = Quantity::probs;
    double coefficient = 0.01;
    /// In nats. Infinite: none.
    double threshold = std::numeric_limits<double>::infinity();

    [[nodiscard]] Status check() const {
        if (threshold >= 0.0) return {};
        return Status::refuse(Code::invalid_argument, "balance", "threshold", "at least 0, or infinity for none",
                              std::to_string(threshold));
    }

    double loss(const SegmentMean& segment, view<double, 1> gradient) const {
        double minus_entropy = 0.0;
        for (index_t i = 0; i < segment.experts(); ++i) {
            const double log_mean = std::log(std::max(segment.mean(i), segment.least()));
            minus_entropy += segment.mean(i) * log_mean;
            gradient[i] = log_mean + 1.0;
        }
        if (std::isinf(threshold)) return minus_entropy;
        const double below = threshold + minus_entropy;
        if (below > 0.0) return below;
        for (index_t i = 0; i < segment.experts(); ++i) gradient[i] = 0.0;
        return 0.0;
    }

    friend bool operator==(const GlobalEntropy&, const GlobalEntropy&) = default;
};

static_assert(TokenObjective<LocalEntropy> && MeanObjective<GlobalEntropy>);

}  // namespace steelyard
