// Grouped feed-forward networks on the CPU.
#pragma once

#include <type_traits>

#include "steelyard/cpu/ffn_backward.hpp"
#include "steelyard/cpu/ffn_forward.hpp"

namespace steelyard::cpu {

/// The ffn kernels of ops/expert_ops.hpp. Scratch: for each thread, 400 rows of width d and half a megabyte for panels;
/// and 256 rows of width h.
struct FfnKernels {
    template <class T>
    [[nodiscard]] static index_t scratch_bytes(const Cpu& device, index_t /*rows*/, index_t width, index_t hidden) {
        return bytes_of<detail::expert::FfnCallScratch<T>>(index_t{std::max(device.threads, 1)}, width, hidden);
    }

    template <class T>
    [[nodiscard]] static index_t ffn_packed_bytes(const Cpu& device, PackedFormat format, PackedFor purpose,
                                                  index_t experts, index_t width, index_t hidden, bool gated) {
        return bytes_of<PackedFfn>(header_of<T>(device, format, purpose, experts, width, hidden, gated));
    }

    template <class T>
    static void ffn_pack(const Cpu& device, PackedFormat format, PackedFor purpose, const FfnWeights<const T>& weights,
                         std::byte* packed) {
        const PackedHeader header = header_of<T>(device, format, purpose, weights.up.extents[0], weights.up.extents[2],
                                                 weights.up.extents[1], weights.gate.present());
        const auto to = place<PackedFfn>(packed, header);
        to.header[0] = header;
        with_format<T>(device, format, [&](auto kernels, auto tag) {
            detail::expert::FfnForwardPass<decltype(kernels), T, decltype(tag)>::pack(device, weights, to);
        });
    }

    template <class T>
    [[nodiscard]] static Status ffn_check_packed(const Cpu& device, std::string_view stage, std::string_view name,
                                                 view<const std::byte, 1> packed, index_t experts, index_t width,
                                                 index_t hidden, bool gated) {
        return check_packed(
            stage, name, packed,
            header_of<T>(device, PackedFormat::full, PackedFor::inference, experts, width, hidden, gated));
    }

    [[nodiscard]] static bool ffn_packed_serves(view<const std::byte, 1> packed, PackedFor purpose) {
        return purpose == PackedFor::inference || packed_ffn(packed).header[0].backward != 0;
    }

    template <class T>
    static void ffn_forward(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights,
                            view<const T, 2> x,      // [T, d]
                            const Plan<>& plan,      //
                            const FfnKept<T>& kept,  // [N, h] (=)
                            view<T, 2> rows,         // [N, d] (=), or absent
                            std::byte* scratch) {
        const auto packed = packed_ffn(weights.packed).header;
        with_format<T>(device, packed.present() ? packed[0].as_format() : PackedFormat::full,
                       [&](auto kernels, auto tag) {
                           using Pass = detail::expert::FfnForwardPass<decltype(kernels), T, decltype(tag)>;
                           Pass(device, function, weights, plan, scratch).run(x, kept, rows);
                       });
    }

    template <class T>
    static void ffn_backward(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights,
                             view<const T, 2> x,               // [T, d]
                             const Plan<>& plan,               //
                             const FfnKept<const T>& kept,     // [N, h]
                             view<const T, 2> weight,          // [T, K], or absent: 1
                             view<const T, 2> dy,              // [T, d]
                             const FfnGradRows<T>& grad_rows,  // [N, h] (=)
                             view<T, 2> drows,                 // [N, d] (=)
                             view<T, 2> dweight,               // [T, K] (+=), or absent
                             const FfnWeights<T>& grads,       // (+=, or = by `write`), absent ones are skipped
                             std::byte* scratch) {
        with_kernels(device.isa, [&](auto kernels) {
            using Pass = detail::expert::FfnBackwardPass<decltype(kernels), T>;
            Pass(device, function, weights, plan, scratch).run(x, kept, weight, dy, grad_rows, drows, dweight, grads);
        });
    }

private:
    /// Calls body(Kernels, F) for the weights' format F.
    template <class T, class Body>
    static void with_format(const Cpu& device, PackedFormat format, Body&& body) {
        if constexpr (std::is_same_v<T, float>) {
            if (format == PackedFormat::bf16)
                return with_kernels<bf16>(device.isa, [&](auto kernels) { body(kernels, bf16{}); });
            if (format == PackedFormat::int8)
                return with_kernels<std::int8_t>(device.isa, [&](auto kernels) { body(kernels, std::int8_t{}); });
        }
        with_kernels(device.isa, [&](auto kernels) { body(kernels, T{}); });
    }

    template <class T>
    [[nodiscard]] static PackedHeader header_of(const Cpu& device, PackedFormat format, PackedFor purpose,
                                                index_t experts, index_t width, index_t hidden, bool gated) {
        const index_t panel =
            with_kernels(device.isa, [](auto kernels) { return decltype(kernels)::template panel_columns<T>; });
        return {PackedHeader::expected_magic,
                static_cast<std::int64_t>(format),
                sizeof(T),
                panel,
                experts,
                width,
                hidden,
                gated ? 1 : 0,
                purpose == PackedFor::training ? 1 : 0};
    }
};

}  // namespace steelyard::cpu
