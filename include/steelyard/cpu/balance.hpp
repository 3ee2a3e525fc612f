// Balance operations of the CPU: integer counts, and sums in double over fixed blocks of tokens.
#pragma once

#include <algorithm>
#include <cstddef>

#include "steelyard/cpu/parallel.hpp"
#include "steelyard/ops/balance_ops.hpp"

namespace steelyard {

template <>
struct balance_ops<Cpu> {
    /// Tokens whose sum is taken in one go. Fixed, so that results do not depend on the number of threads.
    static constexpr index_t block = 256;

    [[nodiscard]] static index_t scratch_bytes(const Cpu&, const LayerShape& shape) {
        return blocks(shape.tokens) * shape.experts * static_cast<index_t>(sizeof(double));
    }

    template <class T>
    static void count(const Cpu&, const Observation<T>& seen, view<std::int64_t, 2> load) {
        clear(load);
        each_segment(seen, load.extents[0], [&](index_t s, index_t begin, index_t end) {
            for (index_t t = begin; t < end; ++t)
                if (seen.valid(t)) add_token(seen, t, load[s]);
        });
    }

    template <class T>
    static void count_drawn(const Cpu&, const Observation<T>& seen, const TokenDraw& draw,
                            view<std::int64_t, 2> load) {
        clear(load);
        std::int64_t position = 0, taken = 0;
        const auto drawn = [&] {  // selection sampling (Knuth, algorithm S): each subset is equally likely
            const auto left = static_cast<std::uint32_t>(draw.population - position);
            const bool take = draw.stream.below(static_cast<std::uint64_t>(position), left) < draw.drawn - taken;
            ++position;
            taken += take;
            return take;
        };
        while (position < draw.first) drawn();
        for (index_t t = 0; t < seen.count(); ++t)
            if (seen.valid(t) && drawn()) add_token(seen, t, load[0]);
    }

    template <class T>
    static void sum_probs(const Cpu& device, const Observation<T>& seen, view<double, 2> sums,
                          view<std::int64_t, 1> own_tokens, std::byte* scratch) {
        const index_t experts = seen.experts(), segments = sums.extents[0];
        if (segments == 1) {  // blocks of tokens, then their sums in order
            const index_t parts = blocks(seen.count());
            const view<double, 2> partial(reinterpret_cast<double*>(scratch), parts, experts);  // [blocks, E]
            cpu::parallel_for(device, parts, [&](index_t b, int) {
                sum_rows(seen, b * block, std::min((b + 1) * block, seen.count()), partial[b]);
            });
            clear(sums);
            for (index_t b = 0; b < parts; ++b)
                for (index_t i = 0; i < experts; ++i) sums(0, i) += partial(b, i);
            own_tokens[0] = seen.valid_tokens;
            return;
        }
        cpu::parallel_for(device, segments, [&](index_t s, int) {
            const auto [begin, end] = bounds(seen, s);
            sum_rows(seen, begin, end, sums[s]);
            own_tokens[s] = 0;
            for (index_t t = begin; t < end; ++t) own_tokens[s] += seen.valid(t);
        });
    }

    template <class T>
    static void add_to_probs(const Cpu&, const Observation<T>& seen, view<const double, 2> coefficients,
                             double factor, view<T, 2> dprobs) {
        const index_t experts = seen.experts();
        each_segment(seen, coefficients.extents[0], [&](index_t s, index_t begin, index_t end) {
            const double* slope = coefficients[s].data;
            for (index_t t = begin; t < end; ++t) {
                if (!seen.valid(t)) continue;
                T* row = dprobs[t].data;
                for (index_t i = 0; i < experts; ++i) row[i] += static_cast<T>(factor * slope[i]);
            }
        });
    }

    template <class T, class Objective>
    static double sum_tokens(const Cpu& device, const Observation<T>& seen, const Objective& objective,
                             std::byte* scratch) {
        auto* partial = reinterpret_cast<double*>(scratch);  // [blocks]
        const index_t parts = blocks(seen.count());
        cpu::parallel_for(device, parts, [&](index_t b, int) {
            double sum = 0.0;
            for (index_t t = b * block; t < std::min((b + 1) * block, seen.count()); ++t)
                if (seen.valid(t)) sum += objective.loss(view<const T, 1>(seen.routing.logits[t]));
            partial[b] = sum;
        });
        double sum = 0.0;
        for (index_t b = 0; b < parts; ++b) sum += partial[b];
        return sum;
    }

    template <class T, class Objective>
    static void add_token_gradient(const Cpu& device, const Observation<T>& seen, const Objective& objective,
                                   double factor, view<T, 2> dlogits) {
        cpu::parallel_for(device, blocks(seen.count()), [&](index_t b, int) {
            for (index_t t = b * block; t < std::min((b + 1) * block, seen.count()); ++t)
                if (seen.valid(t))
                    objective.gradient(view<const T, 1>(seen.routing.logits[t]), factor, dlogits[t]);
        });
    }

private:
    static index_t blocks(index_t tokens) { return (tokens + block - 1) / block; }

    template <class V>
    static void clear(const V& tensor) {
        std::fill_n(tensor.data, tensor.size(), typename V::value_type{});
    }

    struct Bounds {
        index_t begin, end;
    };

    /// Tokens of packed sequence s; none for rows beyond the last sequence.
    template <class T>
    static Bounds bounds(const Observation<T>& seen, index_t s) {
        const auto& offsets = seen.tokens.sequences;
        if (!offsets.present()) return s == 0 ? Bounds{0, seen.count()} : Bounds{0, 0};
        return s + 1 < offsets.extents[0] ? Bounds{offsets[s], offsets[s + 1]} : Bounds{0, 0};
    }

    template <class T, class Body>
    static void each_segment(const Observation<T>& seen, index_t segments, Body&& body) {
        if (segments == 1) {
            body(index_t{0}, index_t{0}, seen.count());
            return;
        }
        for (index_t s = 0; s < segments; ++s) {
            const auto [begin, end] = bounds(seen, s);
            body(s, begin, end);
        }
    }

    template <class T>
    static void add_token(const Observation<T>& seen, index_t t, view<std::int64_t, 1> load) {
        const expert_t* chosen = seen.routing.expert[t].data;
        for (index_t k = 0; k < seen.top_k(); ++k)
            if (chosen[k] >= 0) ++load.data[chosen[k]];  // a router may give a token fewer than K experts
        ++load.data[seen.experts()];
    }

    /// sums [E] (=) the valid rows of probs in [begin, end).
    template <class T>
    static void sum_rows(const Observation<T>& seen, index_t begin, index_t end, view<double, 1> sums) {
        const index_t experts = seen.experts();
        double* sum = sums.data;
        std::fill_n(sum, experts, 0.0);
        for (index_t t = begin; t < end; ++t) {
            if (!seen.valid(t)) continue;
            const T* row = seen.routing.probs[t].data;
            for (index_t i = 0; i < experts; ++i) sum[i] += static_cast<double>(row[i]);
        }
    }
};

}  // namespace steelyard
