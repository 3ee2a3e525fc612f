// Noise on logits and the smooth load, on the CPU: one token at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/draw.hpp"
#include "steelyard/cpu/gating_rows.hpp"
#include "steelyard/cpu/router_token.hpp"
#include "steelyard/ops/gating_ops.hpp"

namespace steelyard {

namespace cpu::detail {

/// Scratch rows of one thread for the smooth load.
template <class T>
struct NoiseRows {
    view<Bits<T>, 1> key;              // [E]
    view<std::int64_t, 1> ranked;      // [E]
    view<expert_t, 1> order;           // [E]
    view<T, 1> sigma, draw, u, slope;  // [E]

    template <class Field>
    void fields(Field&& field, index_t experts) {
        field("key", key, padded<T>(experts));
        field("ranked", ranked, padded<T>(experts));
        field("order", order, padded<T>(experts));
        field("sigma", sigma, experts);
        field("draw", draw, experts);
        field("u", u, experts);
        field("slope", slope, experts);
    }
};

}  // namespace cpu::detail

template <>
struct noise_ops<Cpu> {
    template <class T>
    static index_t scratch_bytes(const Cpu& device, const LayerShape& shape) {
        return std::max(1, device.threads) * bytes_of<cpu::detail::NoiseRows<T>>(shape.experts);
    }

    template <class T>
    static void add_noise(const Cpu& device, const NoiseRule& rule, view<const T, 2> spread, view<T, 2> logits,
                          std::byte* scratch) {
        if (!rule.active()) return;
        const index_t experts = logits.extents[1];
        cpu::detail::each_row(device, logits.extents[0], [&](index_t t, int thread) {
            const auto rows = rows_of<T>(scratch, thread, experts);
            draw(device, rule, spread, t, rows);
            T* const z = &logits(t, 0);
            for (index_t i = 0; i < experts; ++i) z[i] += rows.sigma[i] * rows.draw[i];
        });
    }

    template <class T>
    static void smooth_load(const Cpu& device, const NoiseRule& rule, view<const std::uint8_t, 1> mask,
                            view<const T, 2> spread, view<const T, 2> logits, view<T, 2> load, std::byte* scratch) {
        const index_t experts = logits.extents[1];
        cpu::detail::each_row(device, logits.extents[0], [&](index_t t, int thread) {
            T* const out = &load(t, 0);
            if (!cpu::detail::valid_token(mask, t)) return std::fill(out, out + experts, T(0));
            if (rule.top_k >= experts) return std::fill(out, out + experts, T(1));
            const auto rows = rows_of<T>(scratch, thread, experts);
            rank(device, rule, &logits(t, 0), rows);
            if (!rule.active()) {
                std::fill(out, out + experts, T(0));
                for (int k = 0; k < rule.top_k; ++k) out[rows.order[k]] = T(1);
                return;
            }
            draw(device, rule, spread, t, rows);
            distances(rule, &logits(t, 0), rows);
            cpu::with_kernels(device.isa,
                              [&](auto kernels) { kernels.template normal_cdf<T>(rows.u.data, experts, out); });
        });
    }

