// Soft-mixture kernels of the CPU device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/cpu/lowest_index.hpp"
#include "steelyard/cpu/parallel.hpp"
#include "steelyard/ops/soft_ops.hpp"

namespace steelyard {

namespace cpu::detail::soft {

// Fixed cuts of the work: they never depend on the number of threads.
inline constexpr index_t token_block = 192;
inline constexpr index_t column_block = 128;
inline constexpr double norm_epsilon = 1e-6;

/// The packed sequences of a call, and their cut into blocks of tokens.
struct Sequences {
    const TokenInfo<>& info;
    index_t tokens;

    [[nodiscard]] index_t count() const { return info.sequences.present() ? info.sequences.extents[0] - 1 : 1; }
    [[nodiscard]] index_t begin(index_t s) const { return info.sequences.present() ? info.sequences[s] : 0; }
    [[nodiscard]] index_t end(index_t s) const { return info.sequences.present() ? info.sequences[s + 1] : tokens; }
    [[nodiscard]] bool valid(index_t t) const { return !info.mask.present() || info.mask[t] != 0; }
    [[nodiscard]] index_t blocks() const {
        index_t n = 0;
        for (index_t s = 0; s < count(); ++s) n += (end(s) - begin(s) + token_block - 1) / token_block;
        return n;
    }
    /// Block `index`: of which sequence, from which token to which.
    void block(index_t index, index_t& s, index_t& from, index_t& to) const {
        for (s = 0;; ++s) {
            const index_t here = (end(s) - begin(s) + token_block - 1) / token_block;
            if (index < here) break;
            index -= here;
        }
        from = begin(s) + index * token_block;
        to = std::min(from + token_block, end(s));
    }
};

template <class T>
struct Scratch {
    view<T, 2> block;  // [token_block, column_block]
    view<std::byte, 1> gemm;

    template <class Field>
    void fields(Field&& field) {
        field("block", block, token_block, column_block);
        field("gemm", gemm, gemm_scratch_bytes<T>());
    }
};

template <class T>
view<T, 2> columns(view<T, 2> matrix, index_t begin, index_t end) {
    matrix.data += begin;
    matrix.extents[1] = end - begin;
    return matrix;
}

/// out[P, n] (+=) weights^T rows over the valid tokens of one sequence, for columns [c0, c1) of rows.
template <class T>
void add_transposed(const Sequences& all, index_t s, view<const T, 2> weights, view<const T, 2> rows, index_t c0,
                    index_t c1, view<T, 2> out, const Scratch<T>& own, Isa isa) {
    for (index_t from = all.begin(s); from < all.end(s); from += token_block) {
        const index_t to = std::min(from + token_block, all.end(s));
        const view<T, 2> copy(own.block.data, to - from, c1 - c0);
        for (index_t t = from; t < to; ++t) {
            T* const row = &copy(t - from, 0);
            if (all.valid(t))
                std::copy_n(&rows(t, c0), c1 - c0, row);
            else
                std::fill_n(row, c1 - c0, T(0));
        }
        gemm_tn<T>(weights.slice(from, to), copy, columns(out, c0, c1), Write::add, own.gemm.data, isa);
    }
}

/// 1 / |row|, or 1 where nothing is normalised.
template <class T>
T inverse_norm(const T* row, index_t n, bool normalize) {
    if (!normalize) return T(1);
    double sum = norm_epsilon;
    for (index_t j = 0; j < n; ++j) sum += static_cast<double>(row[j]) * static_cast<double>(row[j]);
    return static_cast<T>(1.0 / std::sqrt(sum));
}

/// Calls body(first column, number of them) for the columns of task `task`: row_lanes neighbours, whose rows are read
/// once for all of them.
template <class T, class Body>
void column_task(index_t task, index_t columns, Body&& body) {
    const index_t first = task * row_lanes<T>, here = columns - first;
    if (here >= row_lanes<T>)
        body(first, std::integral_constant<index_t, row_lanes<T>>{});
    else
        body(first, here);
}

/// Each of `count` neighbouring columns = its softmax over the valid rows; the others become 0.
template <class T, class Count, class Valid>
void softmax_columns(view<T, 2> matrix, index_t first, Count count, Valid&& valid) {
    const index_t rows = matrix.extents[0];
    T largest[row_lanes<T>], sum[row_lanes<T>] = {};
    std::fill_n(largest, row_lanes<T>, -std::numeric_limits<T>::infinity());
    for (index_t i = 0; i < rows; ++i) {
        const T* const row = &matrix(i, first);
        for (index_t l = 0; l < count && valid(i); ++l) largest[l] = row[l] > largest[l] ? row[l] : largest[l];
    }
    for (index_t i = 0; i < rows; ++i) {
        T* const row = &matrix(i, first);
        if (!valid(i)) {
            std::fill_n(row, index_t{count}, T(0));
            continue;
        }
        for (index_t l = 0; l < count; ++l) sum[l] += row[l] = exp_negative(row[l] - largest[l]);
    }
    for (index_t i = 0; i < rows; ++i) {
        T* const row = &matrix(i, first);
        for (index_t l = 0; l < count && valid(i); ++l) row[l] /= sum[l];
    }
}

}  // namespace cpu::detail::soft

template <>
struct soft_ops<Cpu> {
    template <class T>
    static index_t scratch_bytes(const Cpu& device, index_t slots) {
        return std::max(1, device.threads) * bytes_of<cpu::detail::soft::Scratch<T>>() + bytes_of<Norms<T>>(slots);
    }

