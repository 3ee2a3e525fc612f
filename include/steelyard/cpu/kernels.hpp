// The kernels of the CPU device, compiled once for each instruction set, and the choice between them at run time.
//
// The files kernels/*.inl are the one source of all of them. They are read once for each instruction set, in a
// namespace of its own, with the compiler told to use it; only there is code whose speed depends on the width of a
// register. So translation units with different -march don't share the name of a kernel, and a program compiled for any
// x86-64 runs at the speed of the machine that it is on. An instruction set that the compiler was told of anyway, or
// one below, is not compiled again. STEELYARD_CPU_COMPILED_ONLY leaves all others out: for a program that is built
// where it runs, and compiles faster.
//
// Kernels are static functions of `Kernels`, and know no thread: with_kernels(isa, [&](auto kernels) { ... }).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "steelyard/core/bf16.hpp"
#include "steelyard/core/random.hpp"
#include "steelyard/core/view.hpp"
#include "steelyard/cpu/caches.hpp"
#include "steelyard/cpu/isa.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/cpu/router_call.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard::cpu {

/// Inputs that share a scale with each output column, in weights of 8 bits.
inline constexpr index_t int8_group = 256;

/// The kernels for what the compiler was told of. A namespace for each set of them, so that two units never mean two
/// things.
#if defined(__AVX512F__)
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
inline namespace compiled_avx512_bf16 {
#elif defined(__AVX512VNNI__)
inline namespace compiled_avx512_vnni {
#else
inline namespace compiled_avx512 {
#endif
inline constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__) && defined(__FMA__)
inline namespace compiled_avx2 {
inline constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__AVX__)
inline namespace compiled_avx {
inline constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__aarch64__)
inline namespace compiled_neon {
inline constexpr int vector_bytes = 16, vector_registers = 32;
#else
inline namespace compiled_plain {
inline constexpr int vector_bytes = 16, vector_registers = 16;
#endif
inline constexpr Isa kernel_isa = compiled_isa;
#include "steelyard/cpu/kernels/all.inl"
}

#if defined(__x86_64__) && !defined(STEELYARD_CPU_COMPILED_ONLY)
#define STEELYARD_CPU_DISPATCHES 1
#endif

}  // namespace steelyard::cpu

#if defined(STEELYARD_CPU_DISPATCHES)
#include "steelyard/cpu/kernels/x86.inl"
#endif

namespace steelyard::cpu {

/// Elements of the room that panels are packed into, for the widest registers.
template <class T>
inline constexpr index_t widest_pack_room = pack_room<T> / vector_bytes * 64;

/// Calls body(Kernels) with the kernels of an instruction set, or of the best one that the machine has, for products of
/// the format F: the elements that a layer computes with, bf16 or int8. Dot products of fewer bits are no use to the
/// first: one instruction set fewer to compile for.
template <class F = float, class Body>
decltype(auto) with_kernels([[maybe_unused]] Isa isa, Body&& body) {
#if defined(STEELYARD_CPU_DISPATCHES)
    const Isa resolved = resolve_isa(isa);
    // Kernels of int8 take no instruction of BF16.
    if constexpr (std::is_same_v<F, bf16> || std::is_same_v<F, std::int8_t>)
        if (resolved >= (std::is_same_v<F, bf16> ? Isa::avx512_bf16 : Isa::avx512_vnni))
            return body(avx512_bf16::Kernels{});
    if (resolved >= Isa::avx512) return body(avx512::Kernels{});
    if (resolved == Isa::avx2) return body(avx2::Kernels{});
#endif
    return body(Kernels{});
}

}  // namespace steelyard::cpu
