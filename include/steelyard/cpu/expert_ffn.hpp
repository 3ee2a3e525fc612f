// Grouped feed-forward networks on the CPU.
#pragma once

#include "steelyard/cpu/expert_rows.hpp"
#include "steelyard/cpu/packed_ffn.hpp"

namespace steelyard::cpu {

namespace detail::expert {

/// Columns of the hidden layer that forward computes before it goes on into `down`: with the rows of a tile they stay in
/// the second-level cache.
inline constexpr index_t hidden_block = 512;
/// Elements between the end of a gathered row and the next: rows at a power of two would share few sets of the cache.
template <class T>
inline constexpr index_t row_gap = 64 / static_cast<index_t>(sizeof(T));
/// Elements of the panels that a weight gradient reads over and over: three quarters of a second-level cache.
template <class T>
inline constexpr index_t gathered_panels = index_t{768} * 1024 / static_cast<index_t>(sizeof(T));
/// Activations of more bytes than this are out of every cache before backward reads them.
inline constexpr index_t past_caches_bytes = index_t{16} << 20;
/// Most rows of a call whose work is cut by columns, for there are too few experts to keep the threads busy.
inline constexpr index_t split_rows = 256;

/// One thread's part of the scratch.
template <class T>
struct FfnScratch {
    view<T, 2> width;   // [gathered_rows, d]  rows of x or dy
    view<T, 2> hidden;  // [tile_rows, hidden_block]
    view<T, 2> block;   // [tile_rows, columns of a panel]
    view<T, 2> along;   // [tile_rows, lanes]
    view<T, 1> weight;  // [tile_rows]
    view<T, 1> slab;    // for the rows of a weight gradient
    view<T, 1> room;    // for panels

    template <class Field>
    void fields(Field&& field, index_t d, index_t h) {
        const index_t widest = (std::max(d, h) + 63) / 64 * 64;  // whole panels
        field("width", width, gathered_rows, d + row_gap<T>);
        field("hidden", hidden, tile_rows, std::min(hidden_block, widest) + row_gap<T>);
        field("block", block, tile_rows, 2 * row_gap<T>);
        field("along", along, tile_rows, row_gap<T>);
        field("weight", weight, tile_rows);
        field("slab", slab, gathered_rows * 16);
        field("room", room, std::min(std::max(widest_pack_room<T>, gathered_panels<T>),
                                     std::max(widest, gathered_rows) * widest));
    }
};

/// The scratch of a call.
template <class T>
struct FfnCallScratch {
    view<T, 2> inner;           // [split_rows, h]
    view<std::byte, 1> threads;

    template <class Field>
    void fields(Field&& field, index_t threads_count, index_t d, index_t h) {
        field("inner", inner, split_rows, (h + 63) / 64 * 64 + row_gap<T>);
        field("threads", threads, threads_count * bytes_of<FfnScratch<T>>(d, h));
    }
};

/// One call on the kernels of one instruction set.
template <class Kernels, class T>
class FfnPass {
public:
    FfnPass(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights, const Plan<>& plan,
            std::byte* scratch)
        : device_(device), function_(function), weights_(weights), plan_(plan), packed_(packed_ffn(weights.packed)),
          gated_(packed_.header.present() ? packed_.header[0].gated != 0 : weights.gate.present()),
          hidden_(packed_.header.present() ? packed_.header[0].hidden : weights.up.extents[1]),
          width_(packed_.header.present() ? packed_.header[0].width : weights.up.extents[2]),
          scratch_(place<FfnCallScratch<T>>(scratch, index_t{std::max(device.threads, 1)}, width_, hidden_)) {}

    void forward(view<const T, 2> x, const FfnKept<T>& kept, view<T, 2> rows) const {
        const Tiling tiling(device_, plan_.offsets, height());
        const index_t first = plan_.offsets[0], n = plan_.offsets[plan_.experts()] - first;
        if (device_.threads > 1 && rows.present() && n <= split_rows && tiling.tiles() < 4 * device_.threads)
            return forward_by_columns(tiling, x, kept, rows);
        parallel_for(device_, tiling.tiles(), [&](index_t task, int thread) {
            const RowTile tile = tiling.tile(task);
            const auto own = part(thread);
            auto call = forward_call(tile, x, kept, rows, own);
            call.inner = own.hidden.data;
            call.inner_row = own.hidden.strides[0];
            const index_t columns = call.hidden.panel_columns(), step = hidden_block / columns;
            if (!rows.present()) call.inner = nullptr;
            for (index_t q = 0; q < call.hidden.panels(); q += step) {
                const index_t end = std::min(q + step, call.hidden.panels());
                Kernels::hidden(call, q, end);
                if (rows.present())
                    Kernels::output(call, 0, call.down.panels(), q * columns, std::min(hidden_, end * columns));
            }
        });
    }

