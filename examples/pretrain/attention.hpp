// Causal softmax attention within each sequence, every head for itself.
#pragma once

#include <algorithm>
#include <cmath>

#include "linear.hpp"

namespace pretrain {

/// Queries that are worked on together: their scores against all earlier keys are one small matrix product,
/// and keys after the tile are never touched.
inline constexpr index_t query_tile = 32;
/// Queries whose scores' gradients backward holds at a time, of `length`.
inline index_t queries_at_once(const Threads&, index_t /*length*/) { return query_tile; }

/// probabilities[s, h, i, j] = softmax over j ≤ i of q_i · k_j / sqrt(head width); y_i = Σ_j probability · v_j.
/// Writes both (=). Probabilities after the query's tile are not written and never read.
template <class T>
void attention_forward(const Threads& threads, view<const T, 2> qkv,  // [S·L, 3d]
                       view<T, 4> probabilities,                      // [S, H, L, L]
                       view<T, 2> y) {                                // [S·L, d]
    const index_t heads = probabilities.extents[1], length = probabilities.extents[2];
    const index_t width = y.extents[1], head = width / heads;
    const T scale = T(1) / std::sqrt(static_cast<T>(head));
    threads.each(probabilities.extents[0] * heads, [&](index_t unit, std::byte* scratch) {
        const index_t s = unit / heads, h = unit % heads;
        const auto in = qkv.slice(s * length, (s + 1) * length);
        const auto q = columns(in, h * head, (h + 1) * head);
        const auto k = columns(in, width + h * head, width + (h + 1) * head);
        const auto v = columns(in, 2 * width + h * head, 2 * width + (h + 1) * head);
        const auto out = columns(y.slice(s * length, (s + 1) * length), h * head, (h + 1) * head);
        const auto p = probabilities[s][h];  // [L, L]
        for (index_t begin = 0; begin < length; begin += query_tile) {
            const index_t end = std::min(begin + query_tile, length);
            const auto tile = columns(p.slice(begin, end), 0, end);  // [queries, keys up to end]
            gemm_nt<T>(q.slice(begin, end), k.slice(0, end), tile, Write::assign, scratch);
            for (index_t i = begin; i < end; ++i) {
                auto seen = row(&p(i, 0), i + 1);
                seen = (scale * (seen - seen.maxCoeff())).exp();
                seen *= T(1) / seen.sum();
                row(&p(i, 0) + i + 1, end - i - 1).setZero();
            }
            gemm_nn<T>(tile, v.slice(0, end), out.slice(begin, end), Write::assign, scratch);
        }
    });
}

/// With dp = dy vᵀ: the scores' gradient is p ∘ (dp − Σ_j p dp), which goes to q and k; dv = pᵀ dy.
/// Writes dqkv (=).
template <class T>
void attention_backward(const Threads& threads, view<const T, 2> qkv,  // [S·L, 3d]
                        view<const T, 4> probabilities,                // [S, H, L, L]
                        view<const T, 2> dy,                           // [S·L, d]
                        view<T, 3> dscores,                            // [S·H, query_tile, L]  workspace
                        view<T, 2> dqkv) {                             // [S·L, 3d]
    const index_t heads = probabilities.extents[1], length = probabilities.extents[2];
    const index_t width = dy.extents[1], head = width / heads;
    const T scale = T(1) / std::sqrt(static_cast<T>(head));
    threads.each(probabilities.extents[0] * heads, [&](index_t unit, std::byte* scratch) {
        const index_t s = unit / heads, h = unit % heads;
        const auto in = qkv.slice(s * length, (s + 1) * length);
        const auto q = columns(in, h * head, (h + 1) * head);
        const auto k = columns(in, width + h * head, width + (h + 1) * head);
        const auto v = columns(in, 2 * width + h * head, 2 * width + (h + 1) * head);
        const auto grad = dqkv.slice(s * length, (s + 1) * length);
        const auto dq = columns(grad, h * head, (h + 1) * head);
        const auto dk = columns(grad, width + h * head, width + (h + 1) * head);
        const auto dv = columns(grad, 2 * width + h * head, 2 * width + (h + 1) * head);
        const auto dout = columns(dy.slice(s * length, (s + 1) * length), h * head, (h + 1) * head);
        const auto p = probabilities[s][h];  // [L, L]
        matrix(dk).setZero();
        matrix(dv).setZero();
        for (index_t begin = 0; begin < length; begin += query_tile) {
            const index_t end = std::min(begin + query_tile, length);
            const auto tile = columns(p.slice(begin, end), 0, end);                  // [queries, keys up to end]
            const auto ds = columns(dscores[unit].slice(0, end - begin), 0, end);    // likewise
            const auto dy_tile = dout.slice(begin, end);                             // [queries, head width]
            gemm_tn<T>(tile, dy_tile, dv.slice(0, end), Write::add, scratch);
            gemm_nt<T>(dy_tile, v.slice(0, end), ds, Write::assign, scratch);
            for (index_t i = 0; i < end - begin; ++i) {
                auto d = row(&ds(i, 0), end);
                const auto seen = row(&p(begin + i, 0), end);
                d = seen * (d - (seen * d).sum()) * scale;
            }
            gemm_nn<T>(ds, k.slice(0, end), dq.slice(begin, end), Write::assign, scratch);
            gemm_tn<T>(ds, q.slice(begin, end), dk.slice(0, end), Write::add, scratch);
        }
    });
}

}  // namespace pretrain
