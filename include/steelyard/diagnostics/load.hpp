// How even a load is: the numbers that people watch while a mixture-of-experts model trains.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "steelyard/core/routing.hpp"

namespace steelyard {

/// counts [E] (+=) the choices of each expert, as the router made them: before any drop, padding left out.
///
/// Counted over one call this is the micro scope; accumulated over calls and summed over ranks, the global one.
template <class T>
void count_choices(const Routing<T>& routing, std::span<std::int64_t> counts) {
    for (index_t t = 0; t < routing.expert.extents[0]; ++t)
        for (index_t k = 0; k < routing.expert.extents[1]; ++k)
            if (const expert_t e = routing.expert(t, k); e >= 0) ++counts[static_cast<std::size_t>(e)];
}

/// What a load looks like. All of it is 0 for an empty load.
struct LoadSummary {
    double mean = 0, deviation = 0;     ///< of the counts; population standard deviation
    std::int64_t smallest = 0, largest = 0;
    double p05 = 0, p25 = 0, p50 = 0, p75 = 0, p95 = 0;  ///< percentiles, interpolated
    double max_violation = 0;           ///< MaxVio = max_i c_i / mean(c) - 1 (2408.15664): 0 is perfect balance
    double entropy = 0;                 ///< of the load fractions, in nats; log(E) is perfect balance
    double utilization = 0;             ///< exp(entropy) / E: the share of experts that are as good as used evenly
    index_t dead = 0;                   ///< experts that nobody chose
};

/// Percentile `q` in [0, 1] of ascending values, linear between neighbours.
[[nodiscard]] inline double percentile(std::span<const std::int64_t> ascending, double q) {
    if (ascending.empty()) return 0.0;
    const double at = q * static_cast<double>(ascending.size() - 1);
    const auto below = static_cast<std::size_t>(at);
    const std::size_t above = std::min(below + 1, ascending.size() - 1);
    const double share = at - static_cast<double>(below);
    return static_cast<double>(ascending[below]) * (1 - share) + static_cast<double>(ascending[above]) * share;
}

/// Summary of counts [E]; `sorted` [E] is scratch, so that nothing is allocated.
[[nodiscard]] inline LoadSummary summarize_load(std::span<const std::int64_t> counts, std::span<std::int64_t> sorted) {
    LoadSummary summary;
    const auto experts = static_cast<double>(counts.size());
    std::int64_t total = 0;
    for (const std::int64_t c : counts) total += c;
    if (total == 0) {
        summary.dead = static_cast<index_t>(counts.size());
        return summary;
    }
    std::copy(counts.begin(), counts.end(), sorted.begin());
    std::sort(sorted.begin(), sorted.end());
    summary.mean = static_cast<double>(total) / experts;
    summary.smallest = sorted.front();
    summary.largest = sorted.back();
    double variance = 0;
    for (const std::int64_t c : counts) {
        const double off = static_cast<double>(c) - summary.mean, share = static_cast<double>(c) / static_cast<double>(total);
        variance += off * off / experts;
        if (c == 0) ++summary.dead;
        else summary.entropy -= share * std::log(share);
    }
    summary.deviation = std::sqrt(variance);
    summary.p05 = percentile(sorted, 0.05), summary.p25 = percentile(sorted, 0.25);
    summary.p50 = percentile(sorted, 0.50), summary.p75 = percentile(sorted, 0.75);
    summary.p95 = percentile(sorted, 0.95);
    summary.max_violation = static_cast<double>(summary.largest) / summary.mean - 1.0;
    summary.utilization = std::exp(summary.entropy) / experts;
    return summary;
}

}  // namespace steelyard