    template <class T>
    static index_t route(const Cpu& device, const TokenInfo<>& tokens, view<const T, 2> x, view<const T, 2> phi,
                         view<const T, 1> scale, view<T, 2> similarity, view<T, 2> dispatch, view<T, 2> combine,
                         std::byte* scratch) {
        const cpu::detail::soft::Sequences all{tokens, x.extents[0]};
        const index_t slots = phi.extents[0], width = x.extents[1];
        const bool normalize = scale.present();
        const view<T, 1> norm = norms<T>(device, phi, normalize, scratch);
        const T sharpness = normalize ? scale[0] : T(1);
        cpu::LowestIndex first_bad;
        cpu::parallel_for(device, all.blocks(), [&](index_t task, int thread) {
            index_t s = 0, from = 0, to = 0;
            all.block(task, s, from, to);
            cpu::gemm_nt<T>(x.slice(from, to), phi, similarity.slice(from, to), cpu::Write::assign,
                            part<T>(scratch, thread).gemm.data, device.isa);
            for (index_t t = from; t < to; ++t) {
                const bool valid = all.valid(t);
                const T inverse = valid ? cpu::detail::soft::inverse_norm(&x(t, 0), width, normalize) : T(0);
                for (index_t p = 0; p < slots; ++p) {
                    similarity(t, p) = valid ? similarity(t, p) * inverse * norm[p] : T(0);
                    combine(t, p) = dispatch(t, p) = sharpness * similarity(t, p);
                }
                if (valid)
                    for (index_t p = 0; p < slots; ++p)
                        if (!std::isfinite(combine(t, p))) first_bad.report(t);
                if (valid)
                    cpu::softmax_row(&combine(t, 0), slots);
                else
                    std::fill_n(&combine(t, 0), slots, T(0));
            }
        });
        if (const index_t bad = first_bad.get(); bad >= 0) return bad;
        const index_t tasks = cpu::detail::tasks_of(slots, cpu::row_lanes<T>);
        cpu::parallel_for(device, all.count() * tasks, [&](index_t task, int) {
            const index_t s = task / tasks, from = all.begin(s);
            cpu::detail::soft::column_task<T>(task % tasks, slots, [&](index_t first, auto count) {
                cpu::detail::soft::softmax_columns(dispatch.slice(from, all.end(s)), first, count,
                                                   [&](index_t i) { return all.valid(from + i); });
            });
        });
        return -1;
    }

