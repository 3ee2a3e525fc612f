// Assignment kernels of the CPU device: choices made over the batch, by a plan, by id, or cut by a threshold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/assign_auction.hpp"
#include "steelyard/cpu/assign_exact.hpp"
#include "steelyard/cpu/assign_newton.hpp"
#include "steelyard/cpu/assign_sinkhorn.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/cpu/lowest_index.hpp"
#include "steelyard/cpu/parallel.hpp"
#include "steelyard/cpu/router_token.hpp"
#include "steelyard/cpu/take_largest.hpp"
#include "steelyard/ops/assign_ops.hpp"

namespace steelyard {

template <>
struct assign_ops<Cpu> {
    static constexpr index_t block = 64;  // tokens of one task

    // ---- A balanced assignment -------------------------------------------------------------------------

    static index_t assign_scratch_bytes(const Cpu&, const LayerShape& shape) {
        return bytes_of<cpu::detail::AssignProblem>(shape) +
               std::max(bytes_of<cpu::detail::ExactScratch>(shape), bytes_of<cpu::detail::AuctionScratch>(shape));
    }

    template <class T>
    static void assign(const Cpu&, const AssignRule& rule, view<const T, 2> scores, view<const float, 1> bias,
                       view<const std::uint8_t, 1> mask, view<expert_t, 2> expert, std::byte* scratch) {
        const LayerShape shape{.tokens = scores.extents[0], .experts = scores.extents[1]};
        const auto problem = place<cpu::detail::AssignProblem>(scratch, shape);
        std::byte* const rest = scratch + bytes_of<cpu::detail::AssignProblem>(shape);
        const index_t n = problem.gather(scores, bias, mask);
        if (rule.solver == AssignSolver::exact)
            cpu::detail::ExactAssignment{problem, place<cpu::detail::ExactScratch>(rest, shape), n, shape.experts}
                .solve(rule.remainder);
        else
            cpu::detail::Auction{problem, place<cpu::detail::AuctionScratch>(rest, shape), n, shape.experts}.solve(
                rule.remainder, rule.epsilon);
        for (index_t t = 0; t < shape.tokens; ++t) expert(t, 0) = -1;
        for (index_t i = 0; i < n; ++i) expert(problem.token[i], 0) = problem.chosen[i];
    }

    // ---- Sinkhorn --------------------------------------------------------------------------------------

    static index_t sinkhorn_scratch_bytes(const Cpu& device, const LayerShape& shape) {
        return bytes_of<cpu::detail::SinkhornScratch>(shape, device.threads) +
               bytes_of<cpu::detail::NewtonScratch>(shape);
    }

    template <class T>
    static SinkhornEnd sinkhorn(const Cpu& device, const SinkhornRule& rule, view<const T, 2> scores,
                                view<const std::uint8_t, 1> mask, view<double, 1> potential, std::byte* scratch) {
        const LayerShape shape{.tokens = scores.extents[0], .experts = scores.extents[1]};
        const auto s = place<cpu::detail::SinkhornScratch>(scratch, shape, device.threads);
        const auto newton = place<cpu::detail::NewtonScratch>(
            scratch + bytes_of<cpu::detail::SinkhornScratch>(shape, device.threads), shape);
        const index_t n = s.gather(scores, mask);
        const SinkhornEnd end = cpu::detail::sinkhorn_iterate(device, rule, s, newton, n, shape.experts);
        for (index_t e = 0; e < shape.experts; ++e) potential[e] = s.potential[e];
        return end;
    }

    // ---- The best of each token, and of each expert ----------------------------------------------------

    static index_t top_choices_scratch_bytes(const Cpu& device, const LayerShape& shape) {
        return std::max(1, device.threads) * bytes_of<KeyRows>(shape.experts);
    }

    template <class T, class B>
    static void top_choices(const Cpu& device, view<const T, 2> scores, view<const B, 1> bias,
                            view<const std::uint8_t, 1> mask, view<expert_t, 2> expert, std::byte* scratch) {
        const index_t experts = scores.extents[1], top_k = expert.extents[1];
        const index_t size = cpu::padded<double>(experts), row_bytes = bytes_of<KeyRows>(experts);
        each_token(device, mask, expert, [&](index_t t, int thread) {
            const auto rows = place<KeyRows>(scratch + thread * row_bytes, experts);
            for (index_t e = 0; e < experts; ++e)
                rows.key[e] = cpu::ordered(static_cast<double>(scores(t, e)) +
                                           (bias.present() ? static_cast<double>(bias[e]) : 0.0));
            std::fill(rows.key.data + experts, rows.key.data + size, std::numeric_limits<std::int64_t>::min());
            cpu::detail::take_best(device.isa, rows.key.data, size, top_k, &expert(t, 0), rows.ranked.data);
            return true;
        });
    }

    static index_t expert_choice_scratch_bytes(const Cpu& device, const LayerShape& shape) {
        return bytes_of<ColumnRows>(shape.tokens, std::max(1, device.threads));
    }

