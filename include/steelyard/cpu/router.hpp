// Router kernels of the CPU device: logits, selection, and their gradients over blocks of tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/draw.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/kernels.hpp"
#include "steelyard/cpu/lowest_index.hpp"
#include "steelyard/cpu/parallel.hpp"
#include "steelyard/cpu/router_token.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard {

template <>
struct router_ops<Cpu> {
    // Fixed cuts of the work: they never depend on the number of threads, but for those of logits, whose bits no cut
    // changes.
    static constexpr index_t select_block = cpu::select_block;  // tokens
    static constexpr index_t logits_block = 192;                // tokens of one product
    static constexpr index_t logits_experts = 16;               // experts, where tokens are few; a multiple of 4
    static constexpr index_t width_block = 128;                 // columns of x, in the gradient of the weights
    static constexpr index_t expert_block = 128;                // experts, in the gradient of the weights
    static constexpr index_t token_block = 256;  // tokens brought into it at once, one block after the other

    template <class T>
    static index_t scratch_bytes(const Cpu& device, const LayerShape& shape) {
        return std::max(1, device.threads) * thread_bytes<T>(shape.width, shape.experts);
    }

    template <class T>
    static void logits(const Cpu& device, view<const T, 2> x, view<const T, 2> weight, const RouterNoise& noise,
                       view<T, 2> logits, std::byte* scratch) {
        const index_t tokens = x.extents[0], width = x.extents[1], experts = weight.extents[0];
        const index_t at_once = experts_at_once(device, tokens, width, experts, noise);
        const index_t cuts = cpu::detail::tasks_of(experts, at_once);
        cpu::parallel_for(device, cpu::detail::tasks_of(tokens, logits_block) * cuts, [&](index_t task, int thread) {
            const Scratch<T> own(scratch, thread, width, experts);
            const index_t begin = task / cuts * logits_block, rows = std::min(logits_block, tokens - begin);
            const index_t first = task % cuts * at_once, columns = std::min(at_once, experts - first);
            view<const T, 2> input = x.slice(begin, begin + rows);
            if (noise.jitter != 0.0) {
                const view<T, 2> copy(own.block, rows, width);
                for (index_t t = 0; t < rows; ++t)
                    cpu::jitter_row<T>(device, noise, {begin + t, width, 0, width}, &input(t, 0), &copy(t, 0));
                input = copy;
            }
            const view<T, 2> out = tile(logits, begin, rows, first, columns);
            cpu::with_kernels(device.isa, [&](auto kernels) {
                using Kernels = decltype(kernels);
                static_assert(Kernels::template logits_room<T> * sizeof(T) <= cpu::gemm_scratch_bytes<T>());
                Kernels::template logits<T>(input, weight.slice(first, first + columns), out,
                                            reinterpret_cast<T*>(own.gemm));
            });
            if (noise.noise != 0.0) add_noise(device, noise, begin, first, experts, out);
        });
    }

    template <class T>
    static void add_bias(const Cpu& device, view<const T, 1> bias, view<T, 2> logits) {
        const index_t tokens = logits.extents[0], experts = logits.extents[1];
        cpu::parallel_for(device, cpu::detail::tasks_of(tokens, select_block), [&](index_t task, int) {
            for (index_t t = task * select_block; t < std::min(tokens, (task + 1) * select_block); ++t)
                for (index_t e = 0; e < experts; ++e) logits(t, e) += bias[e];
        });
    }

    /// Each sum in double and by ascending token, whichever thread has the expert.
    template <class T>
    static void bias_backward(const Cpu& device, view<const T, 2> dlogits, view<T, 1> dbias) {
        const index_t tokens = dlogits.extents[0], experts = dlogits.extents[1];
        cpu::parallel_for(device, cpu::detail::tasks_of(experts, expert_block), [&](index_t task, int) {
            const index_t begin = task * expert_block, end = std::min(experts, begin + expert_block);
            double sums[expert_block] = {};
            for (index_t t = 0; t < tokens; ++t)
                for (index_t e = begin; e < end; ++e) sums[e - begin] += static_cast<double>(dlogits(t, e));
            for (index_t e = begin; e < end; ++e) dbias[e] += static_cast<T>(sums[e - begin]);
        });
    }

