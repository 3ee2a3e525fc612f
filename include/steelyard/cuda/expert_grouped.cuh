// Experts by one kernel for all of them: forward two launches, backward five, no word to or from the host.
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/call.cuh"
#include "steelyard/cuda/device.hpp"
#include "steelyard/cuda/gpu.cuh"
#include "steelyard/cuda/kernels/ffn_finish.cuh"
#include "steelyard/cuda/kernels/grad_finish.cuh"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard::cuda {

/// Describes tensors to the copy engine. The driver's function is looked up once.
class MapMaker {
public:
    MapMaker() {
        cudaDriverEntryPointQueryResult found{};
        void* function = nullptr;
        check_call(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cudaGetDriverEntryPointByVersion");
        encode_ = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }
    static const MapMaker& instance() {
        static const MapMaker maker;
        return maker;
    }

    /// Boxes of 64 columns by `rows` rows of a matrix [n, columns].
    [[nodiscard]] hopper::TensorMap rows(const bf16* data, index_t n, index_t columns, index_t stride, int rows) const {
        const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(n)};
        const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(bf16)};
        const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)};
        return make(2, data, extents, strides, box);
    }
    /// The same of one matrix of a tensor [E, n, columns].
    [[nodiscard]] hopper::TensorMap weights(const view<const bf16, 3, CudaSpace>& of, int rows) const {
        const cuuint64_t extents[] = {static_cast<cuuint64_t>(of.extents[2]), static_cast<cuuint64_t>(of.extents[1]),
                                      static_cast<cuuint64_t>(of.extents[0])};
        const cuuint64_t strides[] = {static_cast<cuuint64_t>(of.strides[1]) * sizeof(bf16),
                                      static_cast<cuuint64_t>(of.strides[0]) * sizeof(bf16)};
        const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows), 1};
        return make(3, of.data, extents, strides, box);
    }

private:
    [[nodiscard]] hopper::TensorMap make(cuuint32_t rank, const bf16* data, const cuuint64_t* extents,
                                         const cuuint64_t* strides, const cuuint32_t* box) const {
        hopper::TensorMap map;
        const cuuint32_t every[] = {1, 1, 1};
        const CUresult result = encode_(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<bf16*>(data), extents,
                                        strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        check_call(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, "cuTensorMapEncodeTiled");
        return map;
    }

    PFN_cuTensorMapEncodeTiled_v12000 encode_ = nullptr;
};

/// Feed-forward experts in bf16 without biases. Rows are gathered while they are loaded; the activation and its
/// gradient are computed on the sums.
class GroupedFfn {
public:
    using Space = CudaSpace;
    static constexpr int most_experts = 512;

    /// Whether the copy engine can read a tensor: 16-byte rows. And rows are gathered by 32-bit numbers of 16 bytes.
    template <class View>
    static bool fits(const View& tensor) {
        bool fine = reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0;
        for (int r = 0; r + 1 < View::rank; ++r) fine = fine && tensor.strides[r] % 8 == 0;
        if (View::rank == 2) fine = fine && tensor.extents[0] * tensor.strides[0] < index_t{8} << 32;
        return fine && tensor.extents[View::rank - 1] % 8 == 0;
    }
    static index_t scratch_bytes(index_t rows, index_t hidden) {
        const index_t inner = rows * hidden * static_cast<index_t>(sizeof(bf16));
        const index_t parts = rows * tiles_of(hidden, 128) * static_cast<index_t>(sizeof(float));
        return steelyard::detail::align_up(std::max(inner, parts));
    }

    GroupedFfn(const Cuda& device, const FfnFunction& function, const FfnWeights<const bf16, Space>& weights,
               view<const bf16, 2, Space> x, const Plan<Space>& plan)
        : device_(device),
          function_(function, weights.gate.present()),
          weights_(weights),
          x_(x),
          plan_(plan),
          rows_(plan.choice.extents[0]),
          width_(static_cast<int>(weights.up.extents[2])),
          hidden_(static_cast<int>(weights.up.extents[1])),
          // Few rows for an expert: a tile of 128 would be mostly empty. And where there are few tiles, narrow ones
          // keep more multiprocessors at reading weights.
          small_(rows_ <= 64 * plan.experts()),
          columns_(small_ &&
                           std::min(rows_, plan.experts()) * tiles_of(hidden_, 128) < 4 * Gpu::current().multiprocessors
                       ? 128
                       : 256) {}

