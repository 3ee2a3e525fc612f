// Backward of feed-forward experts on the CPU.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "steelyard/cpu/ffn_pass.hpp"

namespace steelyard::cpu::detail::expert {

/// The gradients of rows, tile by tile, then of weights, block by block.
template <class Kernels, class T>
class FfnBackwardPass : FfnPass<Kernels, T> {
    using Base = FfnPass<Kernels, T>;
    using Base::device_, Base::function_, Base::weights_, Base::plan_, Base::packed_, Base::gated_, Base::hidden_,
        Base::width_, Base::lanes, Base::part, Base::height, Base::matrix, Base::fetch;
    using typename Base::Right;

public:
    FfnBackwardPass(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights,
                    const Plan<>& plan, std::byte* scratch)
        : Base(device, function, weights, plan, scratch) {}

    void run(view<const T, 2> x, const FfnKept<const T>& kept, view<const T, 2> weight, view<const T, 2> dy,
             const FfnGradRows<T>& grad_rows, view<T, 2> drows, view<T, 2> dweight, const FfnWeights<T>& grads) const {
        backward_rows(kept, weight, dy, grad_rows, drows, dweight);
        weight_gradients(x, weight, dy, grad_rows, grads);
    }

private:
    [[nodiscard]] Right backward_matrix(view<std::byte, 2> panels, view<const T, 3> of, index_t e, index_t depth,
                                        index_t columns) const {
        return panels.present() ? this->template stored<T>(panels, e, depth, columns, false) : matrix(of, e, false);
    }

    /// Through `down` and the activation, then through `up` and `gate`.
    void backward_rows(const FfnKept<const T>& kept, view<const T, 2> weight, view<const T, 2> dy,
                       const FfnGradRows<T>& grad_rows, view<T, 2> drows, view<T, 2> dweight) const {
        const Tiling tiling(device_, plan_.offsets, height());
        parallel_for(device_, tiling.tiles(), [&](index_t task, int thread) {
            const RowTile tile = tiling.tile(task);
            const index_t e = tile.expert, begin = tile.begin, rows = tile.end - tile.begin;
            const auto own = part(thread);
            const auto dout = fetch(dy, begin, tile.end, own.width);
            for (index_t r = 0; r < rows; ++r) own.weight[r] = weight_of(plan_, weight, begin + r);
            std::fill_n(own.along.data, own.along.strides[0] * rows, T(0));

            typename Kernels::template BackwardOf<T> call{.function = function_};
            call.rows = rows;
            call.dout = dout.data;
            call.dout_row = dout.strides[0];
            call.weight = own.weight.data;
            call.down = backward_matrix(packed_.down_back, weights_.down, e, width_, hidden_);
            call.kept = {gated_ ? &kept.gate(begin, 0) : nullptr, &kept.up(begin, 0), kept.up.strides[0]};
            call.grad = {gated_ ? &grad_rows.gate(begin, 0) : nullptr, &grad_rows.up(begin, 0),
                         grad_rows.up.strides[0]};
            call.inner = &grad_rows.inner(begin, 0);
            call.inner_past_caches = this->past_caches(hidden_);
            call.along = own.along.data;
            call.block = own.block.data;
            call.room = own.room.data;
            Kernels::backward_hidden(call);
            add_along(e, begin, dout, own, dweight);

            typename Kernels::template ProductOf<T> product;
            product.rows = rows;
            product.c = &drows(begin, 0);
            product.c_row = drows.strides[0];
            product.room = own.room.data;
            const auto through = [&](view<std::byte, 2> panels, view<const T, 3> of, view<T, 2> from, bool add) {
                product.a = {&from(begin, 0), from.strides[0]};
                product.b = backward_matrix(panels, of, e, hidden_, width_);
                product.add = add;
                Kernels::product(product);
            };
            through(packed_.up_back, weights_.up, grad_rows.up, false);
            if (gated_) through(packed_.gate_back, weights_.gate, grad_rows.gate, true);
        });
    }

