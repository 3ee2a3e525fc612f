// Grouped gated feed-forward networks of one base with low-rank updates for each expert, on the CPU.
#pragma once

#include "steelyard/cpu/expert_ffn.hpp"
#include "steelyard/cpu/expert_linear.hpp"

namespace steelyard::cpu {

namespace detail::expert {

/// One thread's part of the scratch.
template <class T>
struct LowRankScratch {
    view<T, 2> width;   // [tile_rows, d]
    view<T, 2> hidden;  // [tile_rows, h]
    view<T, 2> low;     // [tile_rows, r]
    view<T, 2> along;   // [tile_rows, lanes]
    view<T, 1> weight;  // [tile_rows]
    view<std::byte, 1> gemm;

    template <class Field>
    void fields(Field&& field, index_t d, index_t h, index_t r) {
        field("width", width, tile_rows, d);
        field("hidden", hidden, tile_rows, h);
        field("low", low, tile_rows, r);
        field("along", along, tile_rows, row_gap<T>);
        field("weight", weight, tile_rows);
        field("gemm", gemm, gemm_scratch_bytes<T>());
    }
};

template <class T>
void scale(view<T, 2> rows, T factor) {
    for (index_t r = 0; r < rows.extents[0]; ++r)
        for (index_t i = 0; i < rows.extents[1]; ++i) rows(r, i) *= factor;
}

/// low = factor rows a^T,  out = rows base^T + low b^T
template <class T>
void updated_forward(view<const T, 2> rows, view<const T, 2> base, view<const T, 2> a, view<const T, 2> b, T factor,
                     view<T, 2> low, view<T, 2> out, std::byte* scratch, Isa isa) {
    gemm_nt<T>(rows, base, out, Write::assign, scratch, isa);
    gemm_nt<T>(rows, a, low, Write::assign, scratch, isa);
    scale(low, factor);
    gemm_nt<T>(low, b, out, Write::add, scratch, isa);
}

/// dlow = factor dout b,  drows (= or +=) dout base + dlow a
template <class T>
void updated_backward(view<const T, 2> dout, view<const T, 2> base, view<const T, 2> a, view<const T, 2> b, T factor,
                      view<T, 2> dlow, view<T, 2> drows, Write write, std::byte* scratch, Isa isa) {
    gemm_nn<T>(dout, base, drows, write, scratch, isa);
    gemm_nn<T>(dout, b, dlow, Write::assign, scratch, isa);
    scale(dlow, factor);
    gemm_nn<T>(dlow, a, drows, Write::add, scratch, isa);
}

/// The plan's rows as those of one expert.
inline Plan<> as_one_expert(const Plan<>& plan) {
    Plan<> one = plan;
    one.offsets.strides[0] *= plan.experts();
    one.offsets.extents[0] = 2;
    return one;
}

}  // namespace detail::expert

/// The low-rank kernels of ops/expert_ops.hpp. Scratch: for each thread, the larger of 192 rows of width d, h and r,
/// and twice 384 rows of the widest; and the packing blocks of one product.
struct LowRankKernels {
    template <class T>
    [[nodiscard]] static index_t low_rank_scratch_bytes(const Cpu& device, index_t width, index_t hidden,
                                                        index_t rank) {
        const index_t widest = std::max({width, hidden, rank});
        return std::max(device.threads, 1) * std::max(bytes_of<detail::expert::LowRankScratch<T>>(width, hidden, rank),
                                                      bytes_of<detail::expert::LinearScratch<T>>(widest, widest));
    }

    template <class T>
    static void low_rank_forward(const Cpu& device, const FfnFunction& function,
                                 const FfnWeights<const T>& weights,      // first extent 1, gated, without biases
                                 const LowRankUpdates<const T>& updates,  //
                                 double factor,                           //
                                 view<const T, 2> x,                      // [T, d]
                                 const Plan<>& plan,                      //
                                 const FfnKept<T>& kept,                  // [N, h] (=)
                                 const LowRankKept<T>& low,               // [N, r] (=)
                                 view<T, 2> rows,                         // [N, d] (=), or absent
                                 std::byte* scratch) {
        namespace detail = cpu::detail::expert;
        const T by = static_cast<T>(factor);
        const detail::Tiling tiling(device, plan.offsets);
        parallel_for(device, tiling.tiles(), [&](index_t task, int thread) {
            const detail::RowTile tile = tiling.tile(task);
            const index_t e = tile.expert, begin = tile.begin, end = tile.end;
            const auto own = part<T>(scratch, thread, weights, updates);
            const auto input = detail::gather(plan, x, begin, end, own.width);
            const auto forward = [&](view<const T, 2> from, view<const T, 2> base, const LowRank<const T>& update,
                                     view<T, 2> narrow, view<T, 2> to) {
                detail::updated_forward<T>(from, base, update.a[e], update.b[e], by, narrow, to, own.gemm.data,
                                           device.isa);
            };
            forward(input, weights.gate[0], updates.gate, low.gate.slice(begin, end), kept.gate.slice(begin, end));
            forward(input, weights.up[0], updates.up, low.up.slice(begin, end), kept.up.slice(begin, end));
            if (!rows.present()) return;
            const auto inner = own.hidden.slice(0, end - begin);
            with_kernels(device.isa, [&](auto kernels) {
                kernels.template activate<T>(function, true, end - begin, inner.extents[1],
                                             {&kept.gate(begin, 0), &kept.up(begin, 0), kept.up.strides[0]}, inner.data,
                                             inner.strides[0]);
            });
            forward(inner, weights.down[0], updates.down, own.low.slice(0, end - begin), rows.slice(begin, end));
        });
    }

