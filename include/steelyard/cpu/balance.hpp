// Balance operations of the CPU: integer counts, and sums in double over fixed blocks of tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "steelyard/cpu/kernels.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/cpu/parallel.hpp"
#include "steelyard/ops/balance_ops.hpp"

namespace steelyard {

namespace cpu {

/// RowMath (balance/objective.hpp) with the vectorised exponential. The order of sums is that of the row's length.
struct RowMath {
    /// exp(x) for x up to 0, or above it by no more than rounding.
    template <class T>
    static T exp(T x) {
        return exp_negative(x);
    }
    /// out[i] += factor exp(row[i] - shift), where no row[i] is above the shift by more than rounding.
    template <class T>
    static void add_exp(view<const T, 1> row, T shift, T factor, view<T, 1> out) {
        for (index_t i = 0; i < row.extents[0]; ++i) out.data[i] += factor * exp_negative(row.data[i] - shift);
    }
    template <class T>
    static T log_sum_exp(view<const T, 1> row) {
        return cpu::log_sum_exp<T>(row.data, row.extents[0]);
    }
};

/// The same by the kernels of an instruction set, which have it for float.
template <class Kernels>
struct KernelMath : RowMath {
    template <class T>
    static void add_exp(view<const T, 1> row, T shift, T factor, view<T, 1> out) {
        if constexpr (sizeof(T) == 4)
            Kernels::add_exp(row.data, row.extents[0], shift, factor, out.data);
        else
            RowMath::add_exp(row, shift, factor, out);
    }
    template <class T>
    static T log_sum_exp(view<const T, 1> row) {
        if constexpr (sizeof(T) == 4)
            return Kernels::log_sum_exp(row.data, row.extents[0]);
        else
            return RowMath::log_sum_exp(row);
    }
};

}  // namespace cpu

template <>
struct balance_ops<Cpu> {
    /// Tokens whose sum is taken in one go. Fixed, so that results do not depend on the number of threads.
    static constexpr index_t block = 256;

    [[nodiscard]] static index_t scratch_bytes(const Cpu&, const LayerShape& shape) {
        return blocks(shape.tokens) * shape.experts * static_cast<index_t>(sizeof(double));
    }

    template <class T, class Tally = Choices>
    static void count(const Cpu&, const Observation<T>& seen, view<std::int64_t, 2> load, const Tally& tally = {},
                      std::byte* = nullptr) {
        clear(load);
        const Tallier<T, Tally> tallier(seen, tally);
        each_segment(seen, load.extents[0], [&](index_t s, index_t begin, index_t end) {
            for (index_t t = begin; t < end; ++t)
                if (seen.counts(t)) tallier.add(t, load[s].data);
        });
    }

    template <class T, class Tally = Choices>
    static void count_drawn(const Cpu&, const Observation<T>& seen, const TokenDraw& draw, view<std::int64_t, 2> load,
                            const Tally& tally = {}, std::byte* = nullptr) {
        clear(load);
        const Tallier<T, Tally> tallier(seen, tally);
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
            if (seen.valid(t) && drawn() && seen.counts(t)) tallier.add(t, load[0].data);
    }

    template <class T, Quantity Q>
    static void sum_quantity(const Cpu& device, const Observation<T>& seen, view<double, 2> sums,
                             view<std::int64_t, 1> own_tokens, std::byte* scratch) {
        const index_t experts = seen.experts(), segments = sums.extents[0];
        if (segments == 1) {  // blocks of tokens, then their sums in order
            const index_t parts = blocks(seen.count());
            const view<double, 2> partial(reinterpret_cast<double*>(scratch), parts, experts);  // [blocks, E]
            cpu::parallel_for(device, parts, [&](index_t b, int) {
                sum_rows<T, Q>(device, seen, b * block, std::min((b + 1) * block, seen.count()), partial[b]);
            });
            clear(sums);
            for (index_t b = 0; b < parts; ++b)
                for (index_t i = 0; i < experts; ++i) sums(0, i) += partial(b, i);
            own_tokens[0] = seen.only_id < 0 ? seen.valid_tokens : counted(seen, 0, seen.count());
            return;
        }
        cpu::parallel_for(device, segments, [&](index_t s, int) {
            const auto [begin, end] = bounds(seen, s);
            sum_rows<T, Q>(device, seen, begin, end, sums[s]);
            own_tokens[s] = counted(seen, begin, end);
        });
    }

