// What selection is made of: exponentials and logarithms of scores, and blocks of rows turned into columns.
namespace part {

/// exp(x) for x <= 0, within 2 units in the last place; 0 below -87.
///
/// x = n ln 2 + r, |r| <= ln(2) / 2. The product n ln 2 is rounded, or its constant is: an error that grows with x no
/// faster than that of x itself, a difference of logits.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec exp_score(typename Simd<T>::vec x) {
    static_assert(sizeof(T) == 4);
    using vec = typename Simd<T>::vec;
    using bits = typename Simd<T>::bits;
    constexpr T round = T(12582912.0);  // 1.5 * 2^23: the low bits of the sum hold n
    const vec shifted = x * T(1.44269504088896340736) + round;
    const vec n = shifted - round;
    const vec r = x - n * T(0.693147180559945309417232);
    static constexpr auto c = cpu::detail::exp_series<T>();
    vec series = vec{} + c[6];
#pragma GCC unroll 8
    for (int i = 5; i >= 0; --i) series = series * r + c[static_cast<std::size_t>(i)];
    bits scaled, exponent;
    std::memcpy(&scaled, &series, sizeof scaled);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    scaled += exponent << 23;
    std::memcpy(&series, &scaled, sizeof series);
    return x < vec{} - T(87) ? vec{} : series;
}

template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec largest(typename Simd<T>::vec a, typename Simd<T>::vec b) {
    return a > b ? a : b;
}
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec smallest(typename Simd<T>::vec a, typename Simd<T>::vec b) {
    return a < b ? a : b;
}

/// log(1 + u) for u in [0, 1]: 2 artanh(u / (2 + u)) by its series.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec log1p_score(typename Simd<T>::vec u) {
    using vec = typename Simd<T>::vec;
    const vec s = u / (u + T(2)), square = s * s;
    vec series = vec{} + T(1.0 / 15);
    series = series * square + T(1.0 / 13);
    series = series * square + T(1.0 / 11);
    series = series * square + T(1.0 / 9);
    series = series * square + T(1.0 / 7);
    series = series * square + T(1.0 / 5);
    series = series * square + T(1.0 / 3);
    series = series * square + T(1);
    return T(2) * s * series;
}

template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec log_sigmoid_score(typename Simd<T>::vec z) {
    using vec = typename Simd<T>::vec;
    return smallest<T>(z, vec{}) - log1p_score<T>(exp_score<T>(z < vec{} ? z : -z));
}

/// sigmoid(z) exp(-shift), for shift = min(0, the largest z of the token): no sum of these underflows.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec shifted_sigmoid(typename Simd<T>::vec z,
                                                                    typename Simd<T>::vec shift) {
    using vec = typename Simd<T>::vec;
    const vec small = exp_score<T>(z < vec{} ? z : -z);
    return exp_score<T>(smallest<T>(z, vec{}) - shift) / (small + T(1));
}

/// column[i] = entry first + i of every row, for i < count; other columns are 0.
template <class T, class Rows>
[[gnu::always_inline]] inline void load_columns(const Rows& rows, index_t first, index_t count,
                                                typename Simd<T>::vec (&column)[Simd<T>::lanes]) {
#pragma GCC unroll 16
    for (int l = 0; l < Simd<T>::lanes; ++l) column[l] = load_some<T>(rows[l] + first, count, typename Simd<T>::vec{});
    transpose<T>(column);
}

/// The sum of each row of partial sums.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec sum_rows(typename Simd<T>::vec (&row)[Simd<T>::lanes]) {
    constexpr int lanes = Simd<T>::lanes;
    transpose<T>(row);
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < half; ++l) row[l] += row[l + half];
    return row[0];
}

/// Whether any lane of a comparison's result is set.
template <class Mask>
[[gnu::always_inline]] inline bool any(const Mask& mask) {
    std::uint64_t words[sizeof(Mask) / 8], all = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (std::size_t i = 0; i < sizeof(Mask) / 8; ++i) all |= words[i];
    return all != 0;
}

}  // namespace part
