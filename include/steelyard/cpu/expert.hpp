// Experts on the CPU: grouped feed-forward networks.
//
// Forward and the first half of backward work on tiles of one expert's rows; weight gradients work on blocks of one
// expert's weight rows, each of which adds its expert's tokens in order. No two tasks write the same element, and the
// products do not depend on the tile a row is in (gemm.hpp), so the number of threads changes no bit.
#pragma once

#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/activation.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/parallel.hpp"

namespace steelyard {

namespace cpu::detail::expert {

/// Most rows of a tile.
inline constexpr index_t tile_rows = 192;
/// Rows that the weight gradients gather and add at a time: fixed, because it is part of the order of addition.
inline constexpr index_t gathered_rows = 384;
/// Rows of a weight that one task of the weight gradients owns.
inline constexpr index_t weight_block = 192;

/// Rows [begin, end) of the grouped order, all of one expert.
struct RowTile {
    index_t expert = 0, begin = 0, end = 0;
};

/// The grouped rows cut into tiles of at most `height` rows that never span two experts.
struct Tiling {
    view<index_t, 1> offsets;  // [E + 1]
    index_t height = tile_rows;

    /// Smaller tiles where there would be too few to keep the threads busy.
    Tiling(const Cpu& device, view<index_t, 1> plan_offsets) : offsets(plan_offsets) {
        while (height > 48 && tiles() < 3 * device.threads) height /= 2;
    }
    [[nodiscard]] index_t tiles() const {
        index_t n = 0;
        for (index_t e = 0; e + 1 < offsets.extents[0]; ++e) n += (offsets[e + 1] - offsets[e] + height - 1) / height;
        return n;
    }
    [[nodiscard]] RowTile tile(index_t index) const {
        for (index_t e = 0;; ++e) {
            const index_t here = (offsets[e + 1] - offsets[e] + height - 1) / height;
            if (index < here) {
                const index_t begin = offsets[e] + index * height;
                return {e, begin, std::min(begin + height, offsets[e + 1])};
            }
            index -= here;
        }
    }
};

/// One thread's part of the scratch.
template <class T>
struct Scratch {
    view<T, 2> width;   // [gathered_rows, d]
    view<T, 2> hidden;  // [tile_rows, h]
    view<std::byte, 1> gemm;

    template <class Field>
    void fields(Field&& field, index_t d, index_t h) {
        field("width", width, gathered_rows, std::max(d, weight_block));
        field("hidden", hidden, tile_rows, h);
        field("gemm", gemm, gemm_scratch_bytes<T>());
    }
};

/// Columns [begin, end) of a matrix.
template <class T>
view<T, 2> columns(view<T, 2> matrix, index_t begin, index_t end) {
    matrix.data += begin * matrix.strides[1];
    matrix.extents[1] = end - begin;
    return matrix;
}

/// panel[r - begin] = from[token of row r], for rows [begin, end) of the plan.
template <class T>
view<const T, 2> gather(const Plan<>& plan, view<const T, 2> from, index_t begin, index_t end, view<T, 2> panel) {
    const index_t width = from.extents[1], top_k = plan.top_k();
    const view<T, 2> rows(panel.data, end - begin, width);
    for (index_t r = begin; r < end; ++r)
        std::memcpy(&rows(r - begin, 0), &from(plan.choice[r] / top_k, 0), static_cast<std::size_t>(width) * sizeof(T));
    return rows;
}

/// c[m,n] = bias[n] + a[m,k] b[n,k]^T, the bias absent or not.
template <class T>
void linear(view<const T, 2> a, view<const T, 2> b, view<const T, 2> bias, index_t expert, view<T, 2> c,
            std::byte* scratch) {
    if (!bias.present()) return gemm_nt<T>(a, b, c, Write::assign, scratch);
    for (index_t i = 0; i < c.extents[0]; ++i)
        std::memcpy(&c(i, 0), &bias(expert, 0), static_cast<std::size_t>(c.extents[1]) * sizeof(T));
    gemm_nt<T>(a, b, c, Write::add, scratch);
}

/// Calls body(first column, number of columns <= lanes) along a row.
template <class T, class Body>
inline void for_lanes(index_t n, Body&& body) {
    constexpr index_t lanes = Simd<T>::lanes;
    index_t j = 0;
    for (; j + lanes <= n; j += lanes) body(j, std::integral_constant<index_t, lanes>{});
    if (j < n) body(j, n - j);
}

template <class T>
inline T sum_lanes(typename Simd<T>::vec v) {
    T sum = 0;
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) sum += v[lane];
    return sum;
}

template <class T>
T dot(const T* a, const T* b, index_t n) {
    typename Simd<T>::vec sum = {};
    for_lanes<T>(n, [&](index_t j, auto count) { sum += load_first(a + j, count) * load_first(b + j, count); });
    return sum_lanes<T>(sum);
}

/// inner[r] = act(up[r]), or act(gate[r]) * up[r].
template <Activation A, class T>
void activate_rows(const FfnKept<const T>& kept, index_t begin, view<T, 2> inner) {
    for (index_t i = 0; i < inner.extents[0]; ++i) {
        const T* const up = &kept.up(begin + i, 0);
        const T* const gate = kept.gate.present() ? &kept.gate(begin + i, 0) : nullptr;
        T* const out = &inner(i, 0);
        for_lanes<T>(inner.extents[1], [&](index_t j, auto count) {
            const auto u = load_first(up + j, count);
            const auto value = gate ? activate<A, T>(load_first(gate + j, count)).value * u : activate<A, T>(u).value;
            store_first<T>(out + j, value, count);
        });
    }
}

/// One row of backward through the activation. `dinner` = down^T dy, without the combine weight.
/// Writes the weighted inner activation and the gradients of the pre-activations; returns <dinner, inner>.
template <Activation A, class T>
T activate_backward(const T* gate, const T* up, const T* dinner, T weight, index_t n, T* dgate, T* dup, T* inner) {
    typename Simd<T>::vec sum = {};
    for_lanes<T>(n, [&](index_t j, auto count) {
        const auto u = load_first(up + j, count), d = load_first(dinner + j, count), wd = weight * d;
        if (gate) {
            const auto [value, slope] = activate<A, T>(load_first(gate + j, count));
            const auto product = value * u;
            sum += d * product;
            store_first<T>(inner + j, weight * product, count);
            store_first<T>(dgate + j, wd * u * slope, count);
            store_first<T>(dup + j, wd * value, count);
        } else {
            const auto [value, slope] = activate<A, T>(u);
            sum += d * value;
            store_first<T>(inner + j, weight * value, count);
            store_first<T>(dup + j, wd * slope, count);
        }
    });
    return sum_lanes<T>(sum);
}

}  // namespace cpu::detail::expert

