// Row arithmetic on the CPU in fixed lanes: vectorised exp and log, sums whose order no machine changes.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "steelyard/core/view.hpp"

namespace steelyard::cpu {

/// Elements that are worked on together. Reductions keep this many partial results whatever the vector
/// width of the machine, so their order, and with it every bit, depends on the row's length alone.
template <class T>
inline constexpr index_t row_lanes = 64 / static_cast<index_t>(sizeof(T));

/// The next multiple of `row_lanes`: scratch rows are this long, so that loops over them have no tail.
template <class T>
constexpr index_t padded(index_t n) {
    return (n + row_lanes<T> - 1) / row_lanes<T> * row_lanes<T>;
}

/// The integer as wide as T, whose order sorts floating-point values.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

namespace detail {

/// c[i] such that exp(r) = c[0] + c[1] r + ... for |r| <= ln(2) / 2: to 3.1e-9 in float (minimax, with c[0] = c[1] =
/// 1), to 5e-18 in double (Taylor).
template <class T>
constexpr auto exp_series() {
    if constexpr (sizeof(T) == 4) {
        return std::array<T, 7>{T(1),
                                T(1),
                                T(0.4999999403953552),
                                T(0.1666652113199234),
                                T(0.04166838899254799),
                                T(0.008368730545043945),
                                T(0.0013814569683745503)};
    } else {
        std::array<T, 14> c{};
        double factorial = 1.0;
        for (std::size_t i = 0; i < c.size(); ++i) {
            if (i > 0) factorial *= static_cast<double>(i);
            c[i] = static_cast<T>(1.0 / factorial);
        }
        return c;
    }
}

template <class T, std::size_t N>
constexpr std::array<T, N> inverse_odds() {
    std::array<T, N> c{};
    for (std::size_t i = 0; i < N; ++i) c[i] = static_cast<T>(1.0 / static_cast<double>(2 * i + 1));
    return c;
}

/// c[0] + c[1] x + ... by Horner's rule, unrolled: a loop here would keep the caller's from being vectorised.
template <class T, std::size_t N, std::size_t... I>
inline T horner(T x, const std::array<T, N>& c, std::index_sequence<I...>) {
    T sum = c[N - 1];
    ((sum = sum * x + c[N - 2 - I]), ...);
    return sum;
}

template <class T, std::size_t N>
inline T horner(T x, const std::array<T, N>& c) {
    return horner(x, c, std::make_index_sequence<N - 1>{});
}

}  // namespace detail

/// exp(x) for x <= 0, within 2 units in the last place; 0 where the result would not be a normal number.
///
/// x = n ln 2 + r with |r| <= ln(2) / 2; exp(r) by a polynomial. No branch and no call, so a loop over it is
/// vectorised.
template <class T>
inline T exp_negative(T x) {
    constexpr bool single = sizeof(T) == 4;
    constexpr T round = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^(mantissa bits)
    constexpr T lowest = single ? T(-87) : T(-708);
    constexpr T ln2_high = single ? T(0.693359375) : T(0x1.62e4p-1);  // few bits: n * ln2_high is exact
    constexpr T ln2_low = static_cast<T>(0.693147180559945309417232L - static_cast<long double>(ln2_high));
    constexpr int mantissa = single ? 23 : 52;
    static constexpr auto series = detail::exp_series<T>();

    const T shifted = x * T(1.44269504088896340736) + round;
    const T n = shifted - round;
    const T r = (x - n * ln2_high) - n * ln2_low;
    const T fraction = detail::horner(r, series);
    // The low bits of `shifted` hold n: added to the exponent they scale by 2^n.
    using U = std::make_unsigned_t<Bits<T>>;
    const U scaled = std::bit_cast<U>(fraction) + (std::bit_cast<U>(shifted) << mantissa);
    return x < lowest ? T(0) : std::bit_cast<T>(scaled);
}

/// log(1 + u) for u in [0, 1], to a few units in the last place: 2 artanh(u / (2 + u)) by its series.
template <class T>
inline T log1p_unit(T u) {
    static constexpr auto series = detail::inverse_odds < T, sizeof(T) == 4 ? 8 : 17 > ();
    const T s = u / (T(2) + u);
    return T(2) * s * detail::horner(s * s, series);
}

/// log sigmoid(z) = min(z, 0) - log(1 + exp(-|z|)).
template <class T>
inline T log_sigmoid(T z) {
    const T magnitude = z < T(0) ? -z : z;
    return (z < T(0) ? z : T(0)) - log1p_unit(exp_negative(-magnitude));
}

template <class T>
inline T sigmoid(T z) {
    const T u = exp_negative(z < T(0) ? z : -z);
    return (z < T(0) ? u : T(1)) / (T(1) + u);
}

/// An integer that orders like the value: NaN below everything, -0 and +0 equal. Never the lowest integer,
/// which is free to mean "not a candidate".
template <class T>
inline Bits<T> ordered(T value) {
    using B = Bits<T>;
    constexpr B lowest = std::numeric_limits<B>::min();
    const B bits = std::bit_cast<B>(value + T(0));  // -0 + 0 is +0
    const B key = bits < 0 ? static_cast<B>(bits ^ std::numeric_limits<B>::max()) : bits;
    return value == value ? key : lowest + 1;
}

/// The value that `ordered` made an integer of.
template <class T>
inline T from_ordered(Bits<T> key) {
    return std::bit_cast<T>(key < 0 ? static_cast<Bits<T>>(key ^ std::numeric_limits<Bits<T>>::max()) : key);
}

/// Folds the lanes pairwise, halves onto halves.
template <class T, class Fold>
inline T fold_lanes(T* part, Fold fold) {
    for (index_t half = row_lanes<T> / 2; half > 0; half /= 2)
        for (index_t l = 0; l < half; ++l) part[l] = fold(part[l], part[l + half]);
    return part[0];
}

/// Calls body(index, lane) for a row of any length.
template <class T, class Body>
inline void each_lane(index_t n, Body&& body) {
    index_t i = 0;
    for (; i + row_lanes<T> <= n; i += row_lanes<T>)
        for (index_t l = 0; l < row_lanes<T>; ++l) body(i + l, l);
    for (index_t l = 0; i + l < n; ++l) body(i + l, l);
}

/// The largest of a row of any length, as a Real.
template <class Real, class T>
inline Real largest_of(const T* x, index_t n) {
    Real part[row_lanes<Real>];
    std::fill_n(part, row_lanes<Real>, -std::numeric_limits<Real>::infinity());
    each_lane<Real>(n, [&](index_t i, index_t l) { part[l] = Real(x[i]) > part[l] ? Real(x[i]) : part[l]; });
    return fold_lanes(part, [](Real a, Real b) { return b > a ? b : a; });
}

/// log sum_i exp(x_i) of a row of any length, computed in Real.
template <class Real, class T>
inline Real log_sum_exp(const T* x, index_t n) {
    const Real largest = largest_of<Real>(x, n);
    Real part[row_lanes<Real>] = {};
    each_lane<Real>(n, [&](index_t i, index_t l) { part[l] += exp_negative(Real(x[i]) - largest); });
    return largest + std::log(fold_lanes(part, [](Real a, Real b) { return a + b; }));
}

/// row = exp(row - highest), of any length; returns the sum. Padding of -infinity becomes 0.
template <class T>
inline T row_exp(T* row, index_t n, T highest) {
    T part[row_lanes<T>] = {};
    each_lane<T>(n, [&](index_t i, index_t l) { part[l] += row[i] = exp_negative(row[i] - highest); });
    return fold_lanes(part, [](T a, T b) { return a + b; });
}

/// row = softmax(row), of any length.
template <class T>
inline void softmax_row(T* row, index_t n) {
    const T inverse = T(1) / row_exp(row, n, largest_of<T>(row, n));
    for (index_t i = 0; i < n; ++i) row[i] *= inverse;
}

/// The largest of a padded row; the padding holds -infinity.
template <class T>
inline T row_max(const T* row, index_t padded_size) {
    T part[row_lanes<T>];
    for (index_t l = 0; l < row_lanes<T>; ++l) part[l] = row[l];
    for (index_t i = row_lanes<T>; i < padded_size; i += row_lanes<T>)
        for (index_t l = 0; l < row_lanes<T>; ++l) part[l] = row[i + l] > part[l] ? row[i + l] : part[l];
    return fold_lanes(part, [](T a, T b) { return b > a ? b : a; });
}

/// Sum of a[i] b[i] over a row of any length.
template <class T>
inline T row_dot(const T* a, const T* b, index_t n) {
    T part[row_lanes<T>] = {};
    index_t i = 0;
    for (; i + row_lanes<T> <= n; i += row_lanes<T>)
        for (index_t l = 0; l < row_lanes<T>; ++l) part[l] += a[i + l] * b[i + l];
    for (index_t l = 0; i + l < n; ++l) part[l] += a[i + l] * b[i + l];
    return fold_lanes(part, [](T x, T y) { return x + y; });
}

}  // namespace steelyard::cpu
