// The arithmetic of scores, shared by kernels and the host, which tests it: that of the CPU's kernels, one operation
// after the other, so that routers on both devices decide alike.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "steelyard/core/view.hpp"

namespace steelyard::cuda {

/// a b + c, rounded once. Products that a compiler would fuse with a sum are fused by name here: the CPU's kernels are,
/// where the instruction set can (cpu/kernels/score.inl).
template <class T = float>
constexpr T multiply_add(T a, T b, T c) {
    return std::fma(a, b, c);
}

/// exp(x) for x <= 0, within 2 units in the last place; 0 below -87. See cpu/kernels/score.inl.
template <class T = float>
constexpr T exp_score(T x) {
    constexpr T round = 12582912.0f;  // 1.5 * 2^23: the low bits of the sum hold n
    const T shifted = multiply_add(x, T(1.44269504088896340736), round);
    const T n = shifted - round;
    const T r = multiply_add(-n, T(0.693147180559945309417232), x);
    T series = multiply_add(r, T(0.0013814569683745503), T(0.008368730545043945));
    series = multiply_add(series, r, T(0.04166838899254799));
    series = multiply_add(series, r, T(0.1666652113199234));
    series = multiply_add(series, r, T(0.4999999403953552));
    series = multiply_add(series, r, T(1));
    series = multiply_add(series, r, T(1));
    const std::uint32_t scaled = std::bit_cast<std::uint32_t>(series) + (std::bit_cast<std::uint32_t>(shifted) << 23);
    return x < T(-87) ? T(0) : std::bit_cast<T>(scaled);
}

/// base + sign log(1 + u) for u in [0, 1] and a sign of 1 or -1: 2 artanh(u / (2 + u)) by its series.
template <class T = float>
constexpr T add_log1p(T base, T sign, T u) {
    const T s = u / (u + T(2)), square = s * s;
    T series = T(1.0 / 15);
    series = multiply_add(series, square, T(1.0 / 13));
    series = multiply_add(series, square, T(1.0 / 11));
    series = multiply_add(series, square, T(1.0 / 9));
    series = multiply_add(series, square, T(1.0 / 7));
    series = multiply_add(series, square, T(1.0 / 5));
    series = multiply_add(series, square, T(1.0 / 3));
    series = multiply_add(series, square, T(1));
    return multiply_add(sign * T(2) * s, series, base);
}

template <class T = float>
constexpr T log_sigmoid_score(T z) {
    return add_log1p(z < T(0) ? z : T(0), T(-1), exp_score(z < T(0) ? z : -z));
}

/// sigmoid(z) exp(-shift), for shift = min(0, the largest z of the token): no sum of these underflows.
template <class T = float>
constexpr T shifted_sigmoid(T z, T shift) {
    const T small = exp_score(z < T(0) ? z : -z);
    return exp_score((z < T(0) ? z : T(0)) - shift) / (small + T(1));
}
template <class T = float>
constexpr T sigmoid_score(T z) {
    return shifted_sigmoid(z, T(0));
}

/// What is compared where there is a selection bias: a numerator of the scores times what is left of their normaliser
/// (1 / sum for softmax, exp(shift) for sigmoid), plus the bias.
template <class T = float>
constexpr T biased_score(T numerator, T factor, T bias) {
    return multiply_add(numerator, factor, bias);
}

/// The order of a group by its two best: their sum where they are s + bias; otherwise they are logits, and it is
/// log(exp(a) + exp(b)) of their log-scores, which keeps the order of sums that underflow.
template <class T = float>
constexpr T rank_of_pair(T first, T second, bool biased, bool sigmoid) {
    if (biased) return first + second;
    if (sigmoid) first = log_sigmoid_score(first), second = log_sigmoid_score(second);
    return add_log1p(first, T(1), exp_score(second - first));
}

/// Ascending with the number, above 0; a NaN comes last of all that may be chosen.
constexpr std::uint32_t order_of(float value) {
    if (value != value) return 1;
    const auto bits = std::bit_cast<std::uint32_t>(value == 0.0f ? 0.0f : value);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// Sums of scores are taken in this many lanes, entry i in lane i % 16, and then halves onto halves: as a register of
/// AVX-512 does it.
inline constexpr int score_lanes = 16;

}  // namespace steelyard::cuda
