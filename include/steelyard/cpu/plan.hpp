// Plan kernels of the CPU device: the counting sort, dispatch and combine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/kernels.hpp"
#include "steelyard/cpu/parallel.hpp"
#include "steelyard/ops/plan_ops.hpp"

namespace steelyard {

template <>
struct plan_ops<Cpu> {
    static constexpr index_t sort_block = 1024;  // fewest tokens of one histogram
    static constexpr index_t row_block = 64;     // tokens or rows of one task

    static index_t scratch_bytes(const Cpu&, const LayerShape& shape, int) {
        return bytes_of<Histograms>(sort_blocks(shape.tokens), shape.experts);
    }

    /// A counting sort in blocks of tokens: each block counts its choices by expert, a prefix sum over (expert,
    /// block) tells each block where its rows of each expert begin, each block writes them. The result is that of
    /// one block, so the cut may follow the number of tokens.
    static void make_plan(const Cpu& device, view<const expert_t, 2> choices, const Plan<>& plan, std::byte* scratch) {
        const index_t tokens = choices.extents[0], top_k = choices.extents[1], experts = plan.experts();
        const index_t blocks = sort_blocks(tokens);
        const index_t block = blocks == 0 ? 0 : (tokens + blocks - 1) / blocks;
        const view<std::int32_t, 2> next = place<Histograms>(scratch, blocks, experts).next;

        cpu::parallel_for(device, blocks, [&](index_t b, int) {
            std::int32_t* const count = &next(b, 0);
            std::fill(count, count + experts, 0);
            for (index_t t = b * block; t < std::min(tokens, (b + 1) * block); ++t) {
                const expert_t* const chosen = &choices(t, 0);
                for (index_t k = 0; k < top_k; ++k)
                    if (chosen[k] >= 0) ++count[chosen[k]];
            }
        });

        std::int32_t row = 0;
        for (index_t e = 0; e < experts; ++e) {
            plan.offsets(e) = row;
            for (index_t b = 0; b < blocks; ++b) {
                const std::int32_t count = next(b, e);
                next(b, e) = row;
                row += count;
            }
        }
        plan.offsets(experts) = row;

        cpu::parallel_for(device, blocks, [&](index_t b, int) {
            std::int32_t* const at = &next(b, 0);
            std::int32_t* const choice = plan.choice.data;
            for (index_t t = b * block; t < std::min(tokens, (b + 1) * block); ++t) {
                const expert_t* const chosen = &choices(t, 0);
                std::int32_t* const rows = &plan.row(t, 0);
                for (index_t k = 0; k < top_k; ++k) {
                    rows[k] = chosen[k] < 0 ? -1 : at[chosen[k]]++;
                    if (rows[k] >= 0) choice[rows[k]] = static_cast<std::int32_t>(t * top_k + k);
                }
            }
        });
    }

    template <class T>
    static void dispatch(const Cpu& device, const Plan<>& plan, view<const T, 2> x, view<T, 2> rows) {
        const index_t filled = plan.offsets(plan.experts());
        const bool past_caches = cpu::exceeds_caches<T>((x.extents[0] + filled) * x.extents[1]);
        cpu::parallel_for(device, tasks_of(filled), [&](index_t task, int) {
            cpu::with_kernels(device.isa, [&](auto kernels) {
                kernels.template dispatch<T>(plan, x, rows, past_caches, task * row_block, end_of(task, filled));
            });
        });
    }

    template <class T>
    static void combine(const Cpu& device, const Plan<>& plan, view<const T, 2> rows, view<const T, 2> weight,
                        view<T, 2> y, Write write = Write::assign) {
        const index_t tokens = y.extents[0];
        const bool past_caches =
            write == Write::assign && cpu::exceeds_caches<T>((tokens + plan.offsets(plan.experts())) * y.extents[1]);
        cpu::parallel_for(device, tasks_of(tokens), [&](index_t task, int) {
            cpu::with_kernels(device.isa, [&](auto kernels) {
                kernels.template combine<T>(plan, rows, weight, y, write == Write::add, past_caches, task * row_block,
                                            end_of(task, tokens));
            });
        });
    }

    template <class T>
    static void combine_backward(const Cpu& device, const Plan<>& plan, view<const T, 2> rows, view<const T, 2> dy,
                                 view<T, 2> dweight) {
        const index_t tokens = dy.extents[0];
        cpu::parallel_for(device, tasks_of(tokens), [&](index_t task, int) {
            cpu::with_kernels(device.isa, [&](auto kernels) {
                kernels.template combine_backward<T>(plan, rows, dy, dweight, task * row_block, end_of(task, tokens));
            });
        });
    }

private:
    /// Each block's count of choices by expert, then the row its next choice of that expert takes.
    struct Histograms {
        view<std::int32_t, 2> next;  // [blocks, E]
        template <class Field>
        void fields(Field&& field, index_t blocks, index_t experts) {
            field("next", next, blocks, experts);
        }
    };

    /// Blocks of at least `sort_block` tokens, few enough for the prefix sum to cost little.
    static index_t sort_blocks(index_t tokens) { return std::min<index_t>((tokens + sort_block - 1) / sort_block, 64); }
    static index_t tasks_of(index_t items) { return cpu::detail::tasks_of(items, row_block); }
    static index_t end_of(index_t task, index_t items) { return std::min(items, (task + 1) * row_block); }
};

}  // namespace steelyard
