// The instruction sets that the tests of kernels go through.
#pragma once

#include <vector>

#include "steelyard/cpu/kernels.hpp"

namespace steelyard::testing {

/// Each one that this program has kernels of its own for and this machine can run.
inline std::vector<Isa> instruction_sets() {
    std::vector<Isa> all = {Isa::compiled};
#if defined(STEELYARD_CPU_DISPATCHES)
    for (const Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16})
        // Where there are dot products of bf16 too, those of int8 alone take the same kernels.
        if (isa > compiled_isa && has_isa(isa) && !(isa == Isa::avx512_vnni && has_isa(Isa::avx512_bf16)))
            all.push_back(isa);
#endif
    return all;
}

/// Emulated processors take long.
#if defined(STEELYARD_TEST_FEW_SIZES)
inline constexpr bool few_sizes = true;
#else
inline constexpr bool few_sizes = false;
#endif

}  // namespace steelyard::testing
