// How a product reads its operands. A *word* is what one multiply-add takes from either side: an element, or as many as
// fit 32 bits. The left operand's words may lie unpacked, where there is no instruction that takes them as they are: its
// rows are written once, and each meets every column.

/// left: a word of the left operand, as it lies. grouped: sums are integers within a group of steps.
template <class T>
struct Format {
    using word = T;
    using left = T;
    using sum = T;
    using words = typename Simd<T>::vec;
    static constexpr int per_word = 1;
    static constexpr bool grouped = false;
    [[gnu::always_inline]] static words madd(words sum, T a, words b) {
#if defined(__x86_64__)
        // One instruction, which adds in place: with a choice g++ takes those that overwrite a factor, and moves.
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
    struct Floats {
        float low, high;
    };
    static constexpr bool dots = kernel_isa >= Isa::avx512_bf16;
    using word = std::uint32_t;
    using left = std::conditional_t<dots, word, Floats>;
    using sum = float;
    using vec = Simd<float>::vec;
    using words = Simd<float>::bits;
    static constexpr int per_word = 2;
    static constexpr bool grouped = false;

#if defined(__x86_64__)
    [[gnu::always_inline]] static vec madd(vec sum, word a, words b) {
        const words all = words{} + a;
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(all));
        return sum;
    }
#endif
    [[gnu::always_inline]] static vec madd(vec sum, const Floats& a, words b) {
        const words low = b << 16, high = b & 0xffff0000u;
        vec right[2];
        std::memcpy(&right[0], &low, sizeof low);
        std::memcpy(&right[1], &high, sizeof high);
        return Format<float>::madd(Format<float>::madd(sum, a.low, right[0]), a.high, right[1]);
    }
};

/// Four elements a word. Weights are stored 128 above their value, without sign: the dot products of x86 take one side
/// so. `beginning` takes that off again.
template <>
struct Format<std::int8_t> {
    /// Elements 0 and 2, and 1 and 3, of 16 bits each.
    struct Pairs {
        std::uint32_t even, odd;
    };
    static constexpr bool dots = kernel_isa >= Isa::avx512_vnni, pairs = !dots && kernel_isa >= Isa::avx2;
    using word = std::uint32_t;
    using left = std::conditional_t<pairs, Pairs, word>;
    using sum = float;
    using words = Simd<float>::bits;
    static constexpr int per_word = 4;
    static constexpr bool grouped = true;
    static constexpr index_t group_steps = int8_group / per_word;

    /// sum += the dot products of `a`, signed, with each lane of `b`, unsigned.
    [[gnu::always_inline]] static words madd(words sum, word a, words b) {
#if defined(__x86_64__)
        if constexpr (dots) {
            const words all = words{} + a;
            asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(all));
            return sum;
        }
#endif
        for (int i = 0; i < per_word; ++i)
            sum += (b >> (8 * i) & 0xffu) * static_cast<word>(static_cast<std::int8_t>(a >> (8 * i)));
        return sum;
    }
#if defined(__x86_64__)
    [[gnu::always_inline]] static words madd(words sum, const Pairs& a, words b) {
        const words even = b & 0x00ff00ffu, odd = (b >> 8) & 0x00ff00ffu;
        words first, second;
        asm("vpmaddwd %2, %1, %0" : "=v"(first) : "v"(even), "v"(words{} + a.even));
        asm("vpmaddwd %2, %1, %0" : "=v"(second) : "v"(odd), "v"(words{} + a.odd));
        return sum + first + second;
    }
#endif
};

/// The words that `n` elements take.
template <class T>
[[nodiscard]] constexpr index_t words_of(index_t n) {
    return (n + Format<T>::per_word - 1) / Format<T>::per_word;
}

namespace part {

/// Rounded to bf16, to the nearest, ties to even: the upper halves, the lower ones being 0. A NaN stays one.
[[gnu::always_inline]] inline Simd<float>::bits bf16_rounded(Simd<float>::vec v) {
    using bits = Simd<float>::bits;
    bits word;
    std::memcpy(&word, &v, sizeof word);
    const bits nan = (word & 0x7fffffffu) > 0x7f800000u ? bits{} + 1u : bits{};
    return (nan != 0u ? word | 0x400000u : word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u;
}

}  // namespace part
