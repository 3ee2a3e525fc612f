// The widest SIMD register of the target, as a type with arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

#include "steelyard/core/view.hpp"

namespace steelyard::cpu {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
inline constexpr int vector_registers = 32;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
inline constexpr int vector_registers = 16;
#elif defined(__aarch64__)
inline constexpr int vector_bytes = 16;
inline constexpr int vector_registers = 32;
#else
inline constexpr int vector_bytes = 16;
inline constexpr int vector_registers = 16;
#endif

/// The vector types that belong to T: `vec` holds `lanes` of T, `bits` as many unsigned integers of its size.
///
/// GCC and Clang vector extensions: +, *, comparisons and `comparison ? vec : vec` work lane by lane on every target.
template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float vec __attribute__((vector_size(vector_bytes)));
    typedef std::uint32_t bits __attribute__((vector_size(vector_bytes)));
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(float));
};

template <>
struct Simd<double> {
    typedef double vec __attribute__((vector_size(vector_bytes)));
    typedef std::uint64_t bits __attribute__((vector_size(vector_bytes)));
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(double));
};

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

/// The first `count` lanes from memory, the others 0.
template <class T>
inline typename Simd<T>::vec load_first(const T* from, index_t count) {
    typename Simd<T>::vec v = {};
    std::memcpy(&v, from, static_cast<std::size_t>(count) * sizeof(T));
    return v;
}

template <class T>
inline void store_first(T* to, typename Simd<T>::vec v, index_t count) {
    std::memcpy(to, &v, static_cast<std::size_t>(count) * sizeof(T));
}

}  // namespace steelyard::cpu