    template <class T, Quantity Q>
    static void add_quantity_gradient(const Cpu&, const Observation<T>& seen, view<const double, 2> coefficients,
                                      double factor, const RoutingGrad<T>& grad, std::byte* = nullptr) {
        const index_t experts = seen.experts(), top_k = seen.top_k();
        each_segment(seen, coefficients.extents[0], [&](index_t s, index_t begin, index_t end) {
            const double* slope = coefficients[s].data;
            for (index_t t = begin; t < end; ++t) {
                if (!seen.counts(t)) continue;
                if constexpr (Q == Quantity::gates) {
                    const expert_t* chosen = seen.routing.expert[t].data;
                    T* row = grad.weight[t].data;
                    for (index_t k = 0; k < top_k; ++k)
                        if (chosen[k] >= 0) row[k] += static_cast<T>(factor * slope[chosen[k]]);
                } else {
                    T* row = (Q == Quantity::probs ? grad.probs : grad.smooth_load)[t].data;
                    for (index_t i = 0; i < experts; ++i) row[i] += static_cast<T>(factor * slope[i]);
                }
            }
        });
    }

    template <class T, class Objective>
    static void sum_tokens(const Cpu& device, const Observation<T>& seen, const Objective& objective,
                           view<double, 1> loss, std::byte* scratch) {
        auto* partial = reinterpret_cast<double*>(scratch);  // [blocks]
        const index_t parts = blocks(seen.count());
        with_math<T>(device, [&](auto math) {
            cpu::parallel_for(device, parts, [&](index_t b, int) {
                double sum = 0.0;
                for (index_t t = b * block; t < std::min((b + 1) * block, seen.count()); ++t)
                    if (seen.counts(t)) sum += token_loss(objective, view<const T, 1>(seen.routing.logits[t]), math);
                partial[b] = sum;
            });
        });
        loss[0] = 0.0;
        for (index_t b = 0; b < parts; ++b) loss[0] += partial[b];
    }

    template <class T, class Objective>
    static void add_token_gradient(const Cpu& device, const Observation<T>& seen, const Objective& objective,
                                   double factor, view<T, 2> dlogits, std::byte* = nullptr) {
        with_math<T>(device, [&](auto math) {
            cpu::parallel_for(device, blocks(seen.count()), [&](index_t b, int) {
                for (index_t t = b * block; t < std::min((b + 1) * block, seen.count()); ++t)
                    if (seen.counts(t)) {
                        const view<const T, 1> logits = seen.routing.logits[t];
                        if constexpr (requires { objective.gradient(logits, factor, dlogits[t], math); })
                            objective.gradient(logits, factor, dlogits[t], math);
                        else
                            objective.gradient(logits, factor, dlogits[t]);
                    }
            });
        });
    }

private:
    /// body(RowMath of the device).
    template <class T, class Body>
    static void with_math(const Cpu& device, Body&& body) {
        if constexpr (sizeof(T) == 4)
            cpu::with_kernels(device.isa, [&](auto kernels) { body(cpu::KernelMath<decltype(kernels)>{}); });
        else
            body(cpu::RowMath{});
    }

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

    /// Adds one token to a row of a load.
    template <class T, class Tally>
    struct Tallier;

    template <class T>
    struct Tallier<T, Choices> {
        const Observation<T>& seen;
        Tallier(const Observation<T>& observation, const Choices&) : seen(observation) {}
        void add(index_t t, std::int64_t* load) const {
            const expert_t* chosen = seen.routing.expert[t].data;
            for (index_t k = 0; k < seen.top_k(); ++k)
                if (chosen[k] >= 0) ++load[chosen[k]];  // a router may give a token fewer than K experts
            ++load[seen.experts()];
        }
    };

