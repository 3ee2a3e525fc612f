// Vectors and routings of packed sequences, on the CPU; and rows of a table by id.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/gating_rows.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/lowest_index.hpp"
#include "steelyard/ops/gating_ops.hpp"

namespace steelyard {

template <>
struct pool_ops<Cpu> {
    template <class T>
    static void pool(const Cpu& device, view<const T, 2> x, const TokenInfo<>& tokens, view<T, 2> pooled,
                     view<index_t, 1> count, view<std::uint8_t, 1> valid) {
        sum_rows<T>(device, x, tokens, pooled);
        for (index_t s = 0; s < pooled.extents[0]; ++s) {
            const auto [begin, end] = bounds(tokens, s, x.extents[0]);
            count[s] = 0;
            for (index_t t = begin; t < end; ++t) count[s] += cpu::detail::valid_token(tokens.mask, t) ? 1 : 0;
            valid[s] = count[s] > 0;
            const T inverse = T(1) / static_cast<T>(std::max<index_t>(1, count[s]));
            for (index_t j = 0; j < pooled.extents[1]; ++j) pooled(s, j) *= inverse;
        }
    }

    template <class T>
    static void spread(const Cpu& device, const TokenInfo<>& tokens, const Routing<T>& of_sequence,
                       const Routing<T>& routing) {
        cpu::detail::each_row(device, routing.logits.extents[0], [&](index_t t, int) {
            const bool valid = cpu::detail::valid_token(tokens.mask, t);
            const index_t s = valid ? sequence_of(tokens, t) : 0;
            copy_row(of_sequence.logits, s, routing.logits, t, valid, T(0));
            copy_row(of_sequence.probs, s, routing.probs, t, valid, T(0));
            copy_row(of_sequence.expert, s, routing.expert, t, valid, expert_t{-1});
            copy_row(of_sequence.weight, s, routing.weight, t, valid, T(0));
            if (routing.smooth_load.size() != 0)
                copy_row(of_sequence.smooth_load, s, routing.smooth_load, t, valid, T(0));
        });
    }

    template <class T>
    static void gather(const Cpu&, const TokenInfo<>& tokens, const Routing<T>& routing,
                       const Routing<T>& of_sequence) {
        for (index_t s = 0; s < of_sequence.logits.extents[0]; ++s) {
            auto [t, end] = bounds(tokens, s, routing.logits.extents[0]);
            while (t < end && !cpu::detail::valid_token(tokens.mask, t)) ++t;
            const bool any = t < end;
            const index_t from = any ? t : 0;
            copy_row(routing.logits, from, of_sequence.logits, s, any, T(0));
            copy_row(routing.probs, from, of_sequence.probs, s, any, T(0));
            copy_row(routing.expert, from, of_sequence.expert, s, any, expert_t{-1});
            copy_row(routing.weight, from, of_sequence.weight, s, any, T(0));
            if (routing.smooth_load.size() != 0)
                copy_row(routing.smooth_load, from, of_sequence.smooth_load, s, any, T(0));
        }
    }

    template <class T>
    static void sum_gradient(const Cpu& device, const TokenInfo<>& tokens, const RoutingGrad<T>& grad,
                             const RoutingGrad<T>& of_sequence) {
        sum_rows<T>(device, grad.logits, tokens, of_sequence.logits);
        sum_rows<T>(device, grad.weight, tokens, of_sequence.weight);
        sum_rows<T>(device, grad.probs, tokens, of_sequence.probs);
        if (of_sequence.smooth_load.size() != 0) sum_rows<T>(device, grad.smooth_load, tokens, of_sequence.smooth_load);
    }

    template <class T>
    static void spread_gradient(const Cpu& device, const TokenInfo<>& tokens, view<const index_t, 1> count,
                                view<const T, 2> dpooled, view<T, 2> dx) {
        cpu::detail::each_row(device, dx.extents[0], [&](index_t t, int) {
            if (!cpu::detail::valid_token(tokens.mask, t)) return;
            const index_t s = sequence_of(tokens, t);
            const T inverse = T(1) / static_cast<T>(count[s]);
            for (index_t j = 0; j < dx.extents[1]; ++j) dx(t, j) += dpooled(s, j) * inverse;
        });
    }

