// Grouped linear maps on the CPU.
#pragma once

#include "steelyard/cpu/expert_rows.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard::cpu {

namespace detail::expert {

/// One thread's part of the scratch.
template <class T>
struct LinearScratch {
    view<T, 2> left, right;  // [gathered_rows, max(in, out)]
    view<std::byte, 1> gemm;

    template <class Field>
    void fields(Field&& field, index_t in, index_t out) {
        field("left", left, gathered_rows, std::max(in, out));
        field("right", right, gathered_rows, std::max(in, out));
        field("gemm", gemm, gemm_scratch_bytes<T>());
    }
};

/// Columns [i0, i1) of rows [begin, end), with their weight: in place where they lie in grouped order without one,
/// otherwise copied to the panel.
template <class T>
view<const T, 2> fetch(const Plan<>& plan, const GroupedRows<T>& rows, index_t begin, index_t end, index_t i0,
                       index_t i1, view<T, 2> panel) {
    const view<const T, 2> from = columns(rows.from, i0, i1);
    if (!rows.by_token && !rows.weight.present()) return from.slice(begin, end);
    const view<T, 2> to(panel.data, end - begin, i1 - i0);
    for (index_t r = begin; r < end; ++r) {
        const T* const source = &from(rows.by_token ? plan.choice[r] / plan.top_k() : r, 0);
        const T w = weight_of(plan, rows.weight, r);
        for (index_t i = 0; i < i1 - i0; ++i) to(r - begin, i) = rows.weight.present() ? w * source[i] : source[i];
    }
    return to;
}

/// grad[e] += sum over rows r of e, in order, of left[r] right[r]^T.
template <class T>
void weight_gradient(const Cpu& device, const Plan<>& plan, const GroupedRows<T>& left, const GroupedRows<T>& right,
                     view<T, 3> grad, std::byte* scratch) {
    const index_t out = grad.extents[1], in = grad.extents[2], blocks = (out + weight_block - 1) / weight_block;
    parallel_for(device, plan.experts() * blocks, [&](index_t task, int thread) {
        const index_t e = task / blocks, i0 = task % blocks * weight_block, i1 = std::min(i0 + weight_block, out);
        using Part = LinearScratch<T>;
        const auto own = place<Part>(scratch + thread * bytes_of<Part>(in, out), in, out);
        for (index_t r0 = plan.offsets[e]; r0 < plan.offsets[e + 1]; r0 += gathered_rows) {
            const index_t r1 = std::min(r0 + gathered_rows, plan.offsets[e + 1]);
            gemm_tn<T>(fetch(plan, left, r0, r1, i0, i1, own.left), fetch(plan, right, r0, r1, 0, in, own.right),
                       grad[e].slice(i0, i1), Write::add, own.gemm.data, device.isa);
        }
    });
}

}  // namespace detail::expert

/// The linear kernels of ops/expert_ops.hpp. Scratch: for each thread, twice 384 rows of the wider side, and the
/// packing blocks of one product.
struct LinearKernels {
    template <class T>
    [[nodiscard]] static index_t linear_scratch_bytes(const Cpu& device, index_t in, index_t out) {
        return std::max(device.threads, 1) * bytes_of<detail::expert::LinearScratch<T>>(in, out);
    }

    template <class T>
    static void linear_forward(const Cpu& device, view<const T, 3> weight,  // [E, out, in]
                               const GroupedRows<T>& input,                 // [.., in]
                               const Plan<>& plan,                          //
                               view<T, 2> out,                              // [N, out] (=)
                               std::byte* scratch) {
        namespace detail = cpu::detail::expert;
        const detail::Tiling tiling(device, plan.offsets);
        const index_t out_width = weight.extents[1], in_width = weight.extents[2];
        parallel_for(device, tiling.tiles(), [&](index_t task, int thread) {
            const detail::RowTile tile = tiling.tile(task);
            const auto own = part<T>(scratch, thread, in_width, out_width);
            gemm_nt<T>(detail::fetch(plan, input, tile.begin, tile.end, 0, in_width, own.left), weight[tile.expert],
                       out.slice(tile.begin, tile.end), Write::assign, own.gemm.data, device.isa);
        });
    }

    template <class T>
    static void linear_backward(const Cpu& device, view<const T, 3> weight,  // [E, out, in]
                                const GroupedRows<T>& input,                 // [.., in]
                                const GroupedRows<T>& dout,                  // [.., out]
                                const Plan<>& plan,                          //
                                view<T, 2> din,                              // [N, in] (=), or absent
                                view<T, 3> dweight,                          // [E, out, in] (+=), or absent
                                std::byte* scratch) {
        namespace detail = cpu::detail::expert;
        const index_t out_width = weight.extents[1], in_width = weight.extents[2];
        if (din.present()) {
            const detail::Tiling tiling(device, plan.offsets);
            parallel_for(device, tiling.tiles(), [&](index_t task, int thread) {
                const detail::RowTile tile = tiling.tile(task);
                const auto own = part<T>(scratch, thread, in_width, out_width);
                gemm_nn<T>(detail::fetch(plan, dout, tile.begin, tile.end, 0, out_width, own.left), weight[tile.expert],
                           din.slice(tile.begin, tile.end), Write::assign, own.gemm.data, device.isa);
            });
        }
        if (dweight.present()) detail::weight_gradient<T>(device, plan, dout, input, dweight, scratch);
    }

private:
    template <class T>
    static detail::expert::LinearScratch<T> part(std::byte* scratch, int thread, index_t in, index_t out) {
        using Part = detail::expert::LinearScratch<T>;
        return place<Part>(scratch + thread * bytes_of<Part>(in, out), in, out);
    }
};

}  // namespace steelyard::cpu
