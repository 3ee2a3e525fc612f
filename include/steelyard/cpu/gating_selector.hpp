// Selectors made of smooth binary decisions, on the CPU: one token at a time, one tree for each selector.
//
// The tree is a heap: node 1 is the root, the children of n are 2n and 2n + 1, expert e is leaf 2^m + e.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/gating_rows.hpp"
#include "steelyard/cpu/lowest_index.hpp"
#include "steelyard/cpu/router_token.hpp"
#include "steelyard/ops/gating_ops.hpp"

namespace steelyard {

namespace cpu::detail {

/// Scratch of one thread.
template <class T>
struct SelectorRows {
    view<T, 1> mass, slope;        // [2^(m+1)]  r along the way to each node; expected dL/dq below it
    view<T, 1> mixture, root;      // [K]        w; slope of each selector's root
    view<Bits<T>, 1> key;          // [E]
    view<std::int64_t, 1> ranked;  // [E]

    template <class Field>
    void fields(Field&& field, index_t experts, index_t selectors, int bits) {
        field("mass", mass, index_t{2} << bits);
        field("slope", slope, index_t{2} << bits);
        field("mixture", mixture, selectors);
        field("root", root, selectors);
        field("key", key, padded<T>(experts));
        field("ranked", ranked, padded<T>(experts));
    }
};

}  // namespace cpu::detail

template <>
struct selector_ops<Cpu> {
    template <class T>
    static index_t scratch_bytes(const Cpu& device, const LayerShape& shape, const SelectorRule& rule) {
        return std::max(1, device.threads) * row_bytes<T>(rule, shape.experts) +
               blocks(shape.tokens) * static_cast<index_t>(sizeof(double));
    }

    template <class T>
    static index_t select(const Cpu& device, const SelectorRule& rule, view<const std::uint8_t, 1> mask,
                          view<const T, 2> codes, view<const T, 2> mixture, const Routing<T>& routing,
                          std::byte* scratch) {
        const index_t tokens = routing.logits.extents[0], experts = routing.logits.extents[1];
        cpu::LowestIndex first_bad;
        cpu::detail::each_row(device, tokens, [&](index_t t, int thread) {
            T* const q = &routing.logits(t, 0);
            T* const probs = &routing.probs(t, 0);
            expert_t* const expert = &routing.expert(t, 0);
            T* const weight = &routing.weight(t, 0);
            std::fill(q, q + experts, T(0));
            std::fill(probs, probs + experts, T(0));
            std::fill(expert, expert + experts, expert_t{-1});
            std::fill(weight, weight + experts, T(0));
            if (!cpu::detail::valid_token(mask, t)) return;
            if (!finite(codes[t]) || !finite(mixture[t])) {
                std::fill(q, q + experts, std::numeric_limits<T>::quiet_NaN());
                first_bad.report(t);
                return;
            }
            const auto rows = rows_of<T>(rule, scratch, thread, experts);
            mix(mixture[t], rows.mixture);
            for (int k = 0; k < rule.selectors; ++k) {
                descend(rule, codes, t, k, experts, rows.mass.data);
                for (index_t e = 0; e < experts; ++e) q[e] += rows.mixture[k] * rows.mass[leaf(rule, e)];
            }
            std::copy(q, q + experts, probs);
            const index_t size = cpu::padded<T>(experts);
            for (index_t e = 0; e < experts; ++e) rows.key[e] = cpu::ordered(q[e]);
            std::fill(rows.key.data + experts, rows.key.data + size, std::numeric_limits<cpu::Bits<T>>::min());
            cpu::detail::take_best(device.isa, rows.key.data, size, experts, expert, rows.ranked.data);
            for (index_t k = 0; k < experts; ++k) {
                weight[k] = q[expert[k]];
                if (!(weight[k] > T(0))) expert[k] = -1;
            }
        });
        return first_bad.get();
    }