    void forward(const FfnKept<bf16, Space>& kept, view<bf16, 2, Space> rows, std::byte* scratch) const {
        if (rows_ == 0) return;
        const RowsOut inner = rows.present() ? RowsOut{reinterpret_cast<bf16*>(scratch), hidden_} : RowsOut{};
        const RowsOut gate = out(kept.gate), up = out(kept.up);
        if (function_.gated && is_swiglu())
            hidden<true, true>(gate, up, inner);
        else if (function_.gated)
            hidden<true, false>(gate, up, inner);
        else
            hidden<false, false>(gate, up, inner);
        if (!rows.present()) return;
        ProductMaps maps{};
        maps.a[0] = maps.a[1] = rows_map(inner.data, inner.stride, hidden_);
        maps.b[0] = maps.b[1] = maker().weights(weights_.down, columns_ / 2);
        maps.out[0] = out_map(out(rows), width_);
        const GroupedProduct of = product(hidden_, width_, columns_);
        launch<Bring::rows, Bring::weights>(maps, of, FinishRows{{}, out(rows), width_});
    }

    void backward(const FfnKept<const bf16, Space>& kept, view<const float, 2, Space> weight,
                  view<const bf16, 2, Space> dy, const FfnGradRows<bf16, Space>& grad_rows, view<bf16, 2, Space> drows,
                  view<float, 2, Space> dweight, const FfnWeights<bf16, Space>& grads, std::byte* scratch) const {
        if (rows_ == 0) return;
        float* const parts = dweight.present() ? reinterpret_cast<float*>(scratch) : nullptr;
        if (function_.gated && is_swiglu())
            hidden_gradient<true, true>(kept, weight, dy, grad_rows, parts);
        else if (function_.gated)
            hidden_gradient<true, false>(kept, weight, dy, grad_rows, parts);
        else
            hidden_gradient<false, false>(kept, weight, dy, grad_rows, parts);
        if (parts != nullptr) {
            constexpr int threads = 128;
            add_weight_parts<<<static_cast<unsigned>((rows_ + threads - 1) / threads), threads, 0, device_.stream>>>(
                parts, tiles_of(hidden_, columns_), plan_.offsets.data, experts(), plan_.choice.data, top_k(),
                dweight.data, dweight.strides[0]);
            check_call(cudaGetLastError(), "add_weight_parts");
        }
        if (drows.present()) input_gradient(grad_rows, drows);
        if (grads.write == Write::add) return weight_gradients<Write::add>(dy, grad_rows, grads);
        weight_gradients<Write::assign>(dy, grad_rows, grads);
        clear_idle(grads);
    }

private:
    static const MapMaker& maker() { return MapMaker::instance(); }
    template <class View>
    static RowsOut out(const View& rows) {
        return rows.present() ? RowsOut{rows.data, rows.strides[0]} : RowsOut{};
    }
    [[nodiscard]] int experts() const { return static_cast<int>(plan_.experts()); }
    [[nodiscard]] int top_k() const { return static_cast<int>(plan_.top_k()); }
    [[nodiscard]] bool is_swiglu() const { return !function_.clamped && function_.activation == Activation::silu; }
    [[nodiscard]] int tile_rows() const { return small_ ? 64 : 128; }
    [[nodiscard]] hopper::TensorMap rows_map(const bf16* data, index_t stride, int width) const {
        return maker().rows(data, rows_, width, stride, tile_rows());
    }
    template <class View>
    [[nodiscard]] hopper::TensorMap rows_map(const View& rows, int width) const {
        return rows_map(rows.data, rows.strides[0], width);
    }
    /// Of rows that are written: the 16 of a warp.
    [[nodiscard]] hopper::TensorMap out_map(const RowsOut& rows, int width) const {
        return maker().rows(rows.data, rows_, width, rows.stride, 16);
    }
    void hidden_out(ProductMaps& maps, const RowsOut& gate, const RowsOut& up, const RowsOut& inner) const {
        const RowsOut* const all[] = {&gate, &up, &inner};
        for (int i = 0; i < 3; ++i)
            if (all[i]->data != nullptr) maps.out[i] = out_map(*all[i], hidden_);
    }
    [[nodiscard]] hopper::TensorMap turned_map(const view<bf16, 2, Space>& rows) const {
        return maker().rows(rows.data, rows_, rows.extents[1], rows.strides[0], 64);
    }

