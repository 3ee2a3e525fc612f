#include "steelyard/cpu/kernels.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using namespace steelyard;

namespace {

template <Activation A, class T>
std::pair<T, T> at(T x) {
    typename cpu::Simd<T>::vec v = {};
    v += x;
    const auto result = cpu::activate<A, T>(v);
    return {result.value[cpu::Simd<T>::lanes - 1], result.slope[0]};
}

template <class T>
T exp_at(T x) {
    typename cpu::Simd<T>::vec v = {};
    v += x;
    return cpu::exp_nonpositive<T>(v)[0];
}

}  // namespace

TEST_CASE_TEMPLATE("the vector exp is within 2 ulp of the exact one", T, float, double) {
    const double lowest = sizeof(T) == 4 ? -87.0 : -708.0, epsilon = std::numeric_limits<T>::epsilon();
    CHECK(exp_at<T>(0) == T(1));
    for (int i = 0; i <= 20000; ++i) {
        const T x = static_cast<T>(lowest * std::pow(i / 20000.0, 3));
        const long double exact = std::exp(static_cast<long double>(x));
        CHECK(std::abs(static_cast<long double>(exp_at<T>(x)) - exact) <= 2 * epsilon * exact);
    }
    CHECK(exp_at<T>(T(-1e30)) == T(0));
    CHECK(exp_at<T>(-std::numeric_limits<T>::infinity()) == T(0));
    CHECK(std::isnan(exp_at<T>(std::numeric_limits<T>::quiet_NaN())));
}

TEST_CASE_TEMPLATE("the normal distribution keeps its digits in the tail, and ends in 0 and 1", T, float, double) {
    const long double epsilon = std::numeric_limits<T>::epsilon(), root = std::sqrt(0.5L);
    const auto cdf = [](T x) {
        typename cpu::Simd<T>::vec v = {};
        return cpu::normal<T>(v + x).cdf[0];
    };
    CHECK(std::abs(cdf(T(0)) - T(0.5)) <= epsilon);
    const T lowest = sizeof(T) == 4 ? T(-13) : T(-37);
    for (int i = 0; i <= 20000; ++i) {
        const T x = lowest * static_cast<T>(i / 20000.0);
        CAPTURE(x);
        const long double exact = std::erfc(-static_cast<long double>(x) * root) / 2;
        CHECK(std::abs(cdf(x) - exact) <= (4 + static_cast<long double>(x * x)) * epsilon * exact);
        CHECK(std::abs(cdf(-x) - (1 - exact)) <= 2 * epsilon);
    }
    for (const T far : {T(1e30), std::numeric_limits<T>::infinity()}) {
        CHECK(cdf(-far) == T(0));
        CHECK(cdf(far) == T(1));
    }
    CHECK(std::isnan(cdf(std::numeric_limits<T>::quiet_NaN())));
}

TEST_CASE_TEMPLATE("activations and slopes equal their formulas", T, float, double) {
    const long double tolerance = 8 * std::numeric_limits<T>::epsilon();
    for (int i = -2000; i <= 2000; ++i) {
        const T x = static_cast<T>(i * 0.01);
        CAPTURE(x);
        const long double z = x;
        const auto check = [&](std::pair<T, T> came, long double value, long double slope) {
            CHECK(std::abs(came.first - value) <= tolerance * std::abs(value) + 1e-3 * tolerance);
            CHECK(std::abs(came.second - slope) <= tolerance * (1 + std::abs(slope)));
        };
        const long double s = 1 / (1 + std::exp(-z)), phi = std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0L));
        const long double cdf = std::erfc(-z / std::sqrt(2.0L)) / 2;
        check(at<Activation::relu>(x), z > 0 ? z : 0, z > 0);
        check(at<Activation::relu2>(x), z > 0 ? z * z : 0, z > 0 ? 2 * z : 0);
        check(at<Activation::silu>(x), z * s, s * (1 + z * (1 - s)));
        check(at<Activation::identity>(x), z, 1);
        const auto gelu = at<Activation::gelu>(x);  // the tail is rounded in its argument: absolute there
        CHECK(std::abs(gelu.first - z * cdf) <= tolerance * (std::abs(z * cdf) + 0.01L));
        CHECK(std::abs(gelu.second - (cdf + z * phi)) <= tolerance * 2);
        const long double c = std::sqrt(2 / std::acos(-1.0L)), th = std::tanh(c * (z + 0.044715L * z * z * z));
        const auto approximate = at<Activation::gelu_tanh>(x);  // likewise
        CHECK(std::abs(approximate.first - z * (1 + th) / 2) <= tolerance * (std::abs(z * (1 + th)) + 0.02L));
        const long double slope = (1 + th) / 2 + z / 2 * (1 - th * th) * c * (1 + 3 * 0.044715L * z * z);
        CHECK(std::abs(approximate.second - slope) <= tolerance * 8);  // 1 - s is rounded, then grows with z^3
    }
}

