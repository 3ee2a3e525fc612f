// Rows of floats in the format of a product.

namespace part {

/// Writes a vector of small elements, or the first `count` of them.
template <class Vector, class Element>
[[gnu::always_inline]] inline void store_narrow(Element* to, const Vector& v, index_t count) {
    constexpr index_t lanes = sizeof(Vector) / sizeof(Element);
    if (count >= lanes)
        std::memcpy(to, &v, sizeof v);
    else
        std::memcpy(to, &v, static_cast<std::size_t>(count) * sizeof(Element));
}

/// words[0 .. words_of(n)) = from[0 .. n), rounded to bf16; an element beyond the last one is 0.
inline void write_row(const float* from, index_t n, const Operand<bf16>& to, index_t row) {
    auto* const words = reinterpret_cast<std::uint16_t*>(to.words + row * to.stride);
    constexpr index_t lanes = Simd<float>::lanes;
    for (index_t j = 0; j < n; j += lanes) store_narrow(words + j, bf16_halves(load_some(from + j, n - j)), n - j);
    if (n % 2 != 0) words[n] = 0;
}

/// The same rounded to whole multiples of a scale for each group, the largest magnitude / 127. A group with a NaN or an
/// infinity has the scale NaN, and so have all results that it is part of.
inline void write_row(const float* from, index_t n, const Operand<std::int8_t>& to, index_t row) {
    using S = Simd<float>;
    constexpr index_t lanes = S::lanes;
    auto* const bytes = reinterpret_cast<std::int8_t*>(to.words + row * to.stride);
    for (index_t j0 = 0, g = 0; j0 < n; j0 += int8_group, ++g) {
        const index_t j1 = std::min(n, j0 + int8_group);
        S::bits most = {};  // magnitudes of floats are ordered like their bits, infinity and NaN above all numbers
        for (index_t j = j0; j < j1; j += lanes) {
            const S::vec v = load_some(from + j, j1 - j);
            S::bits size;
            std::memcpy(&size, &v, sizeof size);
            size &= 0x7fffffffu;
            most = size > most ? size : most;
        }
        std::uint32_t largest_bits = 0;
        for (index_t lane = 0; lane < lanes; ++lane) largest_bits = std::max(largest_bits, most[lane]);
        const bool finite = largest_bits < 0x7f800000u;
        const float largest = std::bit_cast<float>(largest_bits);
        const float inverse = finite && largest > 0 ? 127.0f / largest : 0.0f;
        S::ints total = {};
        for (index_t j = j0; j < j1; j += lanes) {
            const S::vec v = finite ? load_some(from + j, j1 - j) * inverse : S::vec{};
            // The nearest integer: adding and taking away 1.5 * 2^23 leaves no fraction.
            const S::ints q = __builtin_convertvector((v + 12582912.0f) - 12582912.0f, S::ints);
            total += q;
            store_narrow(bytes + j, __builtin_convertvector(q, S::bytes), j1 - j);
        }
        std::int32_t sum = 0;
        for (index_t lane = 0; lane < lanes; ++lane) sum += total[lane];
        to.scale[row * to.groups + g] = finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
        to.beginning[row * to.groups + g] = -128 * sum;
    }
    for (index_t j = n; j % 4 != 0; ++j) bytes[j] = 0;
}

}  // namespace part

/// to[0 .. rows) = from
template <class T>
void write_operand(const float* from, index_t stride, index_t rows, index_t n, const Operand<T>& to) {
    for (index_t r = 0; r < rows; ++r) part::write_row(from + r * stride, n, to, r);
}

/// An operand of `rows` rows of at most `n` elements from `memory` on, which is aligned to 64. It takes no more bytes
/// than as many rows of n floats, n rounded up to 64, and 16 floats more.
template <class T>
[[nodiscard]] Operand<T> place_operand(std::byte* memory, index_t rows, index_t n) {
    Operand<T> operand;
    operand.words = reinterpret_cast<typename Format<T>::word*>(memory);
    operand.stride = (words_of<T>(n) + 15) / 16 * 16 + 16;  // rows at a power of two would share few sets of the cache
    if constexpr (Format<T>::grouped) {
        operand.groups = (n + int8_group - 1) / int8_group;
        operand.scale = reinterpret_cast<float*>(operand.words + rows * operand.stride);
        operand.beginning = reinterpret_cast<std::int32_t*>(operand.scale + rows * operand.groups);
    }
    return operand;
}