    /// Rows times a weight: k columns to n, of which a tile has `columns`.
    [[nodiscard]] GroupedProduct product(int k, int n, int columns) const {
        GroupedProduct of;
        of.offsets = plan_.offsets.data;
        of.experts = experts();
        of.tiles = {tile_rows(), tiles_of(n, columns)};
        of.choice = plan_.choice.data;
        of.top_k = Divisor(top_k());
        of.k_steps = tiles_of(k, 64);
        return of;
    }
    static void gather(GroupedProduct& of, const view<const bf16, 2, Space>& tokens) {
        of.tokens = tokens.data;
        of.token_stride = tokens.strides[0];
        of.token_width = static_cast<int>(tokens.extents[1]);
    }

    template <bool gated, bool swiglu>
    void hidden(const RowsOut& gate, const RowsOut& up, const RowsOut& inner) const {
        ProductMaps maps{};
        maps.b[1] = maker().weights(weights_.up, columns_ / 2);
        maps.b[0] = gated ? maker().weights(weights_.gate, columns_ / 2) : maps.b[1];
        maps.a[0] = maps.a[1] = maps.b[0];  // not read
        hidden_out(maps, gate, up, inner);
        GroupedProduct of = product(width_, hidden_, gated ? columns_ / 2 : columns_);
        of.halved = gated;
        gather(of, x_);
        launch<Bring::gathered, Bring::weights>(maps, of,
                                                FinishHidden<gated, swiglu>{{}, function_, gate, up, inner, hidden_});
    }

    template <bool gated, bool swiglu>
    void hidden_gradient(const FfnKept<const bf16, Space>& kept, view<const float, 2, Space> weight,
                         view<const bf16, 2, Space> dy, const FfnGradRows<bf16, Space>& to, float* parts) const {
        ProductMaps maps{};
        maps.b[0] = maps.b[1] = maker().weights(weights_.down, 64);
        maps.a[0] = maps.a[1] = maps.b[0];  // not read
        maps.extra[1] = rows_map(kept.up, hidden_);
        maps.extra[0] = gated ? rows_map(kept.gate, hidden_) : maps.extra[1];
        hidden_out(maps, out(to.gate), out(to.up), out(to.inner));
        GroupedProduct of = product(width_, hidden_, columns_);
        gather(of, dy);
        launch<Bring::gathered, Bring::weights_turned>(
            maps, of,
            FinishHiddenGradient<gated, swiglu>{function_, out(to.gate), out(to.up), out(to.inner), weight.data,
                                                weight.strides[0], plan_.choice.data, Divisor(top_k()), parts,
                                                tiles_of(hidden_, columns_), hidden_});
    }

    /// drows = dgate G + dup U.
    void input_gradient(const FfnGradRows<bf16, Space>& from, view<bf16, 2, Space> drows) const {
        ProductMaps maps{};
        maps.a[1] = rows_map(from.up, hidden_);
        maps.b[1] = maker().weights(weights_.up, 64);
        maps.a[0] = function_.gated ? rows_map(from.gate, hidden_) : maps.a[1];
        maps.b[0] = function_.gated ? maker().weights(weights_.gate, 64) : maps.b[1];
        maps.out[0] = out_map(out(drows), width_);
        GroupedProduct of = product(hidden_, width_, columns_);
        of.segments = function_.gated ? 2 : 1;
        launch<Bring::rows, Bring::weights_turned>(maps, of, FinishRows{{}, out(drows), width_});
    }

