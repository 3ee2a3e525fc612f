#include "steelyard/cpu/lanes.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

using namespace steelyard;

TEST_CASE_TEMPLATE("exp, log and sigmoid are within a few units in the last place of the standard library", T, float,
                   double) {
    const double unit = std::numeric_limits<T>::epsilon();
    const double lowest = sizeof(T) == 4 ? -87.0 : -708.0;
    for (double at = 0.0; at > lowest; at -= 0.0137) {
        const T x = static_cast<T>(at);
        const double exact = std::exp(static_cast<double>(x));
        REQUIRE(std::abs(static_cast<double>(cpu::exp_negative(x)) - exact) <= 2.0 * unit * exact);
        for (const T z : {x, -x}) {
            const double wide = static_cast<double>(z);
            const double s = wide < 0 ? std::exp(wide) / (1.0 + std::exp(wide)) : 1.0 / (1.0 + std::exp(-wide));
            const double l = std::min(wide, 0.0) - std::log1p(std::exp(-std::abs(wide)));
            REQUIRE(std::abs(static_cast<double>(cpu::sigmoid(z)) - s) <= 4.0 * unit * s);
            REQUIRE(std::abs(static_cast<double>(cpu::log_sigmoid(z)) - l) <= 4.0 * unit * std::abs(l));
        }
    }
    for (double u = 0.0; u <= 1.0; u += 0.00093) {
        const T x = static_cast<T>(u);
        const double exact = std::log1p(static_cast<double>(x));
        REQUIRE(std::abs(static_cast<double>(cpu::log1p_unit(x)) - exact) <= 4.0 * unit * exact);
    }
    CHECK(cpu::exp_negative(T(0)) == T(1));
    CHECK(cpu::exp_negative(-std::numeric_limits<T>::infinity()) == T(0));
    CHECK(cpu::exp_negative(T(-1e30)) == T(0));
    CHECK(std::isnan(cpu::exp_negative(std::numeric_limits<T>::quiet_NaN())));
    CHECK(cpu::log_sigmoid(T(-1e4)) == T(-1e4));
    CHECK(cpu::sigmoid(T(1e4)) == T(1));
}

TEST_CASE_TEMPLATE("The integer order of values is the order of the values, NaN last", T, float, double) {
    const T inf = std::numeric_limits<T>::infinity(), tiny = std::numeric_limits<T>::denorm_min();
    const std::vector<T> rising{-inf, T(-1e30), T(-1), -tiny, T(0), tiny, T(1), T(1e30), inf};
    for (std::size_t i = 1; i < rising.size(); ++i) {
        CHECK(cpu::ordered(rising[i - 1]) < cpu::ordered(rising[i]));
        CHECK(cpu::from_ordered<T>(cpu::ordered(rising[i])) == rising[i]);
    }
    CHECK(cpu::ordered(T(-0.0)) == cpu::ordered(T(0)));
    CHECK(cpu::ordered(std::numeric_limits<T>::quiet_NaN()) < cpu::ordered(-inf));
    CHECK(cpu::ordered(std::numeric_limits<T>::quiet_NaN()) > std::numeric_limits<cpu::Bits<T>>::min());
}

TEST_CASE_TEMPLATE("A sum of products covers every length and every alignment with the same bits", T, float, double) {
    std::vector<T> a(200), b(200), shifted_a(201), shifted_b(203);
    for (std::size_t i = 0; i < 200; ++i) {
        a[i] = shifted_a[i + 1] = static_cast<T>(std::sin(static_cast<double>(i)));
        b[i] = shifted_b[i + 3] = static_cast<T>(std::cos(3.0 * static_cast<double>(i)));
    }
    for (index_t n : {0, 1, 7, 8, 15, 16, 17, 33, 160, 199}) {
        double exact = 0.0;
        for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
            exact += static_cast<double>(a[i]) * static_cast<double>(b[i]);
        const T sum = cpu::row_dot(a.data(), b.data(), n);
        CHECK(std::abs(static_cast<double>(sum) - exact) <=
              100 * static_cast<double>(std::numeric_limits<T>::epsilon()));
        CHECK(cpu::row_dot(shifted_a.data() + 1, shifted_b.data() + 3, n) == sum);
    }
}