    template <class T>
    static index_t select(const Cpu& device, const SelectionRule& rule, view<const float, 1> bias,
                          view<const std::uint8_t, 1> mask, const Routing<T>& routing, std::byte* scratch) {
        return each_block(device, cpu::SelectCall<T>{rule, bias, mask, routing, true}, scratch,
                          [&](const auto& rows, const T* logits, T* probs, expert_t* expert, T* weight) {
                              return cpu::detail::select_token<T>(device.isa, rule, bias.data,
                                                                  routing.logits.extents[1], rows, logits, probs,
                                                                  expert, weight);
                          });
    }

    template <class T>
    static index_t weigh(const Cpu& device, const SelectionRule& rule, view<const std::uint8_t, 1> mask,
                         const Routing<T>& routing, std::byte* scratch) {
        const index_t top_k = routing.expert.extents[1];
        return each_block(device, cpu::SelectCall<T>{rule, {}, mask, routing, false}, scratch,
                          [&](const auto& rows, const T* logits, T* probs, const expert_t* expert, T* weight) {
                              const bool finite =
                                  cpu::detail::score_token<T>(rule, routing.logits.extents[1], rows, logits, probs);
                              cpu::detail::weigh_token<T>(rule, rows, logits, probs, expert, top_k, weight);
                              return finite;
                          });
    }

    template <class T>
    static void take_all(const Cpu& device, view<const std::uint8_t, 1> mask, const Routing<T>& routing) {
        const index_t tokens = routing.logits.extents[0], experts = routing.logits.extents[1];
        cpu::parallel_for(device, cpu::detail::tasks_of(tokens, select_block), [&](index_t task, int) {
            for (index_t t = task * select_block; t < std::min(tokens, (task + 1) * select_block); ++t) {
                const bool valid = !mask.present() || mask[t] != 0;
                for (index_t e = 0; e < experts; ++e) {
                    routing.logits(t, e) = T(0);
                    routing.probs(t, e) = valid ? T(1) / static_cast<T>(experts) : T(0);
                    routing.expert(t, e) = valid ? static_cast<expert_t>(e) : expert_t{-1};
                    routing.weight(t, e) = valid ? T(1) : T(0);
                }
            }
        });
    }

    template <class T>
    static void select_backward(const Cpu& device, const SelectionRule& rule, view<const std::uint8_t, 1> mask,
                                const Routing<T>& routing, const RoutingGrad<T>& grad) {
        const index_t tokens = routing.logits.extents[0], experts = routing.logits.extents[1];
        [[maybe_unused]] const cpu::SelectCall<T> call{rule, {}, mask, routing, false};
        cpu::parallel_for(device, cpu::detail::tasks_of(tokens, select_block), [&](index_t task, int) {
            const index_t begin = task * select_block, end = std::min(tokens, begin + select_block);
            if constexpr (sizeof(T) == 4) {
                cpu::with_kernels(device.isa,
                                  [&](auto kernels) { kernels.template select_backward<T>(call, grad, begin, end); });
            } else {
                for (index_t t = begin; t < end; ++t) {
                    T* const out = &grad.logits(t, 0);
                    if (mask.present() && mask[t] == 0)
                        std::fill(out, out + experts, T(0));
                    else
                        cpu::detail::token_backward<T>(rule, experts, routing.expert.extents[1], &routing.logits(t, 0),
                                                       &routing.probs(t, 0), &routing.expert(t, 0),
                                                       &routing.weight(t, 0),
                                                       grad.weight.present() ? &grad.weight(t, 0) : nullptr,
                                                       grad.probs.present() ? &grad.probs(t, 0) : nullptr, out);
                }
            }
        });
    }

    template <class T>
    static void logits_backward(const Cpu& device, view<const T, 2> x, view<const std::uint8_t, 1> mask,
                                view<const T, 2> weight, const RouterNoise& noise, view<const T, 2> dlogits,
                                view<T, 2> dx, view<T, 2> dweight, std::byte* scratch) {
        if (dx.present()) input_gradient<T>(device, weight, noise, dlogits, dx, scratch);
        if (dweight.present()) weight_gradient<T>(device, x, mask, noise, dlogits, dweight, scratch);
    }

private:
    /// Experts of one task of `logits`: all of them, unless there are fewer blocks of tokens than threads, and work
    /// worth a thread's start, some ten microseconds of it. A weight is read whole even for a single token, which then
    /// costs as much as eight. Each task would draw jitter anew.
    static index_t experts_at_once(const Cpu& device, index_t tokens, index_t width, index_t experts,
                                   const RouterNoise& noise) {
        const bool cut = noise.jitter == 0.0 && cpu::detail::tasks_of(tokens, logits_block) < device.threads &&
                         (tokens + 8) * width * experts >= index_t{1} << 20;
        return cut ? logits_experts : std::max<index_t>(1, experts);
    }