    template <class T>
    static void backward(const Cpu& device, const SelectorRule& rule, view<const std::uint8_t, 1> mask,
                         view<T, 2> codes, view<T, 2> mixture, const Routing<T>& routing, const RoutingGrad<T>& grad,
                         std::byte* scratch) {
        const index_t experts = routing.logits.extents[1];
        cpu::detail::each_row(device, routing.logits.extents[0], [&](index_t t, int thread) {
            T* const dq = &grad.logits(t, 0);
            if (!cpu::detail::valid_token(mask, t)) {
                std::fill(dq, dq + experts, T(0));
                clear(codes, t);
                clear(mixture, t);
                return;
            }
            for (index_t e = 0; e < experts && grad.probs.present(); ++e) dq[e] += grad.probs(t, e);
            for (index_t k = 0; k < experts && grad.weight.present(); ++k)
                if (const expert_t e = routing.expert(t, k); e >= 0) dq[e] += grad.weight(t, k);
            const auto rows = rows_of<T>(rule, scratch, thread, experts);
            mix(view<const T, 1>(mixture[t]), rows.mixture);
            T mean = 0;
            for (int k = 0; k < rule.selectors; ++k) {
                descend(rule, view<const T, 2>(codes), t, k, experts, rows.mass.data);
                for (index_t e = 0; e < experts; ++e) rows.slope[leaf(rule, e)] = dq[e];
                rows.root[k] = ascend(rule, codes, t, k, experts, rows.mixture[k], rows);
                mean += rows.mixture[k] * rows.root[k];
            }
            for (int k = 0; k < rule.selectors; ++k) mixture(t, k) = rows.mixture[k] * (rows.root[k] - mean);
        });
    }

    template <class T>
    static double entropy(const Cpu& device, const SelectorRule& rule, view<const std::uint8_t, 1> mask,
                          index_t experts, view<T, 2> codes, double factor, std::byte* scratch) {
        constexpr T epsilon = T(1e-6);
        const index_t tokens = codes.extents[0];
        auto* const partial = reinterpret_cast<double*>(  // [blocks]
            scratch + std::max(1, device.threads) * row_bytes<T>(rule, experts));
        std::fill_n(partial, blocks(tokens), 0.0);
        cpu::detail::each_row(device, tokens, [&](index_t t, int thread) {
            if (!cpu::detail::valid_token(mask, t)) return clear(codes, t);
            const auto rows = rows_of<T>(rule, scratch, thread, experts);
            double sum = 0.0;
            for (int k = 0; k < rule.selectors; ++k) {
                descend(rule, view<const T, 2>(codes), t, k, experts, rows.mass.data);
                for (index_t e = 0; e < experts; ++e) {
                    const T r = rows.mass[leaf(rule, e)], log_r = std::log(r + epsilon);
                    sum -= static_cast<double>(r * log_r);
                    rows.slope[leaf(rule, e)] = static_cast<T>(-factor) * (log_r + r / (r + epsilon));
                }
                ascend(rule, codes, t, k, experts, T(1), rows);
            }
            partial[t / cpu::detail::gating_block] += sum;  // a block is one task
        });
        double total = 0.0;
        for (index_t b = 0; b < blocks(tokens); ++b) total += partial[b];
        return total;
    }

private:
    static index_t blocks(index_t tokens) {
        return (tokens + cpu::detail::gating_block - 1) / cpu::detail::gating_block;
    }
    template <class T>
    static index_t row_bytes(const SelectorRule& rule, index_t experts) {
        return bytes_of<cpu::detail::SelectorRows<T>>(experts, index_t{rule.selectors}, rule.bits);
    }
    template <class T>
    static cpu::detail::SelectorRows<T> rows_of(const SelectorRule& rule, std::byte* scratch, int thread,
                                                index_t experts) {
        return place<cpu::detail::SelectorRows<T>>(scratch + thread * row_bytes<T>(rule, experts), experts,
                                                   index_t{rule.selectors}, rule.bits);
    }
    static index_t leaf(const SelectorRule& rule, index_t e) { return (index_t{1} << rule.bits) + e; }

    template <class T>
    static void clear(const view<T, 2>& tensor, index_t t) {
        std::fill_n(tensor[t].data, tensor.extents[1], T(0));
    }
    template <class T>
    static bool finite(const view<const T, 1>& row) {
        bool all = true;
        for (index_t i = 0; i < row.extents[0]; ++i) all = all && std::isfinite(row[i]);
        return all;
    }

