// Plan kernels of the CUDA device.
#pragma once

#include <cstddef>

#include "steelyard/core/gate.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/ops/plan_ops.hpp"

namespace steelyard {

/// The contract is that of plan_ops (ops/plan_ops.hpp), for T in {float, bf16}; defined in cuda/plan.cuh. Plans are
/// those of the CPU, bit for bit; the host is told nothing. Rows are moved 16 bytes at a time where they allow it, sums
/// are taken in float in the order of k.
template <>
struct plan_ops<Cuda> {
    static index_t scratch_bytes(const Cuda& device, const LayerShape& shape, int top_k);

    static void make_plan(const Cuda& device, view<const expert_t, 2, CudaSpace> choices, const Plan<CudaSpace>& plan,
                          std::byte* scratch);

    template <class T>
    static void dispatch(const Cuda& device, const Plan<CudaSpace>& plan, view<const T, 2, CudaSpace> x,
                         view<T, 2, CudaSpace> rows);
    template <class T>
    static void combine(const Cuda& device, const Plan<CudaSpace>& plan, view<const T, 2, CudaSpace> rows,
                        view<const gate_t<T>, 2, CudaSpace> weight, view<T, 2, CudaSpace> y,
                        Write write = Write::assign);
    template <class T>
    static void combine_backward(const Cuda& device, const Plan<CudaSpace>& plan, view<const T, 2, CudaSpace> rows,
                                 view<const T, 2, CudaSpace> dy, view<gate_t<T>, 2, CudaSpace> dweight);
};

}  // namespace steelyard