    template <class T>
    static void low_rank_backward(const Cpu& device, const FfnFunction& function,
                                  const FfnWeights<const T>& weights,       //
                                  const LowRankUpdates<const T>& updates,   //
                                  double factor,                            //
                                  view<const T, 2> x,                       // [T, d]
                                  const Plan<>& plan,                       //
                                  const FfnKept<const T>& kept,             // [N, h]
                                  const LowRankKept<const T>& low,          // [N, r]
                                  view<const T, 2> weight,                  // [T, K], or absent: 1
                                  view<const T, 2> dy,                      // [T, d]
                                  const FfnGradRows<T>& grad_rows,          // [N, h] (=)
                                  const LowRankGradRows<T>& low_grad_rows,  // [N, r] (=)
                                  view<T, 2> drows,                         // [N, d] (=)
                                  view<T, 2> dweight,                       // [T, K] (+=), or absent
                                  const FfnWeights<T>& grads,               // (+=), absent members are skipped
                                  const LowRankUpdates<T>& update_grads,    // (+=), absent members are skipped
                                  std::byte* scratch) {
        namespace detail = cpu::detail::expert;
        const T by = static_cast<T>(factor);

        // Rows.
        const detail::Tiling tiling(device, plan.offsets);
        parallel_for(device, tiling.tiles(), [&](index_t task, int thread) {
            const detail::RowTile tile = tiling.tile(task);
            const index_t e = tile.expert, begin = tile.begin, end = tile.end;
            const auto own = part<T>(scratch, thread, weights, updates);
            const auto backward = [&](view<const T, 2> from, view<const T, 2> base, const LowRank<const T>& update,
                                      view<T, 2> narrow, view<T, 2> to, Write write) {
                detail::updated_backward<T>(from, base, update.a[e], update.b[e], by, narrow.slice(begin, end), to,
                                            write, own.gemm.data, device.isa);
            };
            const auto dout = detail::gather(plan, dy, begin, end, own.width);
            const auto dinner = own.hidden.slice(0, end - begin);
            backward(dout, weights.down[0], updates.down, low_grad_rows.down, dinner, Write::assign);
            std::fill_n(own.along.data, own.along.size(), T(0));
            for (index_t r = begin; r < end; ++r) own.weight[r - begin] = detail::weight_of(plan, weight, r);
            with_kernels(device.isa, [&](auto kernels) {
                typename decltype(kernels)::template BackwardOf<T> call{.function = function};
                call.rows = end - begin;
                call.weight = own.weight.data;
                call.kept = {&kept.gate(begin, 0), &kept.up(begin, 0), kept.up.strides[0]};
                call.grad = {&grad_rows.gate(begin, 0), &grad_rows.up(begin, 0), grad_rows.up.strides[0]};
                call.inner = &grad_rows.inner(begin, 0);
                call.along = own.along.data;
                kernels.activate_backward(call, dinner.extents[1], dinner.data, dinner.strides[0]);
                for (index_t r = begin; r < end; ++r)
                    detail::add_weight_gradient(
                        plan, dweight, r,
                        kernels.sum(own.along.data + (r - begin) * decltype(kernels)::template lanes<T>));
            });
            const auto inner_low = low_grad_rows.inner.slice(begin, end);
            gemm_nt<T>(grad_rows.inner.slice(begin, end), updates.down.a[e], inner_low, Write::assign, own.gemm.data,
                       device.isa);
            detail::scale(inner_low, by);
            const auto dinput = drows.slice(begin, end);
            backward(grad_rows.up.slice(begin, end), weights.up[0], updates.up, low_grad_rows.up, dinput,
                     Write::assign);
            backward(grad_rows.gate.slice(begin, end), weights.gate[0], updates.gate, low_grad_rows.gate, dinput,
                     Write::add);
        });

        // Weights.
        const auto gradient = [&](const Plan<>& of, const GroupedRows<T>& left, const GroupedRows<T>& right,
                                  view<T, 3> grad) {
            if (grad.present()) detail::weight_gradient<T>(device, of, left, right, grad, scratch);
        };
        const GroupedRows<T> input{x, true}, dout{dy, true}, dgate{grad_rows.gate}, dup{grad_rows.up};
        const GroupedRows<T> inner{grad_rows.inner};
        gradient(plan, {low_grad_rows.gate}, input, update_grads.gate.a);
        gradient(plan, dgate, {low.gate}, update_grads.gate.b);
        gradient(plan, {low_grad_rows.up}, input, update_grads.up.a);
        gradient(plan, dup, {low.up}, update_grads.up.b);
        gradient(plan, {low_grad_rows.down}, inner, update_grads.down.a);
        gradient(plan, dout, {low_grad_rows.inner}, update_grads.down.b);
        const Plan<> all = detail::as_one_expert(plan);
        gradient(all, dgate, input, grads.gate);
        gradient(all, dup, input, grads.up);
        gradient(all, dout, inner, grads.down);
    }

private:
    /// The scratch of one thread.
    template <class T>
    static detail::expert::LowRankScratch<T> part(std::byte* scratch, int thread, const FfnWeights<const T>& weights,
                                                  const LowRankUpdates<const T>& updates) {
        const index_t hidden = weights.up.extents[1], width = weights.up.extents[2], rank = updates.up.a.extents[1];
        using Part = detail::expert::LowRankScratch<T>;
        return place<Part>(scratch + thread * bytes_of<Part>(width, hidden, rank), width, hidden, rank);
    }
};

}  // namespace steelyard::cpu
