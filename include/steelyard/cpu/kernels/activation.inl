// Activations and their derivatives, a vector at a time. Always inline: what a caller doesn't use is not computed, and
// no vector goes through memory.
//
// Every element goes through the same vector code, whatever its place in a row (the last lanes are padded), so a
// result depends on its input alone. The C library's exp and erfc are not vectorised and would take longer than the
// products.

/// As far from 0 as exp_within goes: beyond, exp(x) or exp(-x) is no normal number.
template <class T>
inline constexpr T exp_range = sizeof(T) == 4 ? T(87) : T(708);

/// exp(x) for |x| <= exp_range, to about one unit in the last place; of others, any number.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by a polynomial, to whose exponent n is added.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec exp_within(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    using bits = typename Simd<T>::bits;
    constexpr bool single = sizeof(T) == 4;
    constexpr unsigned mantissa = single ? 23 : 52;
    constexpr T round = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa
    // ln 2 in two parts; the first has few enough bits that its product with n is exact.
    constexpr T ln2_high = single ? T(0.693359375) : T(0x1.62e4p-1);
    constexpr T ln2_low = T(0.69314718055994530941723212145818L - static_cast<long double>(ln2_high));
    static constexpr auto series = cpu::detail::exp_series<T>();

    const vec shifted = x * T(1.44269504088896340736) + round;
    const vec n = shifted - round;
    vec result = polynomial<T>((x - n * ln2_high) - n * ln2_low, series);
    bits scaled, exponent;  // the low bits of `shifted` hold n
    std::memcpy(&scaled, &result, sizeof result);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    scaled += exponent << mantissa;
    std::memcpy(&result, &scaled, sizeof result);
    return result;
}

/// exp(x) for x <= 0; 0 where that would not be a normal number. The twin of exp_negative (lanes.hpp).
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec exp_nonpositive(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    return x < vec{} - exp_range<T> ? vec{} : exp_within<T>(x);
}

/// 1 / (1 + exp(-x)), without overflow on either side.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec logistic(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    vec most = vec{} + exp_range<T>;
    in_register(most);  // of a constant g++ makes a comparison and a choice, not a minimum
    const vec s = T(1) / (T(1) + exp_within<T>(-(x < most ? x : most)));
    return x < -most ? vec{} : s;
}

/// The normal distribution's Phi(x) and its density: of double to the C library's erfc, of float to 4 units in the last
/// place where Phi is above 1e-6, and to 1e-6 of itself (x^2's rounding) below; 0 where they would not be normal
/// numbers.
template <class T>
struct Normal {
    typename Simd<T>::vec cdf, density;
};
template <class T>
[[gnu::always_inline]] inline Normal<T> normal(typename Simd<T>::vec x) {
    using vec = typename Simd<T>::vec;
    const vec bell = exp_nonpositive<T>(x * x * T(-0.5)), density = bell * T(0.39894228040143267794);
    if constexpr (sizeof(T) == 4) {
        // Phi(-x) exp(x^2 / 2) = t P(t) with t = 1 / (1 + 0.3 x), x >= 0: to 3.4e-9 (minimax).
        static constexpr std::array<T, 10> series{
            T(0.11968647688627243), T(0.11957570165395737),  T(0.11020475625991821), T(0.07852569222450256),
            T(0.09578170627355576), T(-0.07875528186559677), T(0.19101394712924957), T(-0.22765769064426422),
            T(0.11220749467611313), T(-0.02058282680809498)};
        const vec t = T(1) / (T(1) + T(0.3) * (x < vec{} ? -x : x));
        const vec tail = bell * t * polynomial<T>(t, series);
        return {x > vec{} ? T(1) - tail : tail, density};
    } else {
        for (int lane = 0; lane < Simd<T>::lanes; ++lane)
            x[lane] = T(0.5) * std::erfc(x[lane] * T(-0.70710678118654752440));
        return {x, density};
    }
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
        const auto [cdf, density] = normal<T>(x);
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