    template <class T>
    static void mix(const Cpu& device, const TokenInfo<>& tokens, view<const T, 2> weights, view<const T, 2> x,
                    view<T, 2> slots, std::byte* scratch) {
        const cpu::detail::soft::Sequences all{tokens, x.extents[0]};
        const index_t each = weights.extents[1], width = x.extents[1];
        const index_t blocks = blocks_of(width);
        cpu::parallel_for(device, all.count() * blocks, [&](index_t task, int thread) {
            const index_t s = task / blocks, c0 = task % blocks * cpu::detail::soft::column_block;
            const index_t c1 = std::min(width, c0 + cpu::detail::soft::column_block);
            const view<T, 2> out = slots.slice(s * each, (s + 1) * each);
            for (index_t p = 0; p < each; ++p) std::fill(&out(p, c0), &out(p, c0) + (c1 - c0), T(0));
            cpu::detail::soft::add_transposed<T>(all, s, weights, x, c0, c1, out, part<T>(scratch, thread), device.isa);
        });
    }

    template <class T>
    static void spread(const Cpu& device, const TokenInfo<>& tokens, view<const T, 2> weights, view<const T, 2> slots,
                       view<T, 2> y, Write write, std::byte* scratch) {
        const cpu::detail::soft::Sequences all{tokens, y.extents[0]};
        const index_t each = weights.extents[1];
        cpu::parallel_for(device, all.blocks(), [&](index_t task, int thread) {
            index_t s = 0, from = 0, to = 0;
            all.block(task, s, from, to);
            cpu::gemm_nn<T>(weights.slice(from, to), slots.slice(s * each, (s + 1) * each), y.slice(from, to), write,
                            part<T>(scratch, thread).gemm.data, device.isa);
        });
    }

    template <class T>
    static void products(const Cpu& device, const TokenInfo<>& tokens, view<const T, 2> y, view<const T, 2> slots,
                         view<T, 2> out, std::byte* scratch) {
        const cpu::detail::soft::Sequences all{tokens, y.extents[0]};
        const index_t each = out.extents[1];
        cpu::parallel_for(device, all.blocks(), [&](index_t task, int thread) {
            index_t s = 0, from = 0, to = 0;
            all.block(task, s, from, to);
            cpu::gemm_nt<T>(y.slice(from, to), slots.slice(s * each, (s + 1) * each), out.slice(from, to),
                            cpu::Write::assign, part<T>(scratch, thread).gemm.data, device.isa);
            for (index_t t = from; t < to; ++t)
                if (!all.valid(t)) std::fill_n(&out(t, 0), each, T(0));
        });
    }

    template <class T>
    static void softmax_backward(const Cpu& device, const TokenInfo<>& tokens, view<const T, 2> dispatch,
                                 view<const T, 2> combine, view<const T, 2> ddispatch, view<T, 2> dcombine) {
        const cpu::detail::soft::Sequences all{tokens, combine.extents[0]};
        const index_t slots = combine.extents[1];
        cpu::parallel_for(device, all.blocks(), [&](index_t task, int) {
            index_t s = 0, from = 0, to = 0;
            all.block(task, s, from, to);
            for (index_t t = from; t < to; ++t) {
                const T* const p = &combine(t, 0);
                T* const dp = &dcombine(t, 0);
                const T mean = cpu::row_dot<T>(p, dp, slots);
                for (index_t i = 0; i < slots; ++i) dp[i] = p[i] * (dp[i] - mean);
            }
        });
        const index_t tasks = cpu::detail::tasks_of(slots, cpu::row_lanes<T>);
        cpu::parallel_for(device, all.count() * tasks, [&](index_t task, int) {
            const index_t s = task / tasks;
            cpu::detail::soft::column_task<T>(task % tasks, slots, [&](index_t first, auto count) {
                T mean[cpu::row_lanes<T>] = {};
                for (index_t t = all.begin(s); t < all.end(s); ++t) {
                    const T *const p = &dispatch(t, first), *const dp = &ddispatch(t, first);
                    for (index_t l = 0; l < count; ++l) mean[l] += p[l] * dp[l];
                }
                for (index_t t = all.begin(s); t < all.end(s); ++t) {
                    const T *const p = &dispatch(t, first), *const dp = &ddispatch(t, first);
                    T* const out = &dcombine(t, first);
                    for (index_t l = 0; l < count; ++l) out[l] += p[l] * (dp[l] - mean[l]);
                }
            });
        });
    }