    /// dG, dU, dD (+= or =) dgate^T x, dup^T x, dy^T inner.
    template <Write write>
    void weight_gradients(view<const bf16, 2, Space> dy, const FfnGradRows<bf16, Space>& from,
                          const FfnWeights<bf16, Space>& grads) const {
        const bool first = function_.gated && grads.gate.present(), second = grads.up.present();
        if (first || second) {
            // Turned, as x^T dgate: the smaller operand is the one that is gathered, and the other can be shared.
            const auto& head = first ? grads.gate : grads.up;  // the first of two, or the only one
            const auto& tail = second ? grads.up : grads.gate;
            ProductMaps maps{};
            maps.b[0] = turned_map(first ? from.gate : from.up);
            maps.b[1] = second ? turned_map(from.up) : maps.b[0];
            maps.a[0] = maps.a[1] = maps.b[0];  // not read
            add_to(maps, head, tail);
            GroupedProduct of = sum_over_rows(width_, hidden_, first && second ? 2 : 1);
            gather(of, x_);
            launch_large<Bring::gathered_turned, Bring::rows_turned>(maps, of, FinishGradientTurned<write>{});
        }
        if (grads.down.present()) {
            ProductMaps maps{};
            maps.b[0] = maps.b[1] = turned_map(from.inner);
            maps.a[0] = maps.a[1] = maps.b[0];  // not read
            add_to(maps, grads.down, grads.down);
            GroupedProduct of = sum_over_rows(width_, hidden_, 1);
            gather(of, dy);
            launch_large<Bring::gathered_turned, Bring::rows_turned>(maps, of, FinishGradient<write>{});
        }
    }
    void clear_idle(const FfnWeights<bf16, Space>& grads) const {
        IdleGradients of{};
        of.offsets = plan_.offsets.data;
        unsigned count = 0;
        for (const auto* to : {&grads.gate, &grads.up, &grads.down})
            if (to->present())
                of.tensors[count++] = {to->data, to->strides[0], to->strides[1], static_cast<int>(to->extents[1]),
                                       static_cast<int>(to->extents[2])};
        if (count == 0) return;
        constexpr unsigned blocks_of_one = 16;
        clear_idle_gradients<<<dim3(blocks_of_one, static_cast<unsigned>(experts()), count), 256, 0, device_.stream>>>(
            of);
        check_call(cudaGetLastError(), "clear_idle_gradients");
    }
    static void add_to(ProductMaps& maps, const view<bf16, 3, Space>& head, const view<bf16, 3, Space>& tail) {
        maps.extra[0] = maker().weights(head, 128);
        maps.extra[1] = maker().weights(tail, 128);
        maps.out[0] = maker().weights(head, 16);
        maps.out[1] = maker().weights(tail, 16);
    }
    [[nodiscard]] GroupedProduct sum_over_rows(int m, int n, int matrices) const {
        GroupedProduct of = product(0, n, 256);
        of.n_tiles_of_one = of.tiles.n_tiles;
        of.tiles.n_tiles = matrices * of.n_tiles_of_one;
        of.tiles.m_tiles = tiles_of(m, 128);
        return of;
    }

    template <Bring a, Bring b, class Finish>
    void launch(const ProductMaps& maps, const GroupedProduct& of, const Finish& finish) const {
        if (columns_ == 128)
            launch_by<a, b, ProductBlock<1, 128, false>>(maps, of, finish);
        else if (small_)
            launch_by<a, b, ProductBlock<1, 256, false>>(maps, of, finish);
        else
            launch_large<a, b>(maps, of, finish);
    }
    template <Bring a, Bring b, class Finish>
    void launch_large(const ProductMaps& maps, const GroupedProduct& of, const Finish& finish) const {
        launch_by<a, b, ProductBlock<2, 256, true>>(maps, of, finish);
    }
    template <Bring a, Bring b, class Block, class Finish>
    void launch_by(const ProductMaps& maps, const GroupedProduct& of, const Finish& finish) const {
        const auto kernel = grouped_product<a, b, Block, Finish>;
        const int shared = Block::shared_bytes(of.experts);
        // Once for each kernel and GPU: for few tokens, each call of the runtime takes longer than a product. Other
        // threads wait for it.
        static std::once_flag allowed[Gpu::most];
        const Gpu& gpu = Gpu::current();
        std::call_once(allowed[gpu.ordinal], [&] {
            check_call(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            Block::shared_bytes(most_experts)),
                       "cudaFuncSetAttribute");
        });
        cudaLaunchAttribute pairs{};
        pairs.id = cudaLaunchAttributeClusterDimension;
        pairs.val.clusterDim = {Block::cluster, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = static_cast<unsigned>(gpu.multiprocessors / Block::cluster * Block::cluster);
        config.blockDim = Block::threads;
        config.dynamicSmemBytes = static_cast<std::size_t>(shared);
        config.stream = device_.stream;
        config.attrs = &pairs;
        config.numAttrs = 1;
        check_call(cudaLaunchKernelEx(&config, kernel, maps, of, finish), "grouped_product");
    }

    Cuda device_;
    FunctionOf function_;
    FfnWeights<const bf16, Space> weights_;
    view<const bf16, 2, Space> x_;
    Plan<Space> plan_;
    index_t rows_;
    int width_, hidden_;
    bool small_;
    int columns_;  // of a tile
};

}  // namespace steelyard::cuda