TEST_CASE_TEMPLATE("activations stay finite at both ends, and a NaN stays a NaN", T, float, double) {
    for (const T x : {T(-1e38), T(-1000), T(1000), T(1e38)}) {
        const T linear = x > 0 ? x : T(0);
        CHECK(at<Activation::silu>(x).first == doctest::Approx(double(linear)).epsilon(1e-6));
        CHECK(at<Activation::gelu>(x).first == doctest::Approx(double(linear)).epsilon(1e-6));
        CHECK(at<Activation::gelu_tanh>(x).first == doctest::Approx(double(linear)).epsilon(1e-6));
        CHECK(std::abs(at<Activation::gelu_tanh>(x).second - (x > 0 ? T(1) : T(0))) < T(1e-6));
        CHECK(std::abs(at<Activation::silu>(x).second - (x > 0 ? T(1) : T(0))) < T(1e-6));
        CHECK(std::abs(at<Activation::gelu>(x).second - (x > 0 ? T(1) : T(0))) < T(1e-6));
    }
    const T nan = std::numeric_limits<T>::quiet_NaN();
    CHECK(std::isnan(at<Activation::relu>(nan).first));
    CHECK(std::isnan(at<Activation::relu2>(nan).first));
    CHECK(std::isnan(at<Activation::silu>(nan).first));
    CHECK(std::isnan(at<Activation::gelu>(nan).first));
    CHECK(std::isnan(at<Activation::gelu_tanh>(nan).first));
    CHECK(std::isnan(at<Activation::identity>(nan).first));
}

TEST_CASE_TEMPLATE("the clamped gate equals its formula, and its gradient stops beyond the limits, not on them", T,
                   float, double) {
    using Function = cpu::ClampedFunction<T>;
    using vec = typename cpu::Simd<T>::vec;
    const Function f{T(7), T(1.702)};
    const double tolerance = 16 * double(std::numeric_limits<T>::epsilon());
    for (const double gate : {-40.0, -7.5, -7.0, -1.0, 0.0, 0.5, 6.5, 7.0, 7.25, 1e30})
        for (const double up : {-1e30, -7.25, -7.0, -1.0, 0.0, 3.0, 7.0, 7.5, 40.0}) {
            CAPTURE(gate);
            CAPTURE(up);
            const double g = std::min(gate, 7.0), u = std::max(-7.0, std::min(up, 7.0));
            const double s = 1 / (1 + std::exp(-1.702 * g)), swish = g * s, slope = s * (1 + 1.702 * g * (1 - s));
            const vec gates = vec{} + T(gate), ups = vec{} + T(up);
            const auto came = f.gradient(gates, ups, vec{} + T(2));
            const auto near = [&](T number, double expected) {
                return std::abs(double(number) - expected) <= tolerance * (1 + std::abs(expected));
            };
            CHECK(f.value(gates, ups)[0] == came.value[0]);
            CHECK(near(came.value[0], (u + 1) * swish));
            if (gate > 7)
                CHECK(came.dgate[0] == T(0));
            else
                CHECK(near(came.dgate[0], 2 * (u + 1) * slope));
            if (std::abs(up) > 7)
                CHECK(came.dup[0] == T(0));
            else
                CHECK(near(came.dup[0], 2 * swish));
        }
    const vec nan = vec{} + std::numeric_limits<T>::quiet_NaN(), one = vec{} + T(1);
    CHECK(std::isnan(f.value(nan, one)[0]));
    CHECK(std::isnan(f.value(one, nan)[0]));
}