/// The expert kernels of ops/expert_ops.hpp. Scratch: for each thread, 384 rows of width d, 192 of width h, and the
/// packing blocks of one product (about 400 KiB).
template <>
struct expert_ops<Cpu> {
    template <class T>
    [[nodiscard]] static index_t scratch_bytes(const Cpu& device, index_t width, index_t hidden) {
        return std::max(device.threads, 1) * bytes_of<cpu::detail::expert::Scratch<T>>(width, hidden);
    }

    template <class T>
    static void ffn_forward(const Cpu& device, Activation activation, const FfnWeights<const T>& weights,
                            view<const T, 2> x,      // [T, d]
                            const Plan<>& plan,      //
                            const FfnKept<T>& kept,  // [N, h] (=)
                            view<T, 2> rows,         // [N, d] (=), or absent
                            std::byte* scratch) {
        namespace detail = cpu::detail::expert;
        const detail::Tiling tiling(device, plan.offsets);
        cpu::parallel_for(device, tiling.tiles(), [&](index_t task, int thread) {
            const detail::RowTile tile = tiling.tile(task);
            const index_t e = tile.expert, begin = tile.begin, end = tile.end;
            const auto own = part<T>(scratch, thread, weights);
            const auto input = detail::gather(plan, x, begin, end, own.width);
            const view<const T, 2> no_bias;
            if (weights.gate.present())
                detail::linear<T>(input, weights.gate[e], no_bias, e, kept.gate.slice(begin, end), own.gemm.data);
            detail::linear<T>(input, weights.up[e], weights.up_bias, e, kept.up.slice(begin, end), own.gemm.data);
            if (!rows.present()) return;
            const auto inner = own.hidden.slice(0, end - begin);
            cpu::with_activation(activation, [&]<Activation A>() {
                detail::activate_rows<A, T>({kept.gate, kept.up}, begin, inner);
            });
            detail::linear<T>(inner, weights.down[e], weights.down_bias, e, rows.slice(begin, end), own.gemm.data);
        });
    }