    /// For the token and the expert that `logits` begins with; the latter is a multiple of 4.
    template <class T>
    static void add_noise(const Cpu& device, const RouterNoise& noise, index_t token, index_t expert, index_t experts,
                          view<T, 2> logits) {
        constexpr index_t at_once = 128;
        T added[at_once];
        const index_t count = logits.extents[1];
        for (index_t t = 0; t < logits.extents[0]; ++t)
            for (index_t j = 0; j < count; j += at_once) {
                const index_t here = std::min(at_once, count - j), begin = expert + j;
                cpu::noise_row<T>(device, noise, {token + t, experts, begin, begin + here}, added);
                for (index_t i = 0; i < here; ++i) logits(t, j + i) += added[i];
            }
    }

    template <class T>
    static index_t select_bytes(index_t experts) {
        return bytes_of<cpu::detail::SelectRows<T>>(experts) + bytes_of<cpu::SelectColumns<T>>(experts);
    }

    /// Blocks of tokens by the kernels; by token(rows, logits, probs, expert, weight) whoever has more choices than
    /// registers hold, and rows that are not finite, whose experts come from integers. Returns the first valid token
    /// whose logits are not all finite, or -1.
    template <class T, class Token>
    static index_t each_block(const Cpu& device, const cpu::SelectCall<T>& call, std::byte* scratch, Token&& token) {
        const Routing<T>& routing = call.routing;
        const index_t tokens = routing.logits.extents[0], experts = routing.logits.extents[1];
        const index_t top_k = routing.expert.extents[1], own_bytes = select_bytes<T>(experts);
        const bool by_block = sizeof(T) == 4 && top_k <= cpu::select_choices && finite(call.bias);
        cpu::LowestIndex first_bad;
        cpu::parallel_for(device, cpu::detail::tasks_of(tokens, select_block), [&](index_t task, int thread) {
            std::byte* const own = scratch + thread * own_bytes;
            const index_t begin = task * select_block, end = std::min(tokens, begin + select_block);
            std::uint64_t left = ~std::uint64_t{0};
            if constexpr (sizeof(T) == 4)
                if (by_block) {
                    const auto columns = place<cpu::SelectColumns<T>>(own, experts);
                    left = cpu::with_kernels(device.isa, [&](auto kernels) {
                        return kernels.template select<T>(call, begin, end, columns);
                    });
                }
            if (left == 0) return;
            const auto rows =
                place<cpu::detail::SelectRows<T>>(own + bytes_of<cpu::SelectColumns<T>>(experts), experts);
            for (index_t t = begin; t < end; ++t) {
                if ((left >> (t - begin) & 1) == 0) continue;
                T* const probs = &routing.probs(t, 0);
                expert_t* const expert = &routing.expert(t, 0);
                T* const weight = &routing.weight(t, 0);
                if (call.mask.present() && call.mask[t] == 0) {
                    std::fill(probs, probs + experts, T(0));
                    std::fill(expert, expert + top_k, expert_t{-1});
                    std::fill(weight, weight + top_k, T(0));
                } else if (!token(rows, &routing.logits(t, 0), probs, expert, weight)) {
                    first_bad.report(t);
                }
            }
        });
        return first_bad.get();
    }

    static bool finite(const view<const float, 1>& bias) {
        for (index_t e = 0; bias.present() && e < bias.extents[0]; ++e)
            if (!std::isfinite(bias[e])) return false;
        return true;
    }

    template <class T>
    static index_t thread_bytes(index_t width, index_t experts) {
        const index_t block = std::max(logits_block * width, token_block * width_block);
        return std::max(select_bytes<T>(experts),
                        align(cpu::gemm_scratch_bytes<T>()) + align(block * static_cast<index_t>(sizeof(T))));
    }
    static constexpr index_t align(index_t bytes) {
        return (bytes + layout_alignment - 1) / layout_alignment * layout_alignment;
    }

