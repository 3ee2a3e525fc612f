// How a product reads its operands. A *word* is what one multiply-add takes from either side: an element, or as many as
// fit 32 bits.

/// grouped: sums are integers within a group of steps.
template <class T>
struct Format {
    using word = T;
    using sum = T;
    using words = typename Simd<T>::vec;
    static constexpr int per_word = 1;
    static constexpr bool grouped = false;
    [[gnu::always_inline]] static words madd(words sum, T a, words b) {
#if defined(__x86_64__)
        // One instruction that adds in place: left the choice, g++ takes those that overwrite a factor, and moves.
        if constexpr (kernel_isa >= Isa::avx2) {
            const words left = a - words{};  // a in each lane, -0 too
            if constexpr (sizeof(T) == 4)
                asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(left));
            else
                asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(left));
            return sum;
        }
#endif
        return sum + a * b;
    }
};

/// Two elements a word, the lower one first.
template <>
struct Format<bf16> {
    using word = std::uint32_t;
    using sum = float;
    using vec = Simd<float>::vec;
    using words = Simd<float>::bits;
    static constexpr int per_word = 2;
    static constexpr bool grouped = false;

    [[gnu::always_inline]] static vec madd(vec sum, word a, words b) {
#if defined(__x86_64__)
        if constexpr (kernel_isa >= Isa::avx512_dot) {
            const words left = words{} + a;
            asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(left));
            return sum;
        }
#endif
        const words low = b << 16, high = b & 0xffff0000u;
        vec right[2];
        std::memcpy(&right[0], &low, sizeof low);
        std::memcpy(&right[1], &high, sizeof high);
        sum += std::bit_cast<float>(a << 16) * right[0];
        return sum + std::bit_cast<float>(a & 0xffff0000u) * right[1];
    }
};

/// Four elements a word. Weights are stored 128 above their value, without sign: the dot products of x86 take one side
/// so. `beginning` takes that off again.
template <>
struct Format<std::int8_t> {
    using word = std::uint32_t;
    using sum = float;
    using words = Simd<float>::bits;
    static constexpr int per_word = 4;
    static constexpr bool grouped = true;
    static constexpr index_t group_steps = int8_group / per_word;

    /// sum += the dot products of `a`, signed, with each lane of `b`, unsigned.
    [[gnu::always_inline]] static words madd(words sum, word a, words b) {
#if defined(__x86_64__)
        if constexpr (kernel_isa >= Isa::avx512_dot) {
            const words left = words{} + a;
            asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(left));
            return sum;
        }
        if constexpr (vector_bytes > 16) {  // two dot products of 16-bit numbers
            const auto wide = [](word pair) {
                return (static_cast<word>(static_cast<std::int8_t>(pair >> 16)) << 16) |
                       (static_cast<word>(static_cast<std::int8_t>(pair)) & 0xffffu);
            };
            const words even = b & 0x00ff00ffu, odd = (b >> 8) & 0x00ff00ffu;
            words first, second;
            asm("vpmaddwd %2, %1, %0" : "=v"(first) : "v"(even), "v"(words{} + wide(a)));
            asm("vpmaddwd %2, %1, %0" : "=v"(second) : "v"(odd), "v"(words{} + wide(a >> 8)));
            return sum + first + second;
        }
#endif
        for (int i = 0; i < per_word; ++i)
            sum += (b >> (8 * i) & 0xffu) * static_cast<word>(static_cast<std::int8_t>(a >> (8 * i)));
        return sum;
    }
};

/// The words that `n` elements take.
template <class T>
[[nodiscard]] constexpr index_t words_of(index_t n) {
    return (n + Format<T>::per_word - 1) / Format<T>::per_word;
}

namespace part {

/// Rounded to bf16, to the nearest, ties to even. A NaN stays one.
[[gnu::always_inline]] inline Simd<float>::halves bf16_halves(Simd<float>::vec v) {
    using bits = Simd<float>::bits;
#if defined(__x86_64__)
    if constexpr (kernel_isa >= Isa::avx512_dot) {
        Simd<float>::halves rounded;
        asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
        return rounded;
    }
#endif
    bits word;
    std::memcpy(&word, &v, sizeof word);
    const bits nan = (word & 0x7fffffffu) > 0x7f800000u ? bits{} + 1u : bits{};
    const bits rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    return __builtin_convertvector(nan != 0u ? (word >> 16) | 0x40u : rounded, Simd<float>::halves);
}

}  // namespace part
