// Experts of the CUDA device: feed-forward networks of float and bf16.
#pragma once

#include <cstddef>
#include <string_view>

#include "steelyard/core/gate.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard {

/// The contract is that of expert_ops (ops/expert_ops.hpp), for T in {float, bf16}; defined in cuda/expert.cuh.
///
/// float is multiplied without TF32. bf16 is multiplied in bf16 and summed in float, activations and their gradients
/// are computed in float, and what is written is rounded once; weight gradients are added to what was there in float
/// and rounded.
///
/// Two ways lead there (`Cuda::experts`). *Looped*: cuBLAS products for one expert after the other; the host waits for
/// the plan's counts. *Grouped*: kernels for all experts that read the counts where they are, so that a forward and a
/// backward can be captured in a graph: bf16 on sm_90, widths and row strides of a multiple of 8, no biases, at most
/// 512 experts. `CudaExperts::grouped` throws an Error where that is not so, and needs less scratch.
///
/// There are no packed copies of weights on this device.
template <>
struct expert_ops<Cuda> {
    template <class T>
    static index_t scratch_bytes(const Cuda& device, index_t rows, index_t width, index_t hidden);

    template <class T>
    static void ffn_forward(const Cuda& device, const FfnFunction& function,
                            const FfnWeights<const T, CudaSpace>& weights, view<const T, 2, CudaSpace> x,
                            const Plan<CudaSpace>& plan, const FfnKept<T, CudaSpace>& kept, view<T, 2, CudaSpace> rows,
                            std::byte* scratch);

    template <class T>
    static void ffn_backward(const Cuda& device, const FfnFunction& function,
                             const FfnWeights<const T, CudaSpace>& weights, view<const T, 2, CudaSpace> x,
                             const Plan<CudaSpace>& plan, const FfnKept<const T, CudaSpace>& kept,
                             view<const gate_t<T>, 2, CudaSpace> weight, view<const T, 2, CudaSpace> dy,
                             const FfnGradRows<T, CudaSpace>& grad_rows, view<T, 2, CudaSpace> drows,
                             view<gate_t<T>, 2, CudaSpace> dweight, const FfnWeights<T, CudaSpace>& grads,
                             std::byte* scratch);

    template <class T>
    static index_t ffn_packed_bytes(const Cuda&, PackedFormat, PackedFor, index_t, index_t, index_t, bool) {
        return 0;
    }
    template <class T>
    static void ffn_pack(const Cuda&, PackedFormat, PackedFor, const FfnWeights<const T, CudaSpace>&, std::byte*) {}
    template <class T>
    static Status ffn_check_packed(const Cuda&, std::string_view stage, std::string_view name,
                                   view<const std::byte, 1, CudaSpace>, index_t, index_t, index_t, bool) {
        return Status::refuse(Code::invalid_argument, stage, name, "no packed copy on the CUDA device", "one");
    }
    static bool ffn_packed_serves(view<const std::byte, 1, CudaSpace>, PackedFor) { return false; }
};

}  // namespace steelyard
