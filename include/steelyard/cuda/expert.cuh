// Experts of the CUDA device: which way they are computed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "steelyard/cuda/expert.hpp"
#include "steelyard/cuda/expert_grouped.cuh"
#include "steelyard/cuda/expert_looped.cuh"
#include "steelyard/cuda/memory.hpp"

namespace steelyard {

namespace cuda {

/// Whether the grouped kernels take these tensors; throws where the device insists on them and they don't.
template <class T>
bool is_grouped(const Cuda& device, const FfnWeights<const T, CudaSpace>& weights,
                std::initializer_list<bool> tensors_fit) {
    if (device.experts == CudaExperts::looped) return false;
    const char* obstacle = nullptr;
    if constexpr (std::is_same_v<T, bf16>) {
        const bool aligned = std::all_of(tensors_fit.begin(), tensors_fit.end(), [](bool fits) { return fits; });
        if (weights.up_bias.present() || weights.gate_bias.present() || weights.down_bias.present())
            obstacle = "biases";
        else if (weights.up.extents[0] > GroupedFfn::most_experts)
            obstacle = "more than 512 experts";
        else if (!aligned || !GroupedFfn::fits(weights.up) || !GroupedFfn::fits(weights.down) ||
                 (weights.gate.present() && !GroupedFfn::fits(weights.gate)))
            obstacle = "rows that are no multiple of 16 bytes";
        else if (!Gpu::current().runs_sm_90a())
            obstacle = "another GPU than sm_90";
    } else {
        obstacle = "elements other than bf16";
    }
    if (obstacle != nullptr && device.experts == CudaExperts::grouped)
        throw Error(Status::refuse(Code::invalid_argument, "experts", "device.experts",
                                   "looped or automatic, or what the grouped kernels can do", obstacle));
    return obstacle == nullptr;
}

/// Gradients that replace what is there, to be added to: 0.
template <class T>
void clear_gradients(const Cuda& device, const FfnWeights<T, CudaSpace>& grads) {
    const auto clear = [&](const auto& tensor) {
        if (tensor.present()) fill_rows(device, rows_of(tensor), 0, sizeof(T));
    };
    clear(grads.gate), clear(grads.up), clear(grads.down);
    clear(grads.gate_bias), clear(grads.up_bias), clear(grads.down_bias);
}

}  // namespace cuda

template <class T>
index_t expert_ops<Cuda>::scratch_bytes(const Cuda& device, index_t rows, index_t width, index_t hidden) {
    const index_t looped = cuda::LoopedFfn<T>::scratch_bytes(rows, width, hidden);
    const index_t grouped = std::is_same_v<T, bf16> ? cuda::GroupedFfn::scratch_bytes(rows, hidden) : 0;
    switch (device.experts) {
        case CudaExperts::looped:
            return looped;
        case CudaExperts::grouped:
            return grouped;
        case CudaExperts::automatic:
            break;
    }
    return std::max(looped, grouped);
}

template <class T>
void expert_ops<Cuda>::ffn_forward(const Cuda& device, const FfnFunction& function,
                                   const FfnWeights<const T, CudaSpace>& weights, view<const T, 2, CudaSpace> x,
                                   const Plan<CudaSpace>& plan, const FfnKept<T, CudaSpace>& kept,
                                   view<T, 2, CudaSpace> rows, std::byte* scratch) {
    if (plan.choice.extents[0] == 0) return;
    using cuda::GroupedFfn;
    if (cuda::is_grouped<T>(
            device, weights,
            {GroupedFfn::fits(x), GroupedFfn::fits(kept.gate), GroupedFfn::fits(kept.up), GroupedFfn::fits(rows)})) {
        if constexpr (std::is_same_v<T, bf16>)
            GroupedFfn(device, function, weights, x, plan).forward(kept, rows, scratch);
    } else {
        cuda::LoopedFfn<T>(device, function, weights, x, plan, scratch).forward(kept, rows);
    }
}

template <class T>
void expert_ops<Cuda>::ffn_backward(const Cuda& device, const FfnFunction& function,
                                    const FfnWeights<const T, CudaSpace>& weights, view<const T, 2, CudaSpace> x,
                                    const Plan<CudaSpace>& plan, const FfnKept<const T, CudaSpace>& kept,
                                    view<const gate_t<T>, 2, CudaSpace> weight, view<const T, 2, CudaSpace> dy,
                                    const FfnGradRows<T, CudaSpace>& grad_rows, view<T, 2, CudaSpace> drows,
                                    view<gate_t<T>, 2, CudaSpace> dweight, const FfnWeights<T, CudaSpace>& grads,
                                    std::byte* scratch) {
    const bool replaces = grads.write == Write::assign;
    if (plan.choice.extents[0] == 0) return replaces ? cuda::clear_gradients(device, grads) : void();
    using cuda::GroupedFfn;
    if (cuda::is_grouped<T>(device, weights,
                            {GroupedFfn::fits(x), GroupedFfn::fits(kept.gate), GroupedFfn::fits(kept.up),
                             GroupedFfn::fits(dy), GroupedFfn::fits(grad_rows.gate), GroupedFfn::fits(grad_rows.up),
                             GroupedFfn::fits(grad_rows.inner), GroupedFfn::fits(drows), GroupedFfn::fits(grads.gate),
                             GroupedFfn::fits(grads.up), GroupedFfn::fits(grads.down)})) {
        if constexpr (std::is_same_v<T, bf16>)
            GroupedFfn(device, function, weights, x, plan)
                .backward(kept, weight, dy, grad_rows, drows, dweight, grads, scratch);
    } else {
        if (replaces) cuda::clear_gradients(device, grads);
        cuda::LoopedFfn<T>(device, function, weights, x, plan, scratch)
            .backward(kept, weight, dy, grad_rows, drows, dweight, grads);
    }
}

}  // namespace steelyard