    /// w = softmax(mixture).
    template <class T>
    static void mix(const view<const T, 1>& mixture, const view<T, 1>& w) {
        T highest = mixture[0], sum = 0;
        for (index_t k = 1; k < w.extents[0]; ++k) highest = std::max(highest, mixture[k]);
        for (index_t k = 0; k < w.extents[0]; ++k) sum += w[k] = std::exp(mixture[k] - highest);
        for (index_t k = 0; k < w.extents[0]; ++k) w[k] /= sum;
    }

    /// The smooth step and its slope.
    template <class T>
    static T step(T x, T gamma) {
        if (x <= T(-0.5) * gamma) return T(0);
        if (x >= T(0.5) * gamma) return T(1);
        const T s = x / gamma;
        return T(0.5) + s * (T(1.5) - T(2) * s * s);
    }
    template <class T>
    static T step_slope(T x, T gamma) {
        const T s = x / gamma;
        return std::abs(s) >= T(0.5) ? T(0) : (T(1.5) - T(6) * s * s) / gamma;
    }

    /// How a node divides its mass: the probability of going right, and its derivative by S.
    template <class T>
    struct Turn {
        T right, slope;
        Turn(T s, index_t left_leaves, index_t right_leaves) {
            const T a = static_cast<T>(left_leaves), b = static_cast<T>(right_leaves);
            if (left_leaves == right_leaves) {
                right = s, slope = T(1);
            } else if (right_leaves == 0) {
                right = slope = T(0);
            } else {
                const T sum = b * s + a * (T(1) - s);  // at least b: a node has more leaves on its left
                right = b * s / sum;
                slope = a * b / (sum * sum);
            }
        }
    };

    /// Experts below node n of depth `depth`.
    static index_t leaves(const SelectorRule& rule, index_t experts, int depth, index_t n) {
        const index_t span = index_t{1} << (rule.bits - depth), begin = (n - (index_t{1} << depth)) * span;
        return std::clamp<index_t>(experts - begin, 0, span);
    }

    template <class T>
    static void descend(const SelectorRule& rule, const view<const T, 2>& codes, index_t t, int k, index_t experts,
                        T* mass) {
        mass[1] = T(1);
        for (int b = 0; b < rule.bits; ++b) {
            const T s = step(codes(t, k * rule.bits + b), static_cast<T>(rule.gamma));
            for (index_t n = index_t{1} << b; n < index_t{2} << b; ++n) {
                const Turn<T> turn(s, leaves(rule, experts, b + 1, 2 * n), leaves(rule, experts, b + 1, 2 * n + 1));
                mass[2 * n + 1] = mass[n] * turn.right;
                mass[2 * n] = mass[n] * (T(1) - turn.right);
            }
        }
    }

    /// Replaces the codes of selector k by `factor` times their gradient; returns the sum of r(e) slope(e).
    template <class T>
    static T ascend(const SelectorRule& rule, const view<T, 2>& codes, index_t t, int k, index_t experts, T factor,
                    const cpu::detail::SelectorRows<T>& rows) {
        const T gamma = static_cast<T>(rule.gamma);
        T* const slope = rows.slope.data;
        std::fill(slope + leaf(rule, experts), slope + (index_t{2} << rule.bits), T(0));
        for (int b = rule.bits - 1; b >= 0; --b) {
            T& code = codes(t, k * rule.bits + b);
            const T s = step(code, gamma);
            T sum = 0;
            for (index_t n = index_t{1} << b; n < index_t{2} << b; ++n) {
                const Turn<T> turn(s, leaves(rule, experts, b + 1, 2 * n), leaves(rule, experts, b + 1, 2 * n + 1));
                sum += rows.mass[n] * turn.slope * (slope[2 * n + 1] - slope[2 * n]);
                slope[n] = turn.right * slope[2 * n + 1] + (T(1) - turn.right) * slope[2 * n];
            }
            code = factor * sum * step_slope(code, gamma);
        }
        return slope[1];
    }
};

}  // namespace steelyard
