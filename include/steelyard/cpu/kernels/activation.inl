// Activations and their derivatives, a vector at a time. Always inline: what a caller doesn't use is not computed, and no
// vector goes through memory.
//
// Every element goes through the same vector code, whatever its place in a row (the last lanes are padded), so a
// result depends on its input alone. The C library's exp is not vectorised and would take longer than the products.

/// exp(x) for x <= 0, to about one unit in the last place; 0 where that would not be a normal number.
/// The twin of exp_negative (lanes.hpp) for explicit vectors.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor series, whose first left out term is below the
/// rounding (r^8/8! < 6e-9, r^14/14! < 5e-18); 2^n through the exponent's bits.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec exp_nonpositive(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    using bits = typename Simd<T>::bits;
    constexpr bool single = sizeof(T) == 4;
    constexpr int degree = single ? 7 : 13;
    constexpr unsigned mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
    constexpr T round = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa
    // ln 2 in two parts; the first has few enough bits that its product with n is exact.
    constexpr T ln2_high = single ? T(0.693359375) : T(0x1.62e4p-1);
    constexpr T ln2_low = T(0.69314718055994530941723212145818L - static_cast<long double>(ln2_high));
    constexpr T lowest = single ? T(-87) : T(-708);
    static constexpr auto inverse_factorials = cpu::detail::inverse_factorials<T, degree + 1>();

    const vec shifted = x * T(1.44269504088896340736) + round;
    const vec n = shifted - round;
    const vec r = (x - n * ln2_high) - n * ln2_low;
    vec series = vec{} + inverse_factorials[degree];
    for (std::size_t i = degree; i-- > 0;) series = series * r + inverse_factorials[i];
    bits exponent;  // the low bits of `shifted` hold n
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent << mantissa) + ((bits{} + bias) << mantissa);
    vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < vec{} + lowest ? vec{} : series * power;  // a NaN stays
}

/// 1 / (1 + exp(-x)), without overflow on either side.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec logistic(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    const vec one = vec{} + T(1);
    const vec small = exp_nonpositive<T>(x < vec{} ? x : -x);
    return (x < vec{} ? small : one) / (one + small);
}

/// The normal distribution's Phi(x) = erfc(-x / sqrt 2) / 2, exact to the C library's erfc.
template <class T>
inline typename Simd<T>::vec normal_cdf(typename Simd<T>::vec x) {
    for (int lane = 0; lane < Simd<T>::lanes; ++lane)
        x[lane] = T(0.5) * std::erfc(x[lane] * T(-0.70710678118654752440));
    return x;
}

/// f(x) and f'(x) of an activation. relu'(0) = 0. A NaN gives a NaN.
template <class T>
struct ValueAndSlope {
    typename Simd<T>::vec value, slope;
};

/// x sigmoid(alpha x) and its derivative.
template <class T>
[[gnu::always_inline]] inline ValueAndSlope<T> swish(typename Simd<T>::vec x, T alpha) {
    const auto one = typename Simd<T>::vec{} + T(1);
    const auto s = logistic<T>(x * alpha);
    return {x * s, s * (one + x * alpha * (one - s))};
}

template <Activation A, class T>
[[gnu::always_inline]] inline ValueAndSlope<T> activate(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    const vec zero = {}, one = zero + T(1);
    if constexpr (A == Activation::identity) {
        return {x, one};
    } else if constexpr (A == Activation::relu) {
        return {x < zero ? zero : x, x > zero ? one : zero};
    } else if constexpr (A == Activation::relu2) {
        const vec positive = x < zero ? zero : x;
        return {positive * positive, T(2) * positive};
    } else if constexpr (A == Activation::silu) {
        const vec s = logistic<T>(x);
        return {x * s, s * (one + x * (one - s))};
    } else if constexpr (A == Activation::gelu_tanh) {
        // (1 + tanh(z / 2)) / 2 = sigmoid(z). Beyond 30 the sigmoid is 0 or 1 exactly, and the cube could overflow.
        const vec far = zero + T(30), near = x > far ? far : (x < -far ? -far : x), square = near * near;
        constexpr T scale = T(2 * 0.79788456080286535588L), cubic = T(0.044715);
        const vec s = logistic<T>(near * (one + cubic * square) * scale);
        return {x * s, s + near * s * (one - s) * (one + T(3) * cubic * square) * scale};
    } else {
        static_assert(A == Activation::gelu);
        const vec cdf = normal_cdf<T>(x);
        const vec density = exp_nonpositive<T>(x * x * T(-0.5)) * T(0.39894228040143267794);
        return {x * cdf, cdf + x * density};
    }
}

/// Calls `body.template operator()<A>()` with the activation as a compile-time constant.
template <class Body>
inline void with_activation(Activation activation, Body&& body) {
    switch (activation) {
        case Activation::identity:
            return body.template operator()<Activation::identity>();
        case Activation::relu:
            return body.template operator()<Activation::relu>();
        case Activation::relu2:
            return body.template operator()<Activation::relu2>();
        case Activation::gelu:
            return body.template operator()<Activation::gelu>();
        case Activation::silu:
            return body.template operator()<Activation::silu>();
        case Activation::gelu_tanh:
            return body.template operator()<Activation::gelu_tanh>();
    }
}