    /// The panels of all experts, from their matrices.
    static void pack(const Cpu& device, const FfnWeights<const T>& weights, const PackedFfn& packed) {
        parallel_for(device, packed.header[0].experts, [&](index_t e, int) {
            const auto write = [](const Right& right, std::byte* to) {
                right.pack(0, right.panels(), 0, right.depth, reinterpret_cast<T*>(to));
            };
            write(hidden_matrix(weights, e), packed.hidden[e].data);
            write(matrix(weights.down, e, true), packed.down[e].data);
            if (!packed.down_back.present()) return;
            write(matrix(weights.down, e, false), packed.down_back[e].data);
            write(matrix(weights.up, e, false), packed.up_back[e].data);
            if (packed.gate_back.present()) write(matrix(weights.gate, e, false), packed.gate_back[e].data);
        });
    }

    void backward(view<const T, 2> x, const FfnKept<const T>& kept, view<const T, 2> weight, view<const T, 2> dy,
                  const FfnGradRows<T>& grad_rows, view<T, 2> drows, view<T, 2> dweight,
                  const FfnWeights<T>& grads) const {
        backward_rows(kept, weight, dy, grad_rows, drows, dweight);
        weight_gradients(x, weight, dy, grad_rows, grads);
    }

private:
    using Right = typename Kernels::template RightOf<T>;
    using Forward = typename Kernels::template ForwardOf<T>;
    static constexpr index_t lanes = Kernels::template lanes<T>;

    [[nodiscard]] FfnScratch<T> part(int thread) const {
        return place<FfnScratch<T>>(scratch_.threads.data + thread * bytes_of<FfnScratch<T>>(width_, hidden_), width_, hidden_);
    }
    /// Rows of a tile: they, their part of the hidden layer and their output share the second-level cache.
    [[nodiscard]] index_t height() const {
        constexpr index_t elements = (1 << 21) / static_cast<index_t>(sizeof(T)) / 2;
        return std::clamp<index_t>(elements / (2 * width_ + hidden_block), 48, tile_rows);
    }

    [[nodiscard]] static Right stored(view<std::byte, 2> panels, index_t e, index_t depth, index_t columns) {
        Right right;
        right.depth = depth;
        right.columns = columns;
        right.stored = reinterpret_cast<const T*>(panels[e].data);
        return right;
    }
    [[nodiscard]] static Right matrix(view<const T, 3> of, index_t e, bool transposed) {
        Right right;
        right.depth = of.extents[transposed ? 2 : 1];
        right.columns = of.extents[transposed ? 1 : 2];
        right.from[0] = of[e].data;
        right.stride = of.strides[1];
        right.transposed = transposed;
        return right;
    }

    [[nodiscard]] static Right backward_matrix(view<std::byte, 2> panels, view<const T, 3> of, index_t e, index_t depth,
                                               index_t columns) {
        return panels.present() ? stored(panels, e, depth, columns) : matrix(of, e, false);
    }

    /// Gate and up side by side, or up alone.
    [[nodiscard]] static Right hidden_matrix(const FfnWeights<const T>& weights, index_t e) {
        Right right = matrix(weights.up, e, true);
        if (!weights.gate.present()) return right;
        right.paired = true;
        right.from[1] = right.from[0];
        right.from[0] = weights.gate[e].data;
        return right;
    }

    /// Rows [begin, end) of x or dy: one in place, several side by side.
    [[nodiscard]] view<const T, 2> fetch(view<const T, 2> from, index_t begin, index_t end, view<T, 2> panel) const {
        if (end - begin == 1) return from.slice(plan_.choice[begin] / plan_.top_k(), plan_.choice[begin] / plan_.top_k() + 1);
        return gather(plan_, from, begin, end, panel);
    }

