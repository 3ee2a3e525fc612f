// Instruction sets of the CPU device: which ones there are, and which one this machine takes.
#pragma once

#include <cstddef>
#include <iterator>
#include <string_view>

namespace steelyard {

/// An instruction set that kernels are compiled for. Each includes those before it on its architecture.
///
///     automatic   the best that the machine has
///     compiled    what the compiler was told of (-march=...): NEON on AArch64, SSE2 on x86-64 by default
///     avx2        AVX2 and FMA: x86-64-v3, Haswell and Zen and later
///     avx512      AVX-512 F, BW, DQ, VL: x86-64-v4, Skylake-X and Zen 4 and later
///     avx512_vnni and its dot products of int8 (VNNI): Cascade Lake and Ice Lake and later
///     avx512_bf16 and those of bf16 (BF16): Sapphire Rapids and Zen 4 and later
///
/// An instruction set that the compiler was told of anyway is `compiled`; asking for one below it gives `compiled` too.
/// Bits of results differ from one to another, as between compilers.
enum class Isa { automatic, compiled, avx2, avx512, avx512_vnni, avx512_bf16 };

inline constexpr std::string_view isa_names[] = {"automatic", "compiled",    "avx2",
                                                 "avx512",    "avx512_vnni", "avx512_bf16"};

/// Whether it is one of those above, and not another integer.
[[nodiscard]] constexpr bool is_known(Isa isa) {
    return isa >= Isa{} && static_cast<std::size_t>(isa) < std::size(isa_names);
}

[[nodiscard]] constexpr std::string_view name_of(Isa isa) {
    return is_known(isa) ? isa_names[static_cast<std::size_t>(isa)] : "an unknown one";
}

/// What the compiler was told of.
inline constexpr Isa compiled_isa =
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && \
    defined(__AVX512DQ__)
    Isa::avx512_bf16;
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
    Isa::avx512_vnni;
#elif defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
    Isa::avx512;
#elif defined(__AVX2__) && defined(__FMA__)
    Isa::avx2;
#else
    Isa::compiled;
#endif

/// Whether this machine can run it.
[[nodiscard]] inline bool has_isa(Isa isa) {
    if (!is_known(isa)) return false;
    if (isa <= Isa::compiled || isa <= compiled_isa) return true;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    return isa == Isa::avx2 ? avx2 : isa == Isa::avx512 ? avx512 : isa == Isa::avx512_vnni ? vnni : bf16;
#else
    return false;
#endif
}

/// The instruction set that kernels run on when `isa` is asked for.
[[nodiscard]] inline Isa resolve_isa(Isa isa) {
    static const Isa best = [] {
        for (const Isa one : {Isa::avx512_bf16, Isa::avx512_vnni, Isa::avx512, Isa::avx2})
            if (has_isa(one)) return one;
        return Isa::compiled;
    }();
    if (isa == Isa::automatic) isa = best;
    return isa <= compiled_isa ? Isa::compiled : isa;
}

}  // namespace steelyard
