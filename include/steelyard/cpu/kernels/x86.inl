// The kernels again, for the x86-64 instruction sets above the one that the compiler was told of: part of
// cpu/kernels.hpp.

#if !(defined(__AVX2__) && defined(__FMA__))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
namespace steelyard::cpu::avx2 {
inline constexpr int vector_bytes = 32, vector_registers = 16;
inline constexpr Isa kernel_isa = Isa::avx2;
#include "steelyard/cpu/kernels/all.inl"
}  // namespace steelyard::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace steelyard::cpu::avx2 {
using cpu::Kernels;
}
#endif

#if !(defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__))
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace steelyard::cpu::avx512 {
inline constexpr int vector_bytes = 64, vector_registers = 32;
inline constexpr Isa kernel_isa = Isa::avx512;
#include "steelyard/cpu/kernels/all.inl"
}  // namespace steelyard::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace steelyard::cpu::avx512 {
using cpu::Kernels;
}
#endif

#if !(defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
      defined(__AVX512VL__))
#if defined(__clang__)
#pragma clang attribute push(                                                                                     \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif
namespace steelyard::cpu::avx512_bf16 {
inline constexpr int vector_bytes = 64, vector_registers = 32;
inline constexpr Isa kernel_isa = Isa::avx512_bf16;
#include "steelyard/cpu/kernels/all.inl"
}  // namespace steelyard::cpu::avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace steelyard::cpu::avx512_bf16 {
using cpu::Kernels;
}
#endif