    /// dweight += <dy, output>, from its lanes and the bias that is part of the output.
    void add_along(index_t e, index_t begin, view<const T, 2> dout, const FfnScratch<T>& own,
                   view<T, 2> dweight) const {
        if (!dweight.present()) return;
        for (index_t r = 0; r < dout.extents[0]; ++r) {
            T along = Kernels::sum(own.along.data + r * lanes);
            if (weights_.down_bias.present()) along += Kernels::dot(&dout(r, 0), &weights_.down_bias(e, 0), width_);
            add_weight_gradient(plan_, dweight, begin + r, along);
        }
    }

    /// Blocks of the rows of `up` and `gate`, then of `down`, each a task that adds the rows of its expert in order.
    void weight_gradients(view<const T, 2> x, view<const T, 2> weight, view<const T, 2> dy,
                          const FfnGradRows<T>& grad_rows, const FfnWeights<T>& grads) const {
        const index_t up_blocks = blocks_of(hidden_), blocks = up_blocks + blocks_of(width_);
        parallel_for(device_, plan_.experts() * blocks, [&](index_t task, int thread) {
            const index_t e = task / blocks, block = task % blocks;
            const index_t first = plan_.offsets[e], n = plan_.offsets[e + 1] - first;
            const index_t parts = (n + gathered_rows - 1) / gathered_rows;
            const Sums sums{grads.write == Write::add, parts == 1 && out_of_caches(grads)};
            if (!sums.add) {  // what no row is added to, and what rows are added to one by one
                const bool none = n == 0;
                if (block < up_blocks)
                    clear(e, block, hidden_, none, {&grads.gate, &grads.up}, {&grads.gate_bias, &grads.up_bias});
                else
                    clear(e, block - up_blocks, width_, none, {&grads.down}, {&grads.down_bias});
            }
            for (index_t i = 0; i < parts; ++i) {
                const index_t r0 = first + n * i / parts, r1 = first + n * (i + 1) / parts;
                const Sums here{sums.add || i > 0, sums.past_caches};
                if (block < up_blocks)
                    add_up(e, block, r0, r1, x, grad_rows, grads, here, part(thread));
                else
                    add_down(e, block - up_blocks, r0, r1, weight, dy, grad_rows, grads, here, part(thread));
            }
        });
    }

    /// The rows of a weight cut into blocks as even as can be, each of whole tiles.
    [[nodiscard]] static index_t blocks_of(index_t rows) { return (rows + weight_block - 1) / weight_block; }
    [[nodiscard]] static index_t block_begin(index_t rows, index_t block) {
        constexpr index_t unit = 48;
        const index_t units = (rows + unit - 1) / unit;
        return std::min(rows, units * block / blocks_of(rows) * unit);
    }

    /// How a product goes to a gradient: added, or in its place; read again before a cache would have forgotten it.
    struct Sums {
        bool add = true, past_caches = false;
    };
    [[nodiscard]] static bool out_of_caches(const FfnWeights<T>& grads) {
        return exceeds_caches<T>(grads.gate.size() + grads.up.size() + grads.down.size());
    }

    /// Gradients of the rows of one block = 0: the biases, and `all` with the weights.
    static void clear(index_t e, index_t block, index_t rows, bool all,
                      std::initializer_list<const view<T, 3>*> weights,
                      std::initializer_list<const view<T, 2>*> biases) {
        const index_t i0 = block_begin(rows, block), i1 = block_begin(rows, block + 1);
        for (const view<T, 3>* of : weights)
            for (index_t i = i0; all && of->present() && i < i1; ++i)
                std::fill_n(&(*of)(e, i, 0), of->extents[2], T(0));
        for (const view<T, 2>* of : biases)
            if (of->present()) std::fill(&(*of)(e, i0), &(*of)(e, i0) + (i1 - i0), T(0));
    }