    template <class T>
    static void logits_backward(const Cpu& device, const TokenInfo<>& tokens, view<const T, 2> x, view<const T, 2> phi,
                                view<const T, 1> scale, view<const T, 2> similarity, view<T, 2> dlogits, view<T, 2> dx,
                                view<T, 2> dphi, view<T, 1> dscale, std::byte* scratch) {
        const cpu::detail::soft::Sequences all{tokens, x.extents[0]};
        const index_t slots = phi.extents[0], width = x.extents[1];
        const bool normalize = scale.present();
        const view<T, 1> norm = norms<T>(device, phi, normalize, scratch), along = norm.slice(slots, 2 * slots);
        const T sharpness = normalize ? scale[0] : T(1);
        // What the norms and the scale are to blame for, while dlogits is still that of the logits.
        double whole = 0.0;
        for (index_t p = 0; p < slots && normalize; ++p) {
            double sum = 0.0;
            for (index_t t = 0; t < x.extents[0]; ++t)
                sum += static_cast<double>(dlogits(t, p)) * static_cast<double>(similarity(t, p));
            along[p] = static_cast<T>(sum) * sharpness;
            whole += sum;
        }
        if (normalize && dscale.present()) dscale[0] += static_cast<T>(whole);
        cpu::parallel_for(device, all.blocks(), [&](index_t task, int thread) {
            index_t s = 0, from = 0, to = 0;
            all.block(task, s, from, to);
            for (index_t t = from; t < to; ++t) {
                if (!all.valid(t)) {
                    std::fill_n(&dlogits(t, 0), slots, T(0));
                    continue;
                }
                const T inverse = cpu::detail::soft::inverse_norm(&x(t, 0), width, normalize);
                T blame = 0;
                for (index_t p = 0; p < slots; ++p) {
                    blame += dlogits(t, p) * sharpness * similarity(t, p);
                    if (normalize) dlogits(t, p) *= sharpness * inverse * norm[p];
                }
                for (index_t j = 0; j < width && normalize && dx.present(); ++j)
                    dx(t, j) -= blame * inverse * inverse * x(t, j);
            }
            if (dx.present())
                cpu::gemm_nn<T>(dlogits.slice(from, to), phi, dx.slice(from, to), cpu::Write::add,
                                part<T>(scratch, thread).gemm.data, device.isa);
        });
        if (!dphi.present()) return;
        const index_t blocks = blocks_of(width);
        cpu::parallel_for(device, blocks, [&](index_t task, int thread) {
            const index_t c0 = task * cpu::detail::soft::column_block;
            const index_t c1 = std::min(width, c0 + cpu::detail::soft::column_block);
            for (index_t s = 0; s < all.count(); ++s)
                cpu::detail::soft::add_transposed<T>(all, s, dlogits, x, c0, c1, dphi, part<T>(scratch, thread),
                                                     device.isa);
            for (index_t p = 0; p < slots && normalize; ++p)
                for (index_t j = c0; j < c1; ++j) dphi(p, j) -= along[p] * norm[p] * norm[p] * phi(p, j);
        });
    }

private:
    static index_t blocks_of(index_t width) {
        return (width + cpu::detail::soft::column_block - 1) / cpu::detail::soft::column_block;
    }
    template <class T>
    static cpu::detail::soft::Scratch<T> part(std::byte* scratch, int thread) {
        using Part = cpu::detail::soft::Scratch<T>;
        return place<Part>(scratch + thread * bytes_of<Part>());
    }

    /// Inverse norms of the slots' vectors, and room for as many numbers behind them.
    template <class T>
    struct Norms {
        view<T, 1> both;  // [2 P]
        template <class Field>
        void fields(Field&& field, index_t slots) {
            field("both", both, 2 * slots);
        }
    };
    template <class T>
    static view<T, 1> norms(const Cpu& device, view<const T, 2> phi, bool normalize, std::byte* scratch) {
        const auto room = place<Norms<T>>(
            scratch + std::max(1, device.threads) * bytes_of<cpu::detail::soft::Scratch<T>>(), phi.extents[0]);
        for (index_t p = 0; p < phi.extents[0]; ++p)
            room.both[p] = cpu::detail::soft::inverse_norm(&phi(p, 0), phi.extents[1], normalize);
        return room.both;
    }
};

}  // namespace steelyard