    template <class T>
    static void backward(const Cpu& device, const NoiseRule& rule, view<const std::uint8_t, 1> mask, view<T, 2> spread,
                         view<const T, 2> logits, view<const T, 2> dload, view<T, 2> dlogits, std::byte* scratch) {
        const index_t experts = logits.extents[1];
        cpu::detail::each_row(device, logits.extents[0], [&](index_t t, int thread) {
            T* const dspread = spread.present() ? &spread(t, 0) : nullptr;
            T* const out = &dlogits(t, 0);
            if (!rule.active() || !cpu::detail::valid_token(mask, t)) {
                if (dspread != nullptr) std::fill(dspread, dspread + experts, T(0));
                return;
            }
            const auto rows = rows_of<T>(scratch, thread, experts);
            T *const slope = rows.slope.data, *const u = rows.u.data;
            const T *const n = rows.draw.data, *const sigma = rows.sigma.data;
            draw(device, rule, view<const T, 2>(spread), t, rows);
            const bool with_load = dload.size() != 0 && rule.top_k < experts;
            if (with_load) {
                rank(device, rule, &logits(t, 0), rows);
                distances(rule, &logits(t, 0), rows);
                const T* const du = &dload(t, 0);
                for (index_t i = 0; i < experts; ++i)  // by c_i; by z_m the opposite
                    slope[i] = du[i] * T(0.39894228040143267794) * cpu::exp_negative(T(-0.5) * u[i] * u[i]) / sigma[i];
                T rest = 0;
                for (index_t i = 0; i < experts; ++i) rest += slope[i];
                for (int k = 0; k < rule.top_k && rule.without_itself; ++k) {
                    const T own = slope[rows.order[k]];
                    out[rows.order[rule.top_k]] -= own;
                    rest -= own;
                }
                out[rows.order[rule.top_k - 1]] -= rest;
            } else {
                std::fill(slope, slope + experts, T(0));
                std::fill(u, u + experts, T(0));
            }
            // z = c + sigma n, and u falls as sigma grows: dsigma = n dz - u slope, with all thresholds in dz.
            for (index_t i = 0; i < experts && dspread != nullptr; ++i)
                dspread[i] = (n[i] * out[i] - u[i] * slope[i]) * cpu::sigmoid(dspread[i]);
            for (index_t i = 0; i < experts; ++i) out[i] += slope[i];
        });
    }

private:
    template <class T>
    static cpu::detail::NoiseRows<T> rows_of(std::byte* scratch, int thread, index_t experts) {
        return place<cpu::detail::NoiseRows<T>>(scratch + thread * bytes_of<cpu::detail::NoiseRows<T>>(experts),
                                                experts);
    }

    /// sigma and n of token t.
    template <class T>
    static void draw(const Cpu& device, const NoiseRule& rule, const view<const T, 2>& spread, index_t t,
                     const cpu::detail::NoiseRows<T>& rows) {
        const index_t experts = rows.sigma.extents[0];
        cpu::noise_row<T>(device, rule.draw, {t, experts, 0, experts}, rows.draw.data);
        if (!spread.present()) return std::fill(rows.sigma.data, rows.sigma.data + experts, static_cast<T>(rule.sigma));
        const T* const raw = &spread(t, 0);
        const T floor = static_cast<T>(rule.floor);
        for (index_t i = 0; i < experts; ++i)
            rows.sigma.data[i] = floor - cpu::log_sigmoid(-raw[i]);  // softplus(r) = -log sigmoid(-r)
    }

    /// order = the K + 1 best of z.
    template <class T>
    static void rank(const Cpu& device, const NoiseRule& rule, const T* logits, const cpu::detail::NoiseRows<T>& rows) {
        const index_t experts = rows.sigma.extents[0], size = cpu::padded<T>(experts);
        for (index_t i = 0; i < experts; ++i) rows.key[i] = cpu::ordered(logits[i]);
        std::fill(rows.key.data + experts, rows.key.data + size, std::numeric_limits<cpu::Bits<T>>::min());
        cpu::detail::take_best(device.isa, rows.key.data, size, index_t{rule.top_k} + 1, rows.order.data,
                               rows.ranked.data);
    }

    /// u: how far each expert is above the one that it has to pass, the K-th or, if it is one of those and stays out
    /// itself, the next.
    template <class T>
    static void distances(const NoiseRule& rule, const T* logits, const cpu::detail::NoiseRows<T>& rows) {
        const auto distance = [&](index_t i, T from) {
            rows.u.data[i] = (logits[i] - from) / rows.sigma.data[i] - rows.draw.data[i];
        };
        const T last = logits[rows.order[rule.top_k - 1]], next = logits[rows.order[rule.top_k]];
        for (index_t i = 0; i < rows.sigma.extents[0]; ++i) distance(i, last);
        for (int k = 0; k < rule.top_k && rule.without_itself; ++k) distance(rows.order[k], next);
    }
};

}  // namespace steelyard
