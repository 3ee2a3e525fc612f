// Rows of experts on the CPU: tiles of them, gathered from tokens, through a product, along lanes.
//
// Forward and the first half of backward work on tiles of one expert's rows; weight gradients work on blocks of one
// expert's weight rows, each of which adds its expert's tokens in order. No two tasks write the same element, and the
// products do not depend on the tile a row is in (gemm.hpp), so the number of threads changes no bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/parallel.hpp"

namespace steelyard::cpu::detail::expert {

/// Most rows of a tile.
inline constexpr index_t tile_rows = 288;
/// Most rows that the weight gradients gather and add at a time.
inline constexpr index_t gathered_rows = 384;
/// Rows of a weight that one task of the weight gradients owns: its other operand is packed once for all of them.
inline constexpr index_t weight_block = 528;

/// Rows [begin, end) of the grouped order, all of one expert.
struct RowTile {
    index_t expert = 0, begin = 0, end = 0;
};

/// The grouped rows cut into tiles that never span two experts. Where there are several threads they get smaller
/// towards the end, a share of the rows that are left, so that no thread waits long for the last one.
struct Tiling {
    view<index_t, 1> offsets;  // [E + 1]
    index_t most;              // rows of a tile
    index_t shares;            // a tile is one of so many of what is left

    Tiling(const Cpu& device, view<index_t, 1> plan_offsets, index_t most_rows = tile_rows)
        : offsets(plan_offsets), most(most_rows), shares(device.threads > 1 ? index_t{8} * device.threads : 1) {}

    [[nodiscard]] index_t tiles() const {
        index_t n = 0;
        for (index_t e = 0; e + 1 < offsets.extents[0]; ++e) n += tiles_of(e);
        return n;
    }
    [[nodiscard]] RowTile tile(index_t index) const {
        for (index_t e = 0;; ++e) {
            const index_t rows = offsets[e + 1] - offsets[e], here = tiles_of(e);
            if (index < here)  // of even height: the last one would be the least efficient otherwise
                return {e, offsets[e] + rows * index / here, offsets[e] + rows * (index + 1) / here};
            index -= here;
        }
    }

private:
    static constexpr index_t least = 48;  // rows, of fewer the weights would be read too often

    [[nodiscard]] index_t tiles_of(index_t e) const {
        const index_t rows = offsets[e + 1] - offsets[e];
        if (rows == 0) return 0;  // most experts, where there are few tokens: divisions are slow
        const index_t left = offsets[offsets.extents[0] - 1] - offsets[e];
        const index_t height = std::min(most, std::max(least, left / shares));
        return (rows + height - 1) / height;
    }
};

/// Columns [begin, end) of a matrix.
template <class T>
view<T, 2> columns(view<T, 2> matrix, index_t begin, index_t end) {
    matrix.data += begin * matrix.strides[1];
    matrix.extents[1] = end - begin;
    return matrix;
}

/// Calls body(r, the row of r's token) for rows [begin, end) of the plan. They lie anywhere, so the next one is fetched
/// meanwhile.
template <class T, class Body>
void for_gathered(const Plan<>& plan, view<const T, 2> from, index_t begin, index_t end, Body&& body) {
    constexpr index_t line = 64 / index_t{sizeof(T)};
    const index_t top_k = plan.top_k(), width = from.extents[1];
    const T* next = begin < end ? &from(plan.choice[begin] / top_k, 0) : nullptr;
    for (index_t r = begin; r < end; ++r) {
        const T* const row = next;
        if (r + 1 < end) {
            next = &from(plan.choice[r + 1] / top_k, 0);
            for (index_t j = 0; j < width; j += line) __builtin_prefetch(next + j);
        }
        body(r, row);
    }
}

/// panel[r - begin] = from[token of row r], for rows [begin, end) of the plan. Returns the panel's part that was
/// written.
template <class T>
view<const T, 2> gather(const Plan<>& plan, view<const T, 2> from, index_t begin, index_t end, view<T, 2> panel) {
    const index_t width = from.extents[1];
    view<T, 2> rows(panel.data, end - begin, width);
    rows.strides[0] = panel.strides[0];
    for_gathered(plan, from, begin, end, [&](index_t r, const T* row) {
        std::memcpy(&rows(r - begin, 0), row, static_cast<std::size_t>(width) * sizeof(T));
    });
    return rows;
}

/// bias[expert][begin + i] += sum over rows of rows[r][i], in order; an absent bias is skipped.
template <class T>
void add_rows(view<const T, 2> rows, view<T, 2> bias, index_t expert, index_t begin) {
    if (!bias.present()) return;
    for (index_t r = 0; r < rows.extents[0]; ++r)
        for (index_t i = 0; i < rows.extents[1]; ++i) bias(expert, begin + i) += rows(r, i);
}

/// The combine weight of a row: 1 where weights are absent.
template <class T>
T weight_of(const Plan<>& plan, view<const T, 2> weight, index_t row) {
    const index_t choice = plan.choice[row], k = plan.top_k();
    return weight.present() ? weight(choice / k, choice % k) : T(1);
}

/// The gradient of a row's combine weight: += along.
template <class T>
void add_weight_gradient(const Plan<>& plan, view<T, 2> dweight, index_t row, T along) {
    if (dweight.present()) dweight(plan.choice[row] / plan.top_k(), plan.choice[row] % plan.top_k()) += along;
}

}  // namespace steelyard::cpu::detail::expert