    [[nodiscard]] Forward forward_call(const RowTile& tile, view<const T, 2> x, const FfnKept<T>& kept, view<T, 2> rows,
                                       const FfnScratch<T>& own) const {
        const index_t e = tile.expert;
        const auto input = fetch(x, tile.begin, tile.end, own.width);
        const auto bias = [e](view<const T, 2> of) { return of.present() ? of[e].data : nullptr; };
        Forward call{.function = function_};
        call.rows = tile.end - tile.begin;
        call.x = input.data;
        call.x_row = input.strides[0];
        if (packed_.header.present()) {
            call.hidden = stored(packed_.hidden, e, width_, hidden_);
            call.hidden.paired = gated_;
            call.down = stored(packed_.down, e, hidden_, width_);
        } else {
            call.hidden = hidden_matrix(weights_, e);
            call.down = matrix(weights_.down, e, true);
        }
        call.gate_bias = bias(weights_.gate_bias);
        call.up_bias = bias(weights_.up_bias);
        call.down_bias = bias(weights_.down_bias);
        if (kept.up.present())
            call.kept = {gated_ ? &kept.gate(tile.begin, 0) : nullptr, &kept.up(tile.begin, 0), kept.up.strides[0]};
        call.kept_past_caches = (plan_.offsets[plan_.experts()] - plan_.offsets[0]) * hidden_ * index_t{sizeof(T)} >
                                past_caches_bytes;
        if (rows.present()) {
            call.out = &rows(tile.begin, 0);
            call.out_row = rows.strides[0];
        }
        call.block = own.block.data;
        call.room = own.room.data;
        return call;
    }

