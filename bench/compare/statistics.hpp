// Medians and quartiles: what a noisy machine leaves of many samples.
#pragma once

#include <algorithm>
#include <vector>

namespace steelyard_bench {

struct Spread {
    double q1 = 0, median = 0, q3 = 0;
};

/// Quartiles by linear interpolation; zeros of no values.
[[nodiscard]] inline Spread spread_of(std::vector<double> values) {
    if (values.empty()) return {};
    std::sort(values.begin(), values.end());
    const auto at = [&](double share) {
        const double place = share * static_cast<double>(values.size() - 1);
        const auto low = static_cast<std::size_t>(place), high = std::min(low + 1, values.size() - 1);
        return values[low] + (place - static_cast<double>(low)) * (values[high] - values[low]);
    };
    return {at(0.25), at(0.5), at(0.75)};
}

}  // namespace steelyard_bench
