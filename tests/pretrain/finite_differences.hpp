// Gradients against central differences, in double.
#pragma once

#include <doctest/doctest.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "steelyard/core/random.hpp"
#include "steelyard/core/view.hpp"

namespace test {

using steelyard::index_t;
using steelyard::view;

/// Aligned, because Eigen's vectors begin at aligned addresses and their ends are computed one by one.
using Values = std::vector<double, Eigen::aligned_allocator<double>>;

/// A tensor with memory of its own, filled with reproducible normal numbers.
template <int Rank>
struct Random {
    Values values;
    view<double, Rank> tensor;

    template <class... Extents>
    explicit Random(std::uint64_t seed, double scale, Extents... extents)
        : values(static_cast<std::size_t>((static_cast<index_t>(extents) * ...))), tensor(values.data(), extents...) {
        const steelyard::Philox philox(seed, steelyard::Stream::user);
        for (std::size_t i = 0; i < values.size(); ++i) values[i] = scale * philox.normal(i);
    }
    operator view<double, Rank>() const { return tensor; }
    operator view<const double, Rank>() const { return tensor; }
};

inline double dot(const Values& a, const Values& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}

/// The largest error of `gradient` against central differences of `loss` over `values`, as a fraction of the
/// largest entry of the gradient.
template <class Loss>
double gradient_error(double* values, const double* gradient, std::size_t size, const Loss& loss) {
    double error = 0, largest = 0;
    const double h = 1e-5;
    for (std::size_t i = 0; i < size; ++i) {
        const double at = values[i];
        values[i] = at + h;
        const double above = loss();
        values[i] = at - h;
        const double below = loss();
        values[i] = at;
        error = std::max(error, std::abs((above - below) / (2 * h) - gradient[i]));
        largest = std::max(largest, std::abs(gradient[i]));
    }
    return largest == 0 ? error : error / largest;
}

template <class Loss>
void check_gradient(const std::string& name, Values& values, const Values& gradient,
                    const Loss& loss) {
    CAPTURE(name);
    CHECK(*std::max_element(gradient.begin(), gradient.end()) != 0);
    CHECK(gradient_error(values.data(), gradient.data(), values.size(), loss) <= 1e-6);
}

}  // namespace test
