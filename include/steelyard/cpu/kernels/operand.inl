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

/// Elements j to j + lanes of a row, or the first `count` of them, rounded to bf16; those of v after them are 0.
[[gnu::always_inline]] inline void write_vector(Simd<float>::vec v, index_t j, index_t count, const Operand<bf16>& to,
                                                index_t row) {
    auto* const words = to.words + row * to.stride;
    count = (count + 1) / 2 * 2;  // whole words
    if constexpr (Format<bf16>::dots) {
        Simd<float>::halves rounded = {};
#if defined(__x86_64__)
        asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
#endif
        store_narrow(reinterpret_cast<std::uint16_t*>(words) + j, rounded, count);
    } else {
        store_narrow(reinterpret_cast<std::uint32_t*>(words) + j, bf16_rounded(v), count);
    }
}

/// words[0 .. words_of(n)) = from[0 .. n), rounded to bf16; an element beyond the last one is 0.
inline void write_row(const float* from, index_t n, const Operand<bf16>& to, index_t row) {
    for (index_t j = 0; j < n; j += Simd<float>::lanes) write_vector(load_some(from + j, n - j), j, n - j, to, row);
}

/// Integers of 8 bits into words of four, the last one filled up with zeros that `q` has behind its `count` elements.
inline void store_int8(const Simd<float>::ints& q, index_t j, index_t count, Format<std::int8_t>::left* words) {
    count = (count + 3) / 4 * 4;
    if constexpr (Format<std::int8_t>::pairs) {
        using shorts = Simd<float>::shorts;
        const auto narrow = __builtin_convertvector(q, shorts);
        constexpr int lanes = Simd<float>::lanes;
        const auto paired = [&]<std::size_t... I>(std::index_sequence<I...>) {
            return __builtin_shufflevector(narrow, narrow, (I / 4 * 4 + I % 2 * 2 + I / 2 % 2)...);
        }
        (std::make_index_sequence<lanes>{});
        store_narrow(reinterpret_cast<std::int16_t*>(words) + j, paired, count);
    } else {
        store_narrow(reinterpret_cast<std::int8_t*>(words) + j, __builtin_convertvector(q, Simd<float>::bytes), count);
    }
}

/// The same rounded to whole multiples of a scale for each group, the largest magnitude / 127. A group with a NaN or an
/// infinity has the scale NaN, and so have all results that it is part of.
inline void write_row(const float* from, index_t n, const Operand<std::int8_t>& to, index_t row) {
    using S = Simd<float>;
    constexpr index_t lanes = S::lanes;
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
            store_int8(q, j, j1 - j, to.words + row * to.stride);
        }
        std::int32_t sum = 0;
        for (index_t lane = 0; lane < lanes; ++lane) sum += total[lane];
        to.scale[row * to.groups + g] = finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
        to.beginning[row * to.groups + g] = -128 * sum;
    }
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
    using left = typename Format<T>::left;
    operand.words = reinterpret_cast<left*>(memory);
    // Rows at a power of two would share few sets of the cache.
    operand.stride = (words_of<T>(n) + 15) / 16 * 16 + 64 / index_t{sizeof(left)};
    if constexpr (Format<T>::grouped) {
        operand.groups = (n + int8_group - 1) / int8_group;
        operand.scale = reinterpret_cast<float*>(operand.words + rows * operand.stride);
        operand.beginning = reinterpret_cast<std::int32_t*>(operand.scale + rows * operand.groups);
    }
    return operand;
}
