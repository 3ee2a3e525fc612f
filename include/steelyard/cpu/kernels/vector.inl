// The widest SIMD register of the instruction set, as a type with arithmetic.

/// The vector types that belong to T: `vec` holds `lanes` of T, `bits` as many unsigned integers of its size.
///
/// GCC and Clang vector extensions: +, *, comparisons and `comparison ? vec : vec` work lane by lane on every target.
template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float vec __attribute__((vector_size(vector_bytes)));
    typedef std::uint32_t bits __attribute__((vector_size(vector_bytes)));
    typedef std::int32_t ints __attribute__((vector_size(vector_bytes)));
    typedef std::uint16_t halves __attribute__((vector_size(vector_bytes / 2)));
    typedef std::int16_t shorts __attribute__((vector_size(vector_bytes / 2)));
    typedef std::int8_t bytes __attribute__((vector_size(vector_bytes / 4)));
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(float));
};

template <>
struct Simd<double> {
    typedef double vec __attribute__((vector_size(vector_bytes)));
    typedef std::uint64_t bits __attribute__((vector_size(vector_bytes)));
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(double));
};

/// As many elements of T as a register has of double.
template <class T>
struct AsDouble {
    typedef T vec __attribute__((vector_size(Simd<double>::lanes * sizeof(T))));
};

/// Keeps a vector in a register: the compiler may not read it from memory anew.
template <class Vector>
[[gnu::always_inline]] inline void in_register([[maybe_unused]] Vector& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

/// One register from any address: alignment changes neither the result nor the code.
template <class T>
inline typename Simd<T>::vec load(const T* from) {
    typename Simd<T>::vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
inline void store(T* to, typename Simd<T>::vec v) {
    std::memcpy(to, &v, sizeof v);
}

/// The first `count` lanes from memory, the others from `rest`. Nothing beyond them is read.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec load_some(const T* from, index_t count,
                                                              typename Simd<T>::vec rest) {
    constexpr int lanes = Simd<T>::lanes;
    if (count >= lanes) return load(from);
#if defined(__x86_64__)
    if constexpr (kernel_isa >= Isa::avx512 && sizeof(T) == 4)
        return __builtin_ia32_loadups512_mask(from, rest, static_cast<unsigned short>((1u << count) - 1u));
#endif
    alignas(vector_bytes) T part[lanes];
    store(part, rest);
    for (index_t i = 0; i < count; ++i) part[i] = from[i];
    return load(part);
}

/// The first `count` lanes from memory, the others 0.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec load_some(const T* from, index_t count) {
    return load_some<T>(from, count, typename Simd<T>::vec{});
}

/// The first `count` lanes to memory.
template <class T>
[[gnu::always_inline]] inline void store_some(T* to, typename Simd<T>::vec v, index_t count) {
    constexpr int lanes = Simd<T>::lanes;
    if (count >= lanes) return store(to, v);
#if defined(__x86_64__)
    if constexpr (kernel_isa >= Isa::avx512 && sizeof(T) == 4)
        return __builtin_ia32_storeups512_mask(to, v, static_cast<unsigned short>((1u << count) - 1u));
#endif
    alignas(vector_bytes) T part[lanes];
    store(part, v);
    for (index_t i = 0; i < count; ++i) to[i] = part[i];
}

/// c[0] + c[1] x + ...: even and odd powers are added up side by side, for they wait for each other less.
template <class T, std::size_t N>
[[gnu::always_inline]] inline typename Simd<T>::vec polynomial(typename Simd<T>::vec x, const std::array<T, N>& c) {
    constexpr int last = static_cast<int>(N) - 1;
    using vec = typename Simd<T>::vec;
    const vec square = x * x;
    vec sum[2];  // of even powers, of odd ones
    sum[last % 2] = vec{} + c[last];
    sum[1 - last % 2] = vec{} + c[last - 1];
#pragma GCC unroll 16
    for (int i = last - 2; i >= 0; --i) sum[i % 2] = sum[i % 2] * square + c[static_cast<std::size_t>(i)];
    return sum[1] * x + sum[0];
}

/// (a modulo 2^32) b. Spelled out, for there is one instruction for it, and g++ takes those of whole products.
[[gnu::always_inline]] inline Simd<double>::bits multiply_low(Simd<double>::bits a, std::uint32_t b) {
    const Simd<double>::bits factor = Simd<double>::bits{} + b;
#if defined(__x86_64__)
    if constexpr (kernel_isa >= Isa::avx2) {
        asm("vpmuludq %1, %0, %0" : "+v"(a) : "v"(factor));
        return a;
    }
    if constexpr (vector_bytes == 16) {
        asm("pmuludq %1, %0" : "+x"(a) : "x"(factor));
        return a;
    }
#endif
    return (a & 0xFFFFFFFFu) * factor;
}

/// The square root, lane by lane. Spelled out likewise: g++ looks for negative numbers, one lane after the other.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::vec square_root(typename Simd<T>::vec x) {
#if defined(__x86_64__)
    if constexpr (kernel_isa >= Isa::avx2) {
        if constexpr (sizeof(T) == 4)
            asm("vsqrtps %0, %0" : "+v"(x));
        else
            asm("vsqrtpd %0, %0" : "+v"(x));
        return x;
    }
#endif
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
}

/// The lanes' sum, in their order.
template <class T>
inline T sum_lanes(typename Simd<T>::vec v) {
    T sum = 0;
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) sum += v[lane];
    return sum;
}

/// Calls body(first column, number of columns <= lanes) along a row.
template <class T, class Body>
inline void for_lanes(index_t n, Body&& body) {
    constexpr index_t lanes = Simd<T>::lanes;
    index_t j = 0;
    for (; j + lanes <= n; j += lanes) body(j, std::integral_constant<index_t, lanes>{});
    if (j < n) body(j, n - j);
}

namespace part {

/// {a0, b0, a1, b1, ...}: the lower halves' lanes in turn, or the upper halves' with First = lanes / 2.
template <class T, std::size_t First, std::size_t... I>
inline typename Simd<T>::vec interleave(typename Simd<T>::vec a, typename Simd<T>::vec b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (I % 2 == 0 ? First + I / 2 : sizeof...(I) + First + I / 2)...);
}

}  // namespace part

/// Transposes a block of lanes x lanes elements: after log2(lanes) perfect shuffles of its rows, row and column have
/// changed places.
template <class T>
inline void transpose(typename Simd<T>::vec (&row)[Simd<T>::lanes]) {
    constexpr int lanes = Simd<T>::lanes, half = lanes / 2;
    constexpr auto all = std::make_index_sequence<lanes>{};
#pragma GCC unroll 4
    for (int round = 1; round < lanes; round *= 2) {
        typename Simd<T>::vec next[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            next[2 * i] = part::interleave<T, 0>(row[i], row[i + half], all);
            next[2 * i + 1] = part::interleave<T, half>(row[i], row[i + half], all);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) row[i] = next[i];
    }
}