    template <class T, Quantity Q>
    struct Tallier<T, FixedSums<Q>> {
        const Observation<T>& seen;
        Tallier(const Observation<T>& observation, const FixedSums<Q>&) : seen(observation) {}
        void add(index_t t, std::int64_t* load) const {
            const index_t experts = seen.experts();
            ++load[experts];
            if constexpr (Q == Quantity::gates) {
                const expert_t* chosen = seen.routing.expert[t].data;
                const T* weight = seen.routing.weight[t].data;
                for (index_t k = 0; k < seen.top_k(); ++k)
                    if (chosen[k] >= 0) load[chosen[k]] += FixedPoint::from(static_cast<double>(weight[k]));
            } else {
                const T* row = quantity<Q>(seen)[t].data;
                for (index_t i = 0; i < experts; ++i) load[i] += FixedPoint::from_small(static_cast<double>(row[i]));
            }
        }
    };

    template <class T>
    struct Tallier<T, Shortfalls<HostSpace>> {
        const Observation<T>& seen;
        const Shortfalls<HostSpace>& tally;
        ShortfallBins bins;
        Tallier(const Observation<T>& observation, const Shortfalls<HostSpace>& of)
            : seen(observation), tally(of), bins(of.bias, of.bins) {}

        [[nodiscard]] double score(index_t t, index_t e) const {
            return static_cast<double>(tally.score == Score::softmax ? seen.routing.probs(t, e)
                                                                     : cpu::sigmoid(seen.routing.logits(t, e)));
        }
        void add(index_t t, std::int64_t* load) const {
            const index_t experts = seen.experts(), top_k = seen.top_k();
            const expert_t* chosen = seen.routing.expert[t].data;
            double cutoff = -std::numeric_limits<double>::infinity();
            for (index_t e = 0; e < experts; ++e)
                if (std::find(chosen, chosen + top_k, static_cast<expert_t>(e)) == chosen + top_k)
                    cutoff = std::max(cutoff, score(t, e) + static_cast<double>(tally.bias[e]));
            if (!std::isfinite(cutoff)) return;
            for (index_t e = 0; e < experts; ++e) ++load[e * tally.bins + bins.bin(cutoff - score(t, e))];
            for (index_t k = 0; k < top_k; ++k) load[experts * tally.bins] += chosen[k] >= 0;
        }
    };

    template <Quantity Q, class T>
    static view<T, 2> quantity(const Observation<T>& seen) {
        static_assert(Q != Quantity::gates, "gates are not a tensor of their own: they are the weights of the chosen");
        return Q == Quantity::probs ? seen.routing.probs : seen.routing.smooth_load;
    }

    template <class T, class Objective, class Math>
    static double token_loss(const Objective& objective, const view<const T, 1>& logits, Math math) {
        if constexpr (requires { objective.loss(logits, math); })
            return objective.loss(logits, math);
        else
            return objective.loss(logits);
    }

    template <class T>
    static std::int64_t counted(const Observation<T>& seen, index_t begin, index_t end) {
        std::int64_t tokens = 0;
        for (index_t t = begin; t < end; ++t) tokens += seen.counts(t);
        return tokens;
    }

    /// sums [E] (=) the quantity of the tokens in [begin, end).
    template <class T, Quantity Q>
    static void sum_rows(const Cpu& device, const Observation<T>& seen, index_t begin, index_t end,
                         view<double, 1> sums) {
        const index_t experts = seen.experts();
        double* const sum = sums.data;
        if constexpr (Q == Quantity::gates) {
            std::fill_n(sum, experts, 0.0);
            for (index_t t = begin; t < end; ++t) {
                if (!seen.counts(t)) continue;
                const expert_t* chosen = seen.routing.expert[t].data;
                for (index_t k = 0; k < seen.top_k(); ++k)
                    if (chosen[k] >= 0) sum[chosen[k]] += static_cast<double>(seen.routing.weight(t, k));
            }
        } else {
            const T* row[block];
            const view<T, 2> from = quantity<Q>(seen);
            bool add = false;
            do {  // a packed sequence may be longer than a block
                index_t count = 0;
                for (; begin < end && count < block; ++begin)
                    if (seen.counts(begin)) row[count++] = &from(begin, 0);
                cpu::with_kernels(device.isa,
                                  [&](auto kernels) { kernels.template sum_rows<T>(row, count, experts, add, sum); });
                add = true;
            } while (begin < end);
        }
    }
};

}  // namespace steelyard