    template <class T>
    static void expert_choice(const Cpu& device, const FillRule& fill, view<const T, 2> logits,
                              view<const std::uint8_t, 1> mask, view<expert_t, 2> expert, std::byte* scratch) {
        const index_t tokens = logits.extents[0], experts = logits.extents[1];
        const auto s = place<ColumnRows>(scratch, tokens, std::max(1, device.threads));
        each_token(device, mask, expert, [&](index_t t, int) {
            s.log_sum[t] = cpu::log_sum_exp<double>(&logits(t, 0), experts);
            std::fill_n(&expert(t, 0), experts, expert_t{-1});
            return true;
        });
        index_t valid = 0;
        for (index_t t = 0; t < tokens; ++t)
            if (!mask.present() || mask[t] != 0) s.valid[valid++] = static_cast<std::int32_t>(t);
        const index_t take = fill.capacity(valid, experts);
        // Each expert by itself: column e of `expert` is its own until every token sorts its row.
        cpu::parallel_for(device, experts, [&](index_t e, int thread) {
            std::int64_t *const key = &s.key(thread, 0), *const taken = &s.taken(thread, 0);
            for (index_t i = 0; i < valid; ++i) {
                const index_t t = s.valid[i];
                key[i] = cpu::ordered(static_cast<double>(logits(t, e)) - s.log_sum[t]);
            }
            if (take == 0) return;
            // All above the last that is taken, and the first of those that are its equals.
            cpu::take_largest(key, valid, take, taken);
            const std::int64_t last = taken[take - 1];
            index_t equals = std::count(taken, taken + take, last);
            for (index_t i = 0; i < valid; ++i)
                if (key[i] > last || (key[i] == last && equals-- > 0)) expert(s.valid[i], e) = static_cast<expert_t>(e);
        });
        each_token(device, mask, expert, [&](index_t t, int) {
            expert_t* const row = &expert(t, 0);
            index_t taken = 0;
            for (index_t e = 0; e < experts; ++e) {
                if (row[e] < 0) continue;
                row[e] = -1;
                index_t at = taken++;
                for (; at > 0 && logits(t, row[at - 1]) < logits(t, e); --at) row[at] = row[at - 1];
                row[at] = static_cast<expert_t>(e);
            }
            return true;
        });
    }

    // ---- Thresholds ------------------------------------------------------------------------------------

    template <class T>
    static void keep(const Cpu& device, const KeepRule& rule, view<const T, 2> probs, view<const float, 1> bias,
                     view<expert_t, 2> expert) {
        const index_t top_k = expert.extents[1];
        each_token(device, {}, expert, [&](index_t t, int) {
            expert_t* const row = &expert(t, 0);
            if (row[0] < 0) return true;  // masked
            double sum = static_cast<double>(probs(t, row[0]));
            index_t k = 1;
            for (; k < top_k && row[k] >= 0; ++k) {
                const double p = static_cast<double>(probs(t, row[k]));
                const double value = p + (bias.present() ? static_cast<double>(bias[row[k]]) : 0.0);
                if (rule.cumulative ? !(sum < rule.threshold) : !(value >= rule.threshold)) break;
                sum += p;
            }
            std::fill(row + k, row + top_k, expert_t{-1});
            return true;
        });
    }

    template <class T>
    static void temper(const Cpu& device, double temperature, const RouterNoise& noise, view<T, 2> logits) {
        const index_t tokens = logits.extents[0], experts = logits.extents[1];
        const Philox stream = noise.noise_stream();
        const double factor = 1.0 / temperature;
        cpu::parallel_for(device, (tokens + block - 1) / block, [&](index_t task, int) {
            for (index_t t = task * block; t < std::min(tokens, (task + 1) * block); ++t)
                for (index_t e = 0; e < experts; ++e) {
                    double value = static_cast<double>(logits(t, e));
                    if (noise.noise != 0.0) {
                        const std::uint64_t at = noise.position(t) * RouterNoise::blocks(experts);
                        const auto words = stream.words(at + static_cast<std::uint64_t>(e / 4));
                        const double unit = (static_cast<double>(words[static_cast<std::size_t>(e % 4)]) + 0.5) *
                                            0x1.0p-32;  // in (0, 1): both logarithms are finite
                        value -= noise.noise * std::log(-std::log(unit));
                    }
                    logits(t, e) = static_cast<T>(value * factor);
                }
        });
    }

    template <class T>
    static void scale(const Cpu& device, double factor, view<T, 2> matrix) {
        const index_t rows = matrix.extents[0];
        cpu::parallel_for(device, (rows + block - 1) / block, [&](index_t task, int) {
            for (index_t r = task * block; r < std::min(rows, (task + 1) * block); ++r)
                for (index_t c = 0; c < matrix.extents[1]; ++c)
                    matrix(r, c) = static_cast<T>(static_cast<double>(matrix(r, c)) * factor);
        });
    }

    // ---- Choices without scores ------------------------------------------------------------------------

    static void first_choices(const Cpu& device, view<const std::uint8_t, 1> mask, view<expert_t, 2> expert) {
        each_token(device, mask, expert, [&](index_t t, int) {
            for (index_t k = 0; k < expert.extents[1]; ++k) expert(t, k) = static_cast<expert_t>(k);
            return true;
        });
    }

