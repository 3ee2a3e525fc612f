// A row's random numbers (RouterNoise), on the CPU.
#pragma once

#include <cstdint>

#include "steelyard/cpu/device.hpp"
#include "steelyard/cpu/kernels.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard::cpu {

/// A part of one token's row of `elements`: elements [begin, end), of which `begin` is a multiple of 4.
struct RowPart {
    index_t token, elements, begin, end;
};

/// out (=) x times jitter factors; both begin with the part, and may be the same.
template <class T>
void jitter_row(const Cpu& device, const RouterNoise& noise, const RowPart& part, const T* x, T* out) {
    with_kernels(device.isa, [&](auto kernels) {
        kernels.template jitter<T>(noise.jitter_stream(), noise.block(part.token, part.elements, part.begin),
                                   noise.jitter, part.end - part.begin, x, out);
    });
}

/// out (=) what is added to logits; it begins with the part.
template <class T>
void noise_row(const Cpu& device, const RouterNoise& noise, const RowPart& part, T* out) {
    with_kernels(device.isa, [&](auto kernels) {
        kernels.template noise<T>(noise.noise_stream(), noise.block(part.token, part.elements, part.begin),
                                   noise.noise, part.end - part.begin, out);
    });
}

}  // namespace steelyard::cpu
