// Router kernels of the CUDA device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "steelyard/core/gate.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard {

/// The contract is that of router_ops (ops/router_ops.hpp), for T in {float, bf16}; defined in cuda/router.cuh. Logits,
/// probabilities, weights and their gradients are float for both.
///
/// One warp selects for a token, up to 1024 experts and 32 groups. Given the same logits, choices without a selection
/// bias or groups are those of the CPU bit for bit. With them, what is compared is rounded as the CPU's AVX-512 kernels
/// do it (up to 16 choices): elsewhere values closer than that rounding may tie differently.
///
/// `select` and `weigh` answer -1: nobody waits for the GPU. The first token whose logits are not all finite is at
/// CudaFaults::bad_logits of `Cuda::faults` when the stream has come so far.
///
/// Products are cuBLAS's: of float without TF32; of bf16 summed in float, in which gradients of logits count with 16
/// bits of fraction.
template <>
struct router_ops<Cuda> {
    template <class G>
    using RoutingOf = Routing<G, CudaSpace>;

    template <class T>
    static index_t scratch_bytes(const Cuda& device, const LayerShape& shape);

    template <class T>
    static void logits(const Cuda& device, view<const T, 2, CudaSpace> x, view<const T, 2, CudaSpace> weight,
                       const RouterNoise& noise, view<gate_t<T>, 2, CudaSpace> logits, std::byte* scratch);
    template <class T>
    static void add_bias(const Cuda& device, view<const T, 1, CudaSpace> bias, view<gate_t<T>, 2, CudaSpace> logits);
    template <class T>
    static void bias_backward(const Cuda& device, view<const gate_t<T>, 2, CudaSpace> dlogits,
                              view<T, 1, CudaSpace> dbias);
    template <class T>
    static void logits_backward(const Cuda& device, view<const T, 2, CudaSpace> x,
                                view<const std::uint8_t, 1, CudaSpace> mask, view<const T, 2, CudaSpace> weight,
                                const RouterNoise& noise, view<const gate_t<T>, 2, CudaSpace> dlogits,
                                view<T, 2, CudaSpace> dx, view<T, 2, CudaSpace> dweight, std::byte* scratch);

    // Of what is float whatever T is: G = float.

    template <class G>
    static index_t select(const Cuda& device, const SelectionRule& rule, view<const float, 1, CudaSpace> bias,
                          view<const std::uint8_t, 1, CudaSpace> mask, const RoutingOf<G>& routing, std::byte* scratch);
    template <class G>
    static index_t weigh(const Cuda& device, const SelectionRule& rule, view<const std::uint8_t, 1, CudaSpace> mask,
                         const RoutingOf<G>& routing, std::byte* scratch);
    template <class G>
    static void take_all(const Cuda& device, view<const std::uint8_t, 1, CudaSpace> mask, const RoutingOf<G>& routing);
    template <class G>
    static void select_backward(const Cuda& device, const SelectionRule& rule,
                                view<const std::uint8_t, 1, CudaSpace> mask, const RoutingOf<G>& routing,
                                const RoutingGrad<G, CudaSpace>& grad);
};

}  // namespace steelyard
