// Causal softmax attention within each sequence, every head for itself.
#pragma once

#include <algorithm>
#include <cmath>

#include "linear.hpp"

namespace pretrain {

/// Queries that are worked on together: their scores against all earlier keys are one small matrix product,
/// and keys after the tile are never touched.
inline constexpr index_t query_tile = 32;

namespace detail {

/// The columns of one head in the rows of one sequence.
template <class T>
view<T, 2> head_of(view<T, 2> rows, index_t column, index_t width) {
    view<T, 2> head = rows;
    head.data += column;
    head.extents[1] = width;
    return head;
}

}  // namespace detail

/// probabilities[s, h, i, j] = softmax over j ≤ i of q_i · k_j / sqrt(head width); y_i = Σ_j probability · v_j.
/// Writes both (=). Probabilities after the query's tile are not written and never read.
template <class T>
void attention_forward(int threads, view<const T, 2> qkv,  // [S·L, 3d]
                       view<T, 4> probabilities,           // [S, H, L, L]
                       view<T, 2> y) {                     // [S·L, d]
    const index_t heads = probabilities.extents[1], length = probabilities.extents[2];
    const index_t width = y.extents[1], head = width / heads;
    const T scale = T(1) / std::sqrt(static_cast<T>(head));
    parallel_for(threads, probabilities.extents[0] * heads, [&](index_t unit) {
        const index_t s = unit / heads, h = unit % heads;
        const auto in = qkv.slice(s * length, (s + 1) * length);
        const auto q = detail::head_of(in, h * head, head);
        const auto k = detail::head_of(in, width + h * head, head);
        const auto v = detail::head_of(in, 2 * width + h * head, head);
        const auto out = detail::head_of(y.slice(s * length, (s + 1) * length), h * head, head);
        const auto p = probabilities[s][h];  // [L, L]
        for (index_t begin = 0; begin < length; begin += query_tile) {
            const index_t end = std::min(begin + query_tile, length);
            auto tile = matrix(detail::head_of(p.slice(begin, end), 0, end));  // [queries, keys up to end]
            tile.noalias() = scale * matrix(q.slice(begin, end)) * matrix(k.slice(0, end)).transpose();
            for (index_t i = begin; i < end; ++i) {
                auto seen = row(&p(i, 0), i + 1);
                seen = (seen - seen.maxCoeff()).exp();
                seen *= T(1) / seen.sum();
                row(&p(i, 0) + i + 1, end - i - 1).setZero();
            }
            matrix(out.slice(begin, end)).noalias() = tile * matrix(v.slice(0, end));
        }
    });
}

/// With dp = dy vᵀ: the scores' gradient is p ∘ (dp − Σ_j p dp), which goes to q and k; dv = pᵀ dy.
/// Writes dqkv (=).
template <class T>
void attention_backward(int threads, view<const T, 2> qkv,    // [S·L, 3d]
                        view<const T, 4> probabilities,       // [S, H, L, L]
                        view<const T, 2> dy,                  // [S·L, d]
                        view<T, 3> dscores,                   // [S·H, query_tile, L]  workspace
                        view<T, 2> dqkv) {                    // [S·L, 3d]
    const index_t heads = probabilities.extents[1], length = probabilities.extents[2];
    const index_t width = dy.extents[1], head = width / heads;
    const T scale = T(1) / std::sqrt(static_cast<T>(head));
    parallel_for(threads, probabilities.extents[0] * heads, [&](index_t unit) {
        const index_t s = unit / heads, h = unit % heads;
        const auto in = qkv.slice(s * length, (s + 1) * length);
        const auto q = detail::head_of(in, h * head, head);
        const auto k = detail::head_of(in, width + h * head, head);
        const auto v = detail::head_of(in, 2 * width + h * head, head);
        const auto grad = dqkv.slice(s * length, (s + 1) * length);
        const auto dq = detail::head_of(grad, h * head, head);
        const auto dk = detail::head_of(grad, width + h * head, head);
        const auto dv = detail::head_of(grad, 2 * width + h * head, head);
        const auto dout = detail::head_of(dy.slice(s * length, (s + 1) * length), h * head, head);
        const auto p = probabilities[s][h];  // [L, L]
        matrix(dk).setZero();
        matrix(dv).setZero();
        for (index_t begin = 0; begin < length; begin += query_tile) {
            const index_t end = std::min(begin + query_tile, length);
            const auto tile = matrix(detail::head_of(p.slice(begin, end), 0, end));                    // [queries, keys]
            auto ds = matrix(detail::head_of(dscores[unit].slice(0, end - begin), 0, end));            // [queries, keys]
            const auto dy_tile = matrix(dout.slice(begin, end));
            matrix(dv.slice(0, end)).noalias() += tile.transpose() * dy_tile;
            ds.noalias() = dy_tile * matrix(v.slice(0, end)).transpose();
            for (index_t i = 0; i < end - begin; ++i) {
                auto d = row(&ds(i, 0), end);
                const auto seen = row(&p(begin + i, 0), end);
                d = seen * (d - (seen * d).sum()) * scale;
            }
            matrix(dq.slice(begin, end)).noalias() = ds * matrix(k.slice(0, end));
            matrix(dk.slice(0, end)).noalias() += ds.transpose() * matrix(q.slice(begin, end));
        }
    });
}

}  // namespace pretrain
