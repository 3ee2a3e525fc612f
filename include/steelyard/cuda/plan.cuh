// Plan kernels of the CUDA device: which are launched for what.
#pragma once

#include <algorithm>
#include <cstdint>

#include "steelyard/core/layout.hpp"
#include "steelyard/cuda/kernels/rows.cuh"
#include "steelyard/cuda/kernels/sort.cuh"
#include "steelyard/cuda/plan.hpp"
#include "steelyard/cuda/product.cuh"

namespace steelyard {

namespace cuda {

/// Blocks of the sort: enough to fill a GPU, each with work for its threads; one for few choices.
constexpr int most_sort_blocks = 128, least_sort_items = 2048;

inline int sort_block_items(index_t items) {
    const index_t wanted = std::max<index_t>(least_sort_items, (items + most_sort_blocks - 1) / most_sort_blocks);
    return static_cast<int>((wanted + SortCall::threads - 1) / SortCall::threads * SortCall::threads);
}
inline int sort_blocks(index_t items) {
    return std::max(1, static_cast<int>((items + sort_block_items(items) - 1) / sort_block_items(items)));
}

struct SortScratch {
    view<std::int32_t, 2, CudaSpace> counts;  // [blocks, E]
    template <class Field>
    void fields(Field&& field, index_t blocks, index_t experts) {
        field("counts", counts, blocks, experts);
    }
};

}  // namespace cuda

index_t plan_ops<Cuda>::scratch_bytes(const Cuda&, const LayerShape& shape, int top_k) {
    return bytes_of<cuda::SortScratch>(cuda::sort_blocks(shape.tokens * top_k), shape.experts);
}

void plan_ops<Cuda>::make_plan(const Cuda& device, view<const expert_t, 2, CudaSpace> choices,
                               const Plan<CudaSpace>& plan, std::byte* scratch) {
    using cuda::SortCall;
    SortCall call;
    call.choices = cuda::matrix_of(choices);
    call.top_k = cuda::Divisor(std::max(1, static_cast<int>(choices.extents[1])));
    call.items = static_cast<int>(choices.size());
    call.experts = static_cast<int>(plan.experts());
    call.blocks = cuda::sort_blocks(call.items);
    call.block_items = cuda::sort_block_items(call.items);
    call.counts = place<cuda::SortScratch>(scratch, call.blocks, call.experts).counts.data;
    call.offsets = plan.offsets.data;
    call.choice = plan.choice.data;
    call.row = cuda::matrix_of(plan.row);
    const auto blocks = static_cast<unsigned>(call.blocks);
    const auto room = [&](int rows) { return static_cast<std::size_t>(rows) * call.experts * sizeof(std::int32_t); };
    if (blocks > 1) {
        cuda::count_choices<<<blocks, SortCall::threads, room(1), device.stream>>>(call);
        cuda::check_call(cudaGetLastError(), "count_choices");
    }
    const auto place_room = room(SortCall::warps + 2);
    if (place_room > 48 * 1024)
        cuda::check_call(cudaFuncSetAttribute(cuda::place_choices, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(place_room)),
                         "place_choices");
    cuda::place_choices<<<blocks, SortCall::threads, place_room, device.stream>>>(call);
    cuda::check_call(cudaGetLastError(), "place_choices");
}

template <class T>
void plan_ops<Cuda>::dispatch(const Cuda& device, const Plan<CudaSpace>& plan, view<const T, 2, CudaSpace> x,
                              view<T, 2, CudaSpace> rows) {
    const index_t most = plan.choice.extents[0], width = x.extents[1];
    if (most == 0) return;
    const auto launch = [&](auto pack) {
        cuda::dispatch_rows<T, pack.value><<<cuda::blocks_for(most, 8), 256, 0, device.stream>>>(
            plan.offsets.data, static_cast<int>(plan.experts()), plan.choice.data, static_cast<int>(plan.top_k()),
            cuda::matrix_of(x), static_cast<int>(width), cuda::matrix_of(rows));
        cuda::check_call(cudaGetLastError(), "dispatch_rows");
    };
    if (cuda::takes_packs<T>(width, x, rows))
        launch(std::integral_constant<int, cuda::whole_pack<T>>{});
    else
        launch(std::integral_constant<int, 1>{});
}

template <class T>
void plan_ops<Cuda>::combine(const Cuda& device, const Plan<CudaSpace>& plan, view<const T, 2, CudaSpace> rows,
                             view<const gate_t<T>, 2, CudaSpace> weight, view<T, 2, CudaSpace> y, Write write) {
    const index_t tokens = y.extents[0], width = y.extents[1];
    if (tokens == 0 || width == 0) return;
    const auto launch = [&](auto pack) {
        const int packs = static_cast<int>(width) / pack.value, across = std::min(packs, cuda::combine_threads);
        const dim3 grid(cuda::blocks_for(tokens, cuda::combine_threads / across), cuda::blocks_for(packs, across));
        cuda::combine_rows<T, pack.value><<<grid, cuda::combine_threads, 0, device.stream>>>(
            cuda::matrix_of(view<const std::int32_t, 2, CudaSpace>(plan.row)), static_cast<int>(plan.top_k()),
            cuda::matrix_of(rows), cuda::matrix_of(weight), tokens, static_cast<int>(width), cuda::matrix_of(y),
            write == Write::add);
        cuda::check_call(cudaGetLastError(), "combine_rows");
    };
    if (cuda::takes_packs<T>(width, rows, y))
        launch(std::integral_constant<int, cuda::whole_pack<T>>{});
    else
        launch(std::integral_constant<int, 1>{});
}

template <class T>
void plan_ops<Cuda>::combine_backward(const Cuda& device, const Plan<CudaSpace>& plan, view<const T, 2, CudaSpace> rows,
                                      view<const T, 2, CudaSpace> dy, view<gate_t<T>, 2, CudaSpace> dweight) {
    const index_t tokens = dy.extents[0];
    if (tokens == 0) return;
    const auto launch = [&](auto pack) {
        cuda::combine_weight_gradient<T, pack.value>
            <<<cuda::blocks_for(tokens * plan.top_k(), 8), 256, 0, device.stream>>>(
                cuda::matrix_of(view<const std::int32_t, 2, CudaSpace>(plan.row)), static_cast<int>(plan.top_k()),
                cuda::matrix_of(rows), cuda::matrix_of(dy), tokens, static_cast<int>(dy.extents[1]),
                cuda::matrix_of(dweight));
        cuda::check_call(cudaGetLastError(), "combine_weight_gradient");
    };
    if (cuda::takes_packs<T>(dy.extents[1], rows, dy))
        launch(std::integral_constant<int, cuda::whole_pack<T>>{});
    else
        launch(std::integral_constant<int, 1>{});
}

}  // namespace steelyard