    template <class T>
    static void ffn_backward(const Cpu& device, Activation activation, const FfnWeights<const T>& weights,
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
        namespace detail = cpu::detail::expert;
        const auto weight_of = [&](index_t row) {
            const index_t choice = plan.choice[row], k = plan.top_k();
            return weight.present() ? weight(choice / k, choice % k) : T(1);
        };

        // Rows: through `down` and the activation, then through `up` and `gate`.
        const detail::Tiling tiling(device, plan.offsets);
        cpu::parallel_for(device, tiling.tiles(), [&](index_t task, int thread) {
            const detail::RowTile tile = tiling.tile(task);
            const index_t e = tile.expert, begin = tile.begin, end = tile.end;
            const auto own = part<T>(scratch, thread, weights);
            const auto dout = detail::gather(plan, dy, begin, end, own.width);
            const auto dinner = own.hidden.slice(0, end - begin);
            cpu::gemm_nn<T>(dout, weights.down[e], dinner, cpu::Write::assign, own.gemm.data);
            cpu::with_activation(activation, [&]<Activation A>() {
                for (index_t r = begin; r < end; ++r) {
                    const bool gated = weights.gate.present();
                    T along = detail::activate_backward<A, T>(gated ? &kept.gate(r, 0) : nullptr, &kept.up(r, 0),
                                                              &dinner(r - begin, 0), weight_of(r), dinner.extents[1],
                                                              gated ? &grad_rows.gate(r, 0) : nullptr,
                                                              &grad_rows.up(r, 0), &grad_rows.inner(r, 0));
                    if (!dweight.present()) continue;
                    if (weights.down_bias.present())
                        along += detail::dot<T>(&dout(r - begin, 0), &weights.down_bias(e, 0), dout.extents[1]);
                    dweight(plan.choice[r] / plan.top_k(), plan.choice[r] % plan.top_k()) += along;
                }
            });
            const auto dinput = drows.slice(begin, end);
            cpu::gemm_nn<T>(grad_rows.up.slice(begin, end), weights.up[e], dinput, cpu::Write::assign, own.gemm.data);
            if (weights.gate.present())
                cpu::gemm_nn<T>(grad_rows.gate.slice(begin, end), weights.gate[e], dinput, cpu::Write::add,
                                own.gemm.data);
        });

        // Weights: blocks of the rows of `up` and `gate`, then of `down`.
        const index_t hidden = weights.up.extents[1], width = weights.up.extents[2];
        const index_t up_blocks = (hidden + detail::weight_block - 1) / detail::weight_block;
        const index_t blocks = up_blocks + (width + detail::weight_block - 1) / detail::weight_block;
        cpu::parallel_for(device, plan.experts() * blocks, [&](index_t task, int thread) {
            const index_t e = task / blocks, block = task % blocks;
            const bool up = block < up_blocks;
            const index_t i0 = (up ? block : block - up_blocks) * detail::weight_block;
            const index_t i1 = std::min(i0 + detail::weight_block, up ? hidden : width);
            const auto own = part<T>(scratch, thread, weights);
            const auto product = [&](view<const T, 2> left, view<const T, 2> right, view<T, 3> grad) {
                if (grad.present()) cpu::gemm_tn<T>(left, right, grad[e].slice(i0, i1), cpu::Write::add, own.gemm.data);
            };
            for (index_t r0 = plan.offsets[e]; r0 < plan.offsets[e + 1]; r0 += detail::gathered_rows) {
                const index_t r1 = std::min(r0 + detail::gathered_rows, plan.offsets[e + 1]);
                if (up) {
                    const auto dup = detail::columns(grad_rows.up.slice(r0, r1), i0, i1);
                    if (grads.up.present() || grads.gate.present()) {
                        const auto input = detail::gather(plan, x, r0, r1, own.width);
                        product(dup, input, grads.up);
                        if (weights.gate.present())
                            product(detail::columns(grad_rows.gate.slice(r0, r1), i0, i1), input, grads.gate);
                    }
                    if (grads.up_bias.present())
                        for (index_t r = 0; r < r1 - r0; ++r)
                            for (index_t i = i0; i < i1; ++i) grads.up_bias(e, i) += dup(r, i - i0);
                } else {
                    const auto dout = detail::gather(plan, detail::columns(dy, i0, i1), r0, r1, own.width);
                    product(dout, grad_rows.inner.slice(r0, r1), grads.down);
                    if (grads.down_bias.present())
                        for (index_t r = 0; r < r1 - r0; ++r)
                            for (index_t i = i0; i < i1; ++i)
                                grads.down_bias(e, i) += weight_of(r0 + r) * dout(r, i - i0);
                }
            }
        });
    }

private:
    /// The scratch of one thread.
    template <class T>
    static cpu::detail::expert::Scratch<T> part(std::byte* scratch, int thread, const FfnWeights<const T>& weights) {
        const index_t hidden = weights.up.extents[1], width = weights.up.extents[2];
        using Part = cpu::detail::expert::Scratch<T>;
        return place<Part>(scratch + thread * bytes_of<Part>(width, hidden), width, hidden);
    }
};

}  // namespace steelyard