    static index_t keyed_choices(const Cpu& device, const Philox& stream, view<const std::int32_t, 1> ids,
                                 index_t offset, view<const std::uint8_t, 1> mask, index_t experts,
                                 view<expert_t, 2> expert) {
        const index_t top_k = expert.extents[1];
        return each_token(device, mask, expert, [&](index_t t, int) {
            expert_t* const row = &expert(t, 0);
            std::fill_n(row, top_k, expert_t{-1});
            if (ids.present() && ids[t] < 0) return false;
            const auto key = ids.present() ? static_cast<std::uint64_t>(static_cast<std::uint32_t>(ids[t]))
                                           : static_cast<std::uint64_t>(offset + t);
            for (index_t k = 0; k < top_k; ++k) {
                const auto number = static_cast<expert_t>(keyed_draw(stream, key, k, top_k, experts));
                expert_t drawn = number, last = -1;
                while (drawn != last) {
                    last = drawn;
                    drawn = number + static_cast<expert_t>(
                                         std::count_if(row, row + k, [last](expert_t e) { return e <= last; }));
                }
                row[k] = drawn;
            }
            return true;
        });
    }

    static index_t table_choices(const Cpu& device, view<const expert_t, 2> table, view<const std::int32_t, 1> ids,
                                 view<const std::uint8_t, 1> mask, view<expert_t, 2> expert) {
        const index_t top_k = expert.extents[1], size = table.extents[0];
        return each_token(device, mask, expert, [&](index_t t, int) {
            const bool known = ids[t] >= 0 && ids[t] < size;
            for (index_t k = 0; k < top_k; ++k) expert(t, k) = known ? table(ids[t], k) : -1;
            return known;
        });
    }

    static index_t own_choices(const Cpu& device, view<const std::int32_t, 1> ids, view<const std::uint8_t, 1> mask,
                               index_t experts, view<expert_t, 2> expert) {
        const index_t top_k = expert.extents[1];
        return each_token(device, mask, expert, [&](index_t t, int) {
            const bool known = ids[t] >= 0 && ids[t] < experts / top_k;
            for (index_t k = 0; k < top_k; ++k) expert(t, k) = known ? static_cast<expert_t>(ids[t] * top_k + k) : -1;
            return known;
        });
    }

    template <class T>
    static void fixed_weights(const Cpu& device, double weight, const Routing<T>& routing) {
        const index_t experts = routing.probs.extents[1], top_k = routing.expert.extents[1];
        each_token(device, {}, routing.expert, [&](index_t t, int) {
            std::fill_n(&routing.logits(t, 0), experts, T(0));
            std::fill_n(&routing.probs(t, 0), experts, T(0));
            index_t count = 0;
            for (index_t k = 0; k < top_k; ++k) count += routing.expert(t, k) >= 0 ? 1 : 0;
            for (index_t k = 0; k < top_k; ++k) {
                const expert_t e = routing.expert(t, k);
                routing.weight(t, k) = e >= 0 ? static_cast<T>(weight) : T(0);
                if (e >= 0) routing.probs(t, e) = T(1) / static_cast<T>(count);
            }
            return true;
        });
    }

private:
    /// One thread's keys of a token's experts.
    struct KeyRows {
        view<std::int64_t, 1> key, ranked;  // [E]
        template <class Field>
        void fields(Field&& field, index_t experts) {
            field("key", key, cpu::padded<double>(experts));
            field("ranked", ranked, cpu::padded<double>(experts));
        }
    };

    /// The valid tokens, and one thread's keys and order of them.
    struct ColumnRows {
        view<double, 1> log_sum;      // [T]  log of the sum of exp(logits)
        view<std::int32_t, 1> valid;  // [T]
        view<std::int64_t, 2> key;    // [threads, T]
        view<std::int64_t, 2> taken;  // [threads, T]
        template <class Field>
        void fields(Field&& field, index_t tokens, int threads) {
            field("log_sum", log_sum, tokens);
            field("valid", valid, tokens);
            field("key", key, static_cast<index_t>(threads), tokens);
            field("taken", taken, static_cast<index_t>(threads), tokens);
        }
    };

    /// Calls body(token, thread) for each valid token and writes -1 for the others. Returns the first token for which
    /// the body said false, or -1.
    template <class Body>
    static index_t each_token(const Cpu& device, view<const std::uint8_t, 1> mask, view<expert_t, 2> expert,
                              Body&& body) {
        const index_t tokens = expert.extents[0];
        cpu::LowestIndex first_bad;
        cpu::parallel_for(device, (tokens + block - 1) / block, [&](index_t task, int thread) {
            for (index_t t = task * block; t < std::min(tokens, (task + 1) * block); ++t)
                if (mask.present() && mask[t] == 0)
                    std::fill_n(&expert(t, 0), expert.extents[1], expert_t{-1});
                else if (!body(t, thread))
                    first_bad.report(t);
        });
        return first_bad.get();
    }
};

}  // namespace steelyard