    /// One thread's room for a product and for a changed copy of its input.
    template <class T>
    struct Scratch {
        std::byte* gemm;
        T* block;
        Scratch(std::byte* scratch, int thread, index_t width, index_t experts)
            : gemm(scratch + thread * thread_bytes<T>(width, experts)),
              block(reinterpret_cast<T*>(gemm + align(cpu::gemm_scratch_bytes<T>()))) {}
    };

    /// dx += (dlogits weight) * jitter, over blocks of tokens.
    template <class T>
    static void input_gradient(const Cpu& device, view<const T, 2> weight, const RouterNoise& noise,
                               view<const T, 2> dlogits, view<T, 2> dx, std::byte* scratch) {
        const index_t tokens = dlogits.extents[0], experts = dlogits.extents[1], width = weight.extents[1];
        cpu::parallel_for(device, cpu::detail::tasks_of(tokens, logits_block), [&](index_t task, int thread) {
            const Scratch<T> own(scratch, thread, width, experts);
            const index_t begin = task * logits_block, end = std::min(tokens, begin + logits_block);
            if (noise.jitter == 0.0) {
                cpu::gemm_nn<T>(dlogits.slice(begin, end), weight, dx.slice(begin, end), cpu::Write::add, own.gemm,
                                device.isa);
                return;
            }
            view<T, 2> block(own.block, end - begin, width);
            cpu::gemm_nn<T>(dlogits.slice(begin, end), weight, block, cpu::Write::assign, own.gemm, device.isa);
            for (index_t t = begin; t < end; ++t) {
                T* const row = &block(t - begin, 0);
                cpu::jitter_row<T>(device, noise, {t, width, 0, width}, row, row);
                for (index_t j = 0; j < width; ++j) dx(t, j) += row[j];
            }
        });
    }

    /// dweight += dlogits^T (x * jitter), over tiles of the weights; each tile adds its tokens in order.
    template <class T>
    static void weight_gradient(const Cpu& device, view<const T, 2> x, view<const std::uint8_t, 1> mask,
                                const RouterNoise& noise, view<const T, 2> dlogits, view<T, 2> dweight,
                                std::byte* scratch) {
        const index_t tokens = x.extents[0], width = x.extents[1], experts = dlogits.extents[1];
        const index_t expert_tiles = cpu::detail::tasks_of(experts, expert_block);
        const index_t tasks = cpu::detail::tasks_of(width, width_block) * expert_tiles;
        cpu::parallel_for(device, tasks, [&](index_t task, int thread) {
            const Scratch<T> own(scratch, thread, width, experts);
            const index_t column = task / expert_tiles * width_block, columns = std::min(width_block, width - column);
            const index_t row = task % expert_tiles * expert_block, rows = std::min(expert_block, experts - row);
            const view<T, 2> out = tile(dweight, row, rows, column, columns);
            for (index_t begin = 0; begin < tokens; begin += token_block) {
                const index_t end = std::min(tokens, begin + token_block);
                view<const T, 2> input = tile(x, begin, end - begin, column, columns);
                if (noise.jitter != 0.0 || any_masked(mask, begin, end)) {
                    view<T, 2> copy(own.block, end - begin, columns);
                    for (index_t t = begin; t < end; ++t) {
                        T* const to = &copy(t - begin, 0);
                        if (mask.present() && mask[t] == 0)
                            std::fill(to, to + columns, T(0));
                        else if (noise.jitter != 0.0)
                            cpu::jitter_row<T>(device, noise, {t, width, column, column + columns}, &x(t, column), to);
                        else
                            std::copy_n(&x(t, column), columns, to);
                    }
                    input = copy;
                }
                cpu::gemm_tn<T>(tile(dlogits, begin, end - begin, row, rows), input, out, cpu::Write::add, own.gemm,
                                device.isa);
            }
        });
    }

    static bool any_masked(view<const std::uint8_t, 1> mask, index_t begin, index_t end) {
        if (!mask.present()) return false;
        for (index_t t = begin; t < end; ++t)
            if (mask[t] == 0) return true;
        return false;
    }

    /// A rectangle of a matrix.
    template <class T>
    static view<T, 2> tile(const view<T, 2>& matrix, index_t row, index_t rows, index_t column, index_t columns) {
        view<T, 2> part = matrix.slice(row, row + rows);
        part.data += column;
        part.extents[1] = columns;
        return part;
    }
};

}  // namespace steelyard
