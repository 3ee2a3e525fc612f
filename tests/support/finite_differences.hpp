// Derivatives by differences, in double, against the gradients that code gives.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <span>

namespace steelyard::testing {

/// The largest relative error of `gradient` against the derivative of `loss` by each of `values`.
///
/// Five-point central differences: the truncation error is of order h^4, so that both it and the rounding of the loss
/// (about 1e-16 / h) stay far below 1e-6. An element's error is relative to the larger of the two numbers, and to a
/// thousandth of the largest gradient where both are smaller than that.
inline double difference_error(std::span<double> values, std::span<const double> gradient,
                               const std::function<double()>& loss, double h = 2e-4) {
    double largest = 0, worst = 0;
    for (const double g : gradient) largest = std::max(largest, std::abs(g));
    for (std::size_t i = 0; i < values.size(); ++i) {
        const double kept = values[i];
        const auto at = [&](double offset) {
            values[i] = kept + offset;
            return loss();
        };
        const double difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
        values[i] = kept;
        const double scale = std::max({std::abs(difference), std::abs(gradient[i]), 1e-3 * largest});
        const double error = difference == gradient[i] ? 0 : std::abs(difference - gradient[i]) / scale;
        if (!(error <= worst)) worst = error;  // a NaN stays
    }
    return worst;
}

}  // namespace steelyard::testing