    /// The hidden layer of all rows, a few columns a task, then their outputs.
    void forward_by_columns(const Tiling& tiling, view<const T, 2> x, const FfnKept<T>& kept, view<T, 2> rows) const {
        const index_t first = plan_.offsets[0], tiles = tiling.tiles();
        // Calls body(call, first panel, last panel) on every tile, cut to a dozen tasks for each thread.
        const auto each = [&](Right Forward::* operand, auto&& body) {
            const index_t parts = std::max<index_t>(1, 12 * device_.threads / std::max<index_t>(1, tiles));
            parallel_for(device_, tiles * parts, [&](index_t task, int thread) {
                const RowTile tile = tiling.tile(task / parts);
                Forward call = forward_call(tile, x, kept, rows, part(thread));
                call.inner = &scratch_.inner(tile.begin - first, 0);
                call.inner_row = scratch_.inner.strides[0];
                const index_t panels = (call.*operand).panels(), at = task % parts;
                const index_t q0 = panels * at / parts, q1 = panels * (at + 1) / parts;
                if (q0 < q1) body(call, q0, q1);
            });
        };
        each(&Forward::hidden, [](Forward& call, index_t q0, index_t q1) {
            call.inner += q0 * call.hidden.panel_columns();
            Kernels::hidden(call, q0, q1);
        });
        each(&Forward::down,
             [&](const Forward& call, index_t q0, index_t q1) { Kernels::output(call, q0, q1, 0, hidden_); });
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
                product.a = &from(begin, 0);
                product.a_row = from.strides[0];
                product.b = backward_matrix(panels, of, e, hidden_, width_);
                product.add = add;
                Kernels::product(product);
            };
            through(packed_.up_back, weights_.up, grad_rows.up, false);
            if (gated_) through(packed_.gate_back, weights_.gate, grad_rows.gate, true);
        });
    }

    /// dweight += <dy, output>, from its lanes and the bias that is part of the output.
    void add_along(index_t e, index_t begin, view<const T, 2> dout, const FfnScratch<T>& own, view<T, 2> dweight) const {
        if (!dweight.present()) return;
        for (index_t r = 0; r < dout.extents[0]; ++r) {
            T along = Kernels::sum(own.along.data + r * lanes);
            if (weights_.down_bias.present())
                along += Kernels::dot(&dout(r, 0), &weights_.down_bias(e, 0), width_);
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
            for (index_t i = 0; i < parts; ++i) {
                const index_t r0 = first + n * i / parts, r1 = first + n * (i + 1) / parts;
                if (block < up_blocks)
                    add_up(e, block, r0, r1, x, grad_rows, grads, part(thread));
                else
                    add_down(e, block - up_blocks, r0, r1, weight, dy, grad_rows, grads, part(thread));
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

    void add_up(index_t e, index_t block, index_t r0, index_t r1, view<const T, 2> x, const FfnGradRows<T>& grad_rows,
                const FfnWeights<T>& grads, const FfnScratch<T>& own) const {
        const index_t i0 = block_begin(hidden_, block), i1 = block_begin(hidden_, block + 1);
        const auto dup = columns(view<const T, 2>(grad_rows.up.slice(r0, r1)), i0, i1);
        const auto dgate = gated_ ? columns(view<const T, 2>(grad_rows.gate.slice(r0, r1)), i0, i1) : dup;
        for_panels(r0, r1, width_, own, [&](index_t r) { return &x(plan_.choice[r] / plan_.top_k(), 0); },
                   grads.up.present() || (gated_ && grads.gate.present()), [&](index_t j0, index_t n) {
                       if (grads.up.present()) add_product(dup, grads.up[e], i0, i1, j0, n, own);
                       if (gated_ && grads.gate.present()) add_product(dgate, grads.gate[e], i0, i1, j0, n, own);
                   });
        add_rows<T>(dup, grads.up_bias, e, i0);
        if (gated_) add_rows<T>(dgate, grads.gate_bias, e, i0);
    }

    void add_down(index_t e, index_t block, index_t r0, index_t r1, view<const T, 2> weight, view<const T, 2> dy,
                  const FfnGradRows<T>& grad_rows, const FfnWeights<T>& grads, const FfnScratch<T>& own) const {
        const index_t i0 = block_begin(width_, block), i1 = block_begin(width_, block + 1);
        const auto dout = gather(plan_, columns(dy, i0, i1), r0, r1, own.width);
        for_panels(r0, r1, hidden_, own, [&](index_t r) { return &grad_rows.inner(r, 0); }, grads.down.present(),
                   [&](index_t j0, index_t n) { add_product(dout, grads.down[e], i0, i1, j0, n, own); });
        if (grads.down_bias.present())
            for (index_t r = 0; r < r1 - r0; ++r)
                for (index_t i = i0; i < i1; ++i)
                    grads.down_bias(e, i) += weight_of(plan_, weight, r0 + r) * dout(r, i - i0);
    }

    /// Rows [r0, r1) of a matrix of n columns into panels, as many columns at once as there is room for; then
    /// body(first column, columns).
    template <class Row, class Body>
    void for_panels(index_t r0, index_t r1, index_t n, const FfnScratch<T>& own, Row&& row, bool wanted,
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

    /// grad[i0..i1][j0..j0+n] += left^T (the panels)
    void add_product(view<const T, 2> left, view<T, 2> grad, index_t i0, index_t i1, index_t j0, index_t n,
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
        product.slab = own.slab.data;
        Kernels::outer_product(product);
    }

    const Cpu& device_;
    const FfnFunction& function_;
    const FfnWeights<const T>& weights_;
    const Plan<>& plan_;
    PackedFfn packed_;
    bool gated_;
    index_t hidden_, width_;
    FfnCallScratch<T> scratch_;
};

}  // namespace detail::expert

/// The ffn kernels of ops/expert_ops.hpp. Scratch: for each thread, 400 rows of width d and half a megabyte for panels;
/// and 256 rows of width h.
struct FfnKernels {
    template <class T>
    [[nodiscard]] static index_t scratch_bytes(const Cpu& device, index_t width, index_t hidden) {
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
        const PackedHeader header = header_of<T>(device, format, purpose, weights.up.extents[0],
                                                 weights.up.extents[2], weights.up.extents[1], weights.gate.present());
        const auto to = place<PackedFfn>(packed, header);
        to.header[0] = header;
        with_kernels(device.isa,
                     [&](auto kernels) { detail::expert::FfnPass<decltype(kernels), T>::pack(device, weights, to); });
    }

    template <class T>
    [[nodiscard]] static Status ffn_check_packed(const Cpu& device, std::string_view stage,
                                                 view<const std::byte, 1> packed, index_t experts, index_t width,
                                                 index_t hidden, bool gated) {
        return check_packed(stage, packed, header_of<T>(device, PackedFormat::full, PackedFor::inference, experts, width,
                                                        hidden, gated));
    }

    template <class T>
    static void ffn_forward(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights,
                            view<const T, 2> x,      // [T, d]
                            const Plan<>& plan,      //
                            const FfnKept<T>& kept,  // [N, h] (=)
                            view<T, 2> rows,         // [N, d] (=), or absent
                            std::byte* scratch) {
        with_kernels(device.isa, [&](auto kernels) {
            using Pass = detail::expert::FfnPass<decltype(kernels), T>;
            Pass(device, function, weights, plan, scratch).forward(x, kept, rows);
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
                             const FfnWeights<T>& grads,       // (+=), absent members are skipped
                             std::byte* scratch) {
        with_kernels(device.isa, [&](auto kernels) {
            using Pass = detail::expert::FfnPass<decltype(kernels), T>;
            Pass(device, function, weights, plan, scratch)
                .backward(x, kept, weight, dy, grad_rows, drows, dweight, grads);
        });
    }

private:
    template <class T>
    [[nodiscard]] static PackedHeader header_of(const Cpu& device, PackedFormat format, PackedFor purpose, index_t experts,
                                                index_t width, index_t hidden, bool gated) {
        const index_t panel =
            with_kernels(device.isa, [](auto kernels) { return decltype(kernels)::template panel_columns<T>; });
        return {PackedHeader::expected_magic, static_cast<std::int64_t>(format), sizeof(T), panel, experts, width,
                hidden, gated ? 1 : 0, purpose == PackedFor::training ? 1 : 0};
    }
};

}  // namespace steelyard::cpu
