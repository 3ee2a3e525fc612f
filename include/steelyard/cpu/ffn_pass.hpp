// What forward and backward of feed-forward experts on the CPU have in common: scratch, operands, gathered rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "steelyard/cpu/expert_rows.hpp"
#include "steelyard/cpu/packed_ffn.hpp"

namespace steelyard::cpu::detail::expert {

/// Columns of the hidden layer that forward computes before it goes on into `down`: with the rows of a tile they stay
/// in the second-level cache.
inline constexpr index_t hidden_block = 512;
/// Elements between the end of a gathered row and the next: rows at a power of two would share few sets of the cache.
template <class T>
inline constexpr index_t row_gap = 64 / static_cast<index_t>(sizeof(T));
/// Elements of the panels that a weight gradient reads over and over.
template <class T>
inline constexpr index_t gathered_panels = gathered_panels_bytes / static_cast<index_t>(sizeof(T));
/// Most rows of a call whose work is cut by columns, for there are too few experts to keep the threads busy.
inline constexpr index_t split_rows = 256;

/// Columns with those that fill up the last panel, whatever the instruction set.
[[nodiscard]] constexpr index_t whole_panels(index_t columns) { return (columns + 63) / 64 * 64; }

/// One thread's part of the scratch.
template <class T>
struct FfnScratch {
    view<T, 2> width;   // [gathered_rows, d]  rows of x or dy, as they are or in the format of a product
    view<T, 2> hidden;  // [tile_rows, hidden_block]
    view<T, 2> block;   // [tile_rows, at most finished_row_bytes of columns]
    view<T, 2> along;   // [tile_rows, lanes]
    view<T, 1> weight;  // [tile_rows]
    view<T, 1> slab;    // for the rows of a weight gradient
    view<T, 1> room;    // for panels

    template <class Field>
    void fields(Field&& field, index_t d, index_t h) {
        const index_t widest = whole_panels(std::max(d, h));
        field("width", width, gathered_rows, whole_panels(d) + row_gap<T>);
        field("hidden", hidden, tile_rows, std::min(hidden_block, widest) + row_gap<T>);
        field("block", block, tile_rows, std::min(finished_row_bytes / index_t{sizeof(T)}, whole_panels(2 * h)));
        field("along", along, tile_rows, row_gap<T>);
        field("weight", weight, tile_rows);
        field("slab", slab, gathered_rows * 16);
        field("room", room,
              std::min(std::max(widest_pack_room<T>, gathered_panels<T>), std::max(widest, gathered_rows) * widest));
    }
};

/// The scratch of a call.
template <class T>
struct FfnCallScratch {
    view<T, 2> inner;  // [split_rows, h]
    view<std::byte, 1> threads;

    template <class Field>
    void fields(Field&& field, index_t threads_count, index_t d, index_t h) {
        field("inner", inner, split_rows, whole_panels(h) + row_gap<T>);
        field("threads", threads, threads_count * bytes_of<FfnScratch<T>>(d, h));
    }
};

/// One call on the kernels of one instruction set.
template <class Kernels, class T>
class FfnPass {
protected:
    using Right = typename Kernels::template RightOf<T>;
    static constexpr index_t lanes = Kernels::template lanes<T>;

    FfnPass(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights, const Plan<>& plan,
            std::byte* scratch)
        : device_(device),
          function_(function),
          weights_(weights),
          plan_(plan),
          packed_(packed_ffn(weights.packed)),
          gated_(packed_.header.present() ? packed_.header[0].gated != 0 : weights.gate.present()),
          hidden_(packed_.header.present() ? packed_.header[0].hidden : weights.up.extents[1]),
          width_(packed_.header.present() ? packed_.header[0].width : weights.up.extents[2]),
          scratch_(place<FfnCallScratch<T>>(scratch, index_t{std::max(device.threads, 1)}, width_, hidden_)) {}

    [[nodiscard]] FfnScratch<T> part(int thread) const {
        return place<FfnScratch<T>>(scratch_.threads.data + thread * bytes_of<FfnScratch<T>>(width_, hidden_), width_,
                                    hidden_);
    }
    /// Rows of a tile: what is gathered of them and their output share the second-level cache, and the weights are read
    /// once for all of them.
    [[nodiscard]] index_t height() const {
        return std::clamp<index_t>(tile_rows_bytes / static_cast<index_t>(sizeof(T)) / (2 * width_), 48, tile_rows);
    }

    /// Whether all rows of `columns` columns are more than caches hold.
    [[nodiscard]] bool past_caches(index_t columns) const {
        return exceeds_caches<T>((plan_.offsets[plan_.experts()] - plan_.offsets[0]) * columns);
    }

    /// Panels of an operand that lie ready in a block, of the layer's elements or of another format.
    template <class F>
    [[nodiscard]] auto stored(view<std::byte, 2> panels, index_t e, index_t depth, index_t columns, bool paired) const {
        using Stored = typename Kernels::template RightOf<F>;
        Stored right;
        right.depth = depth;
        right.columns = columns;
        right.paired = paired;
        right.stored = reinterpret_cast<const typename Stored::word*>(panels[e].data);
        if constexpr (std::is_same_v<F, std::int8_t>)
            right.scales = reinterpret_cast<const float*>(right.stored + right.panels() * right.words() *
                                                                             Kernels::template panel_columns<F>);
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
        if (end - begin == 1)
            return from.slice(plan_.choice[begin] / plan_.top_k(), plan_.choice[begin] / plan_.top_k() + 1);
        return gather(plan_, from, begin, end, panel);
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

}  // namespace steelyard::cpu::detail::expert