    template <class T>
    static void clear(const Cpu&, view<T, 2> tensor) {
        for (index_t s = 0; s < tensor.extents[0]; ++s) std::fill_n(tensor[s].data, tensor.extents[1], T(0));
    }

private:
    static constexpr index_t columns = 64;  // that one task sums

    struct Bounds {
        index_t begin, end;
    };
    static Bounds bounds(const TokenInfo<>& tokens, index_t s, index_t count) {
        if (!tokens.sequences.present()) return {0, count};
        return {tokens.sequences[s], tokens.sequences[s + 1]};
    }
    static index_t sequence_of(const TokenInfo<>& tokens, index_t t) {
        if (!tokens.sequences.present()) return 0;
        const index_t* const first = tokens.sequences.data;
        return std::upper_bound(first, first + tokens.sequences.extents[0], t) - first - 1;
    }

    template <class V>
    static void copy_row(const view<V, 2>& from, index_t i, const view<V, 2>& to, index_t j, bool there, V otherwise) {
        V* const out = to[j].data;
        if (there)
            std::copy_n(from[i].data, to.extents[1], out);
        else
            std::fill_n(out, to.extents[1], otherwise);
    }

    /// sums [S, n] (=) the valid rows of each sequence, in ascending order, in double. Absent rows are zeros.
    template <class T>
    static void sum_rows(const Cpu& device, view<const T, 2> rows, const TokenInfo<>& tokens, view<T, 2> sums) {
        const index_t width = sums.extents[1], cuts = (width + columns - 1) / columns;
        cpu::parallel_for(device, sums.extents[0] * cuts, [&](index_t task, int) {
            const index_t s = task / cuts, first = task % cuts * columns, last = std::min(width, first + columns);
            double sum[columns] = {};
            const auto [begin, end] = rows.size() != 0 ? bounds(tokens, s, rows.extents[0]) : Bounds{0, 0};
            for (index_t t = begin; t < end; ++t)
                if (cpu::detail::valid_token(tokens.mask, t))
                    for (index_t j = first; j < last; ++j) sum[j - first] += static_cast<double>(rows(t, j));
            for (index_t j = first; j < last; ++j) sums(s, j) = static_cast<T>(sum[j - first]);
        });
    }
};

template <>
struct table_ops<Cpu> {
    template <class T>
    static index_t lookup(const Cpu& device, view<const std::int32_t, 1> ids, view<const std::uint8_t, 1> mask,
                          view<const T, 2> table, view<T, 2> logits) {
        const index_t tokens = logits.extents[0], experts = logits.extents[1];
        cpu::LowestIndex first_bad;
        cpu::detail::each_row(device, tokens, [&](index_t t, int) {
            T* const out = logits[t].data;
            const bool valid = cpu::detail::valid_token(mask, t);
            if (valid && ids[t] >= 0 && ids[t] < table.extents[0])
                return std::copy_n(table[ids[t]].data, experts, out), void();
            std::fill_n(out, experts, T(0));
            if (valid) first_bad.report(t);
        });
        return first_bad.get();
    }

    template <class T>
    static void lookup_backward(const Cpu& device, view<const std::int32_t, 1> ids, view<const std::uint8_t, 1> mask,
                                view<const T, 2> dlogits, view<T, 2> dtable) {
        constexpr index_t columns = 64;
        const index_t experts = dlogits.extents[1];
        cpu::parallel_for(device, (experts + columns - 1) / columns, [&](index_t task, int) {
            for (index_t t = 0; t < dlogits.extents[0]; ++t) {
                if (!cpu::detail::valid_token(mask, t)) continue;
                for (index_t e = task * columns; e < std::min(experts, (task + 1) * columns); ++e)
                    dtable(ids[t], e) += dlogits(t, e);
            }
        });
    }

    template <class T>
    static void add_product(const Cpu& device, view<const T, 2> a, view<const T, 2> b, view<T, 2> logits,
                            std::byte* scratch) {
        constexpr index_t block = 192;  // tokens: what one product packs at once
        const index_t tokens = a.extents[0];
        const index_t room = detail::align_up(cpu::gemm_scratch_bytes<T>());
        cpu::parallel_for(device, (tokens + block - 1) / block, [&](index_t task, int thread) {
            const index_t begin = task * block, end = std::min(tokens, begin + block);
            cpu::gemm_nt<T>(a.slice(begin, end), b, logits.slice(begin, end), Write::add, scratch + thread * room,
                            device.isa);
        });
    }
};

}  // namespace steelyard
