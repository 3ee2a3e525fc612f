// Two levels of gates joined into one routing, on the CPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "steelyard/cpu/gating_rows.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/ops/gating_ops.hpp"

namespace steelyard {

template <>
struct level_ops<Cpu> {
    static void mean_bias(const Cpu&, view<const float, 1> bias, view<float, 1> mean) {
        const index_t groups = mean.extents[0], members = bias.extents[0] / groups;
        for (index_t g = 0; g < groups; ++g) {
            double sum = 0.0;
            for (index_t j = 0; j < members; ++j) sum += static_cast<double>(bias[g * members + j]);
            mean[g] = static_cast<float>(sum / static_cast<double>(members));
        }
    }

    template <class T>
    static void join(const Cpu& device, view<const std::uint8_t, 1> mask, const Routing<T>& outer,
                     const Routing<T>& inner, const Routing<T>& routing) {
        const Sizes n(outer, inner);
        cpu::detail::each_row(device, routing.logits.extents[0], [&](index_t t, int) {
            T* const logits = &routing.logits(t, 0);
            T* const probs = &routing.probs(t, 0);
            expert_t* const expert = &routing.expert(t, 0);
            T* const weight = &routing.weight(t, 0);
            if (!cpu::detail::valid_token(mask, t)) {
                std::fill(probs, probs + n.groups * n.members, T(0));
                std::fill(expert, expert + n.outer_k * n.inner_k, expert_t{-1});
                std::fill(weight, weight + n.outer_k * n.inner_k, T(0));
                return;
            }
            for (index_t g = 0; g < n.groups; ++g) {
                T* const row = logits + g * n.members;
                const T lift = outer.logits(t, g) - cpu::log_sum_exp<T>(row, n.members);
                for (index_t j = 0; j < n.members; ++j) row[j] += lift;
                for (index_t j = 0; j < n.members; ++j) probs[g * n.members + j] *= outer.probs(t, g);
            }
            index_t count = 0;
            for (index_t a = 0; a < n.outer_k; ++a)
                for (index_t b = 0; b < n.inner_k; ++b) {
                    const index_t g = outer.expert(t, a), slot = g * n.inner_k + b;
                    const auto e = static_cast<expert_t>(g * n.members + inner.expert(t, slot));
                    index_t at = count++;
                    for (; at > 0 && before(logits, e, expert[at - 1]); --at) {
                        expert[at] = expert[at - 1];
                        weight[at] = weight[at - 1];
                    }
                    expert[at] = e;
                    weight[at] = outer.weight(t, a) * inner.weight(t, slot);
                }
        });
    }

    template <class T>
    static void split(const Cpu& device, view<const std::uint8_t, 1> mask, const Routing<T>& routing,
                      const Routing<T>& outer, const Routing<T>& inner) {
        const Sizes n(outer, inner);
        cpu::detail::each_row(device, routing.logits.extents[0], [&](index_t t, int) {
            expert_t* const groups = &outer.expert(t, 0);
            expert_t* const members = &inner.expert(t, 0);
            std::fill(groups, groups + n.outer_k, expert_t{-1});
            std::fill(members, members + n.groups * n.inner_k, expert_t{-1});
            if (!cpu::detail::valid_token(mask, t)) return;
            for (index_t g = 0; g < n.groups; ++g) {
                const T* const row = &routing.logits(t, g * n.members);
                const T all = cpu::log_sum_exp<T>(row, n.members);
                outer.logits(t, g) = all;
                for (index_t j = 0; j < n.members; ++j) inner.logits(t, g * n.members + j) = row[j] - all;
            }
            for (index_t k = 0; k < n.outer_k * n.inner_k; ++k) {
                const auto g = static_cast<expert_t>(routing.expert(t, k) / n.members);
                *std::find_if(groups, groups + n.outer_k, [g](expert_t x) { return x == g || x < 0; }) = g;
                expert_t* const slots = members + g * n.inner_k;
                *std::find(slots, slots + n.inner_k, expert_t{-1}) =
                    static_cast<expert_t>(routing.expert(t, k) - g * n.members);
            }
        });
    }

    template <class T>
    static void split_gradient(const Cpu& device, view<const std::uint8_t, 1> mask, const Routing<T>& routing,
                               const RoutingGrad<T>& grad, const Routing<T>& outer, const Routing<T>& inner,
                               const RoutingGrad<T>& douter, const RoutingGrad<T>& dinner) {
        const Sizes n(outer, inner);
        cpu::detail::each_row(device, routing.logits.extents[0], [&](index_t t, int) {
            fill(douter.weight, t);
            fill(douter.probs, t);
            fill(douter.logits, t);
            fill(dinner.weight, t);
            fill(dinner.probs, t);
            fill(dinner.logits, t);
            if (!cpu::detail::valid_token(mask, t)) return;
            for (index_t k = 0; k < n.outer_k * n.inner_k && grad.weight.present(); ++k) {
                const auto g = static_cast<expert_t>(routing.expert(t, k) / n.members);
                const auto j = static_cast<expert_t>(routing.expert(t, k) - g * n.members);
                const expert_t* const slots = &inner.expert(t, g * n.inner_k);
                const index_t a = std::find(&outer.expert(t, 0), &outer.expert(t, 0) + n.outer_k, g) -
                                  &outer.expert(t, 0);
                const index_t slot = g * n.inner_k + (std::find(slots, slots + n.inner_k, j) - slots);
                douter.weight(t, a) += grad.weight(t, k) * inner.weight(t, slot);
                dinner.weight(t, slot) = grad.weight(t, k) * outer.weight(t, a);
            }
            for (index_t g = 0; g < n.groups; ++g)
                for (index_t e = g * n.members; e < (g + 1) * n.members; ++e) {
                    if (grad.probs.present()) {
                        douter.probs(t, g) += grad.probs(t, e) * inner.probs(t, e);
                        dinner.probs(t, e) = grad.probs(t, e) * outer.probs(t, g);
                    }
                    douter.logits(t, g) += grad.logits(t, e);
                }
            for (index_t g = 0; g < n.groups; ++g)  // logits_gj = a_g + log softmax(b_g)_j
                for (index_t e = g * n.members; e < (g + 1) * n.members; ++e)
                    dinner.logits(t, e) = grad.logits(t, e) - inner.probs(t, e) * douter.logits(t, g);
        });
    }

private:
    struct Sizes {
        index_t groups, members, outer_k, inner_k;
        template <class T>
        Sizes(const Routing<T>& outer, const Routing<T>& inner)
            : groups(outer.logits.extents[1]),
              members(inner.logits.extents[1] / groups),
              outer_k(outer.expert.extents[1]),
              inner_k(inner.expert.extents[1] / groups) {}
    };

    /// Higher logits first, NaN last, then the lower index.
    template <class T>
    static bool before(const T* logits, expert_t a, expert_t b) {
        const auto x = cpu::ordered(logits[a]), y = cpu::ordered(logits[b]);
        return x != y ? x > y : a < b;
    }

    template <class T>
    static void fill(const view<T, 2>& tensor, index_t t) {
        std::fill_n(tensor[t].data, tensor.extents[1], T(0));
    }
};

}  // namespace steelyard