    void add_up(index_t e, index_t block, index_t r0, index_t r1, view<const T, 2> x, const FfnGradRows<T>& grad_rows,
                const FfnWeights<T>& grads, Sums sums, const FfnScratch<T>& own) const {
        const index_t i0 = block_begin(hidden_, block), i1 = block_begin(hidden_, block + 1);
        const auto dup = columns(view<const T, 2>(grad_rows.up.slice(r0, r1)), i0, i1);
        const auto dgate = gated_ ? columns(view<const T, 2>(grad_rows.gate.slice(r0, r1)), i0, i1) : dup;
        for_packed_columns(
            r0, r1, width_, own, [&](index_t r) { return &x(plan_.choice[r] / plan_.top_k(), 0); },
            grads.up.present() || (gated_ && grads.gate.present()),
            [&](index_t j0, index_t n) {
                if (grads.up.present()) add_product(dup, grads.up[e], i0, i1, j0, n, sums, own);
                if (gated_ && grads.gate.present()) add_product(dgate, grads.gate[e], i0, i1, j0, n, sums, own);
            });
        add_rows<T>(dup, grads.up_bias, e, i0);
        if (gated_) add_rows<T>(dgate, grads.gate_bias, e, i0);
    }

    void add_down(index_t e, index_t block, index_t r0, index_t r1, view<const T, 2> weight, view<const T, 2> dy,
                  const FfnGradRows<T>& grad_rows, const FfnWeights<T>& grads, Sums sums,
                  const FfnScratch<T>& own) const {
        const index_t i0 = block_begin(width_, block), i1 = block_begin(width_, block + 1);
        const auto dout = gather(plan_, columns(dy, i0, i1), r0, r1, own.width);
        for_packed_columns(
            r0, r1, hidden_, own, [&](index_t r) { return &grad_rows.inner(r, 0); }, grads.down.present(),
            [&](index_t j0, index_t n) { add_product(dout, grads.down[e], i0, i1, j0, n, sums, own); });
        if (grads.down_bias.present())
            for (index_t r = 0; r < r1 - r0; ++r)
                for (index_t i = i0; i < i1; ++i)
                    grads.down_bias(e, i) += weight_of(plan_, weight, r0 + r) * dout(r, i - i0);
    }

    /// Rows [r0, r1) of a matrix of n columns into panels, as many columns at once as there is room for; then
    /// body(first column, columns).
    template <class Row, class Body>
    void for_packed_columns(index_t r0, index_t r1, index_t n, const FfnScratch<T>& own, Row&& row, bool wanted,
                            Body&& body) const {
        constexpr index_t width = Kernels::template panel_columns<T>;
        const index_t rows = r1 - r0, step = std::max<index_t>(1, own.room.extents[0] / (rows * width)) * width;
        for (index_t j0 = 0; j0 < n && wanted; j0 += step) {
            const index_t here = std::min(step, n - j0);
            for (index_t r = r0; r < r1; ++r)
                Kernels::to_panels(row(r) + j0, here, own.room.data + (r - r0) * width, rows * width);
            body(j0, here);
        }
    }

    /// grad[i0..i1][j0..j0+n] (= or +=) left^T (the panels)
    void add_product(view<const T, 2> left, view<T, 2> grad, index_t i0, index_t i1, index_t j0, index_t n, Sums sums,
                     const FfnScratch<T>& own) const {
        typename Kernels::template OuterProductOf<T> product;
        product.rows = left.extents[0];
        product.left = left.data;
        product.left_row = left.strides[0];
        product.m = i1 - i0;
        product.right = own.room.data;
        product.n = n;
        product.out = &grad(i0, j0);
        product.out_row = grad.strides[0];
        product.add = sums.add;
        product.past_caches = sums.past_caches;
        product.slab = own.slab.data;
        Kernels::outer_product(product);
    }
};

}  // namespace steelyard::cpu::detail::expert
