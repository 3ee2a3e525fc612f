// One token of the router on the CPU: from its logits to its choices and weights, and back.
//
// Everything goes through log-scores: l = z for softmax, l = log sigmoid(z) for sigmoid. Then
//
//     probs         = softmax(l) over all experts   (the softmax; the sum-normalised sigmoid, without an epsilon)
//     renormalised  = softmax(l) over the chosen experts
//
// and both gradients are those of a softmax in l, times dl/dz = 1 or 1 - sigmoid(z).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/kernels.hpp"
#include "steelyard/cpu/lanes.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard::cpu::detail {

/// Scratch rows of one thread in `select`.
template <class T>
struct SelectRows {
    view<T, 1> score;              // [E]  log-scores, then their exponentials
    view<T, 1> value;              // [E]  s + bias
    view<T, 1> chosen;             // [E]  log-scores of the chosen; no more than E of them
    view<Bits<T>, 1> key;          // [E]  order of the experts
    view<Bits<T>, 1> group;        // [E]  order of the groups; no more than E of them
    view<expert_t, 1> kept;        // [E]  the kept groups
    view<std::int64_t, 1> ranked;  // [E]  what is sorted

    template <class Field>
    void fields(Field&& field, index_t experts) {
        field("score", score, padded<T>(experts));
        field("value", value, padded<T>(experts));
        field("chosen", chosen, padded<T>(experts));
        field("key", key, padded<T>(experts));
        field("group", group, padded<T>(experts));
        field("kept", kept, padded<T>(experts));
        field("ranked", ranked, padded<T>(experts));
    }
};

/// Writes the `count` best of `size` (padded) keys to `out`, best first, ties to the lowest index.
///
/// A key of the lowest integer is no candidate; there are at least `count` candidates. Destroys the keys.
/// `ranked` has room for `size` of them.
template <class B>
void take_best(Isa isa, B* key, index_t size, index_t count, expert_t* out, std::int64_t* ranked) {
    constexpr std::int64_t none = std::numeric_limits<std::int64_t>::min();
    // Few are found by a scan for each, many by the places of all; sorting is faster where there are many more.
    const index_t few = std::clamp<index_t>(size / 6, 8, 48);
    if (count > few && (size <= 256 || (size <= 1024 && count > size / 4)))
        return with_kernels(isa, [&](auto kernels) { kernels.template take_by_place<B>(key, size, count, out); });
    if constexpr (sizeof(B) == 4) {
        // Key and index in one integer, so that one maximum finds the best and its lowest index, and none is equal.
        for (index_t j = 0; j < size; ++j) ranked[j] = (std::int64_t{key[j]} << 32) + (size - j);
        const auto index = [size](std::int64_t rank) {
            return static_cast<expert_t>(size - static_cast<index_t>(static_cast<std::uint32_t>(rank)));
        };
        if (count <= few) {
            std::int64_t last = std::numeric_limits<std::int64_t>::max();
            for (index_t k = 0; k < count; ++k) {
                std::int64_t best = none;
                for (index_t j = 0; j < size; ++j) best = std::max(best, ranked[j] < last ? ranked[j] : none);
                out[k] = index(best);
                last = best;
            }
            return;
        }
        const auto higher = [](std::int64_t a, std::int64_t b) { return a > b; };
        std::nth_element(ranked, ranked + count - 1, ranked + size, higher);
        std::sort(ranked, ranked + count, higher);
        for (index_t k = 0; k < count; ++k) out[k] = index(ranked[k]);
    } else {
        if (count <= few) {
            for (index_t k = 0; k < count; ++k) {
                B best = none, at = size;
                for (index_t j = 0; j < size; ++j) best = std::max(best, key[j]);
                for (index_t j = 0; j < size; ++j) at = std::min(at, key[j] == best ? B{j} : B{size});
                out[k] = static_cast<expert_t>(at);
                key[at] = none;
            }
            return;
        }
        const auto before = [key](B a, B b) { return key[a] != key[b] ? key[a] > key[b] : a < b; };
        for (index_t j = 0; j < size; ++j) ranked[j] = j;
        std::nth_element(ranked, ranked + count - 1, ranked + size, before);
        std::sort(ranked, ranked + count, before);
        for (index_t k = 0; k < count; ++k) out[k] = static_cast<expert_t>(ranked[k]);
    }
}

/// The order of a group from the order of its experts.
///
/// `plain`: keys of s + bias, which are summed; otherwise keys of logits, whose scores are.
template <class T>
Bits<T> group_key(const Bits<T>* key, index_t members, GroupScore kind, bool plain, bool sigmoid_scores) {
    Bits<T> first = std::numeric_limits<Bits<T>>::min(), second = first;
    for (index_t j = 0; j < members; ++j) {
        second = std::max(second, std::min(first, key[j]));
        first = std::max(first, key[j]);
    }
    if (kind == GroupScore::max) return first;
    T a = from_ordered<T>(first), b = from_ordered<T>(second);
    if (plain) return ordered(a + b);
    if (sigmoid_scores) a = log_sigmoid(a), b = log_sigmoid(b);
    return ordered(a + log1p_unit(exp_negative(b - a)));  // log(exp(a) + exp(b)) keeps the order of sums that underflow
}

/// Log-scores and probabilities of one valid token; the keys are the order of the logits, which both scores keep.
/// Returns whether the logits are all finite.
template <class T>
bool score_token(const SelectionRule& rule, index_t experts, const SelectRows<T>& rows, const T* logits, T* probs) {
    using B = Bits<T>;
    const index_t size = padded<T>(experts);
    T* const score = rows.score.data;
    B* const key = rows.key.data;

    std::memcpy(score, logits, static_cast<std::size_t>(experts) * sizeof(T));
    std::fill(score + experts, score + size, T(0));
    constexpr B exponent = std::bit_cast<B>(std::numeric_limits<T>::infinity());
    B not_finite = 0;
    for (index_t j = 0; j < size; ++j) not_finite |= (std::bit_cast<B>(score[j]) & exponent) == exponent ? B(1) : B(0);
    for (index_t j = 0; j < size; ++j) key[j] = ordered(score[j]);
    if (rule.score == Score::sigmoid)
        for (index_t j = 0; j < size; ++j) score[j] = log_sigmoid(score[j]);
    std::fill(score + experts, score + size, -std::numeric_limits<T>::infinity());

    // The log-scores of the chosen are needed later, so the exponentials go elsewhere.
    T* const exponential = rows.value.data;
    std::memcpy(exponential, score, static_cast<std::size_t>(size) * sizeof(T));
    const T total = row_exp(exponential, size, row_max(score, size));
    const T inverse = T(1) / total;
    for (index_t j = 0; j < experts; ++j) probs[j] = exponential[j] * inverse;
    return not_finite == 0;
}

/// Combine weights of one token's `count` choices, of which some may be -1. Reads the log-scores in `rows`.
template <class T>
void weigh_token(const SelectionRule& rule, const SelectRows<T>& rows, const T* logits, const T* probs,
                 const expert_t* expert, index_t count, T* weight) {
    const T scale = static_cast<T>(rule.scale), lowest = -std::numeric_limits<T>::infinity();
    if (rule.weight == GateWeight::renormalized) {
        T* const chosen = rows.chosen.data;
        const index_t chosen_size = padded<T>(count);
        for (index_t k = 0; k < count; ++k) chosen[k] = expert[k] < 0 ? lowest : rows.score.data[expert[k]];
        std::fill(chosen + count, chosen + chosen_size, lowest);
        const T largest = row_max(chosen, chosen_size);
        if (!(largest > lowest)) return std::fill(weight, weight + count, T(0)), void();  // nobody was chosen
        const T sum = row_exp(chosen, chosen_size, largest);
        for (index_t k = 0; k < count; ++k) weight[k] = scale * (chosen[k] / sum);
        for (index_t k = 0; k < count; ++k)
            if (expert[k] < 0) weight[k] = T(0);
    } else if (rule.score == Score::sigmoid) {
        for (index_t k = 0; k < count; ++k) weight[k] = expert[k] < 0 ? T(0) : scale * sigmoid(logits[expert[k]]);
    } else {
        for (index_t k = 0; k < count; ++k) weight[k] = expert[k] < 0 ? T(0) : scale * probs[expert[k]];
    }
}

/// Routes one valid token. Returns whether its logits are all finite.
template <class T>
bool select_token(Isa isa, const SelectionRule& rule, const float* bias, index_t experts, const SelectRows<T>& rows,
                  const T* logits, T* probs, expert_t* expert, T* weight) {
    using B = Bits<T>;
    const index_t size = padded<T>(experts), top_k = rule.top_k;
    const bool sigmoid_scores = rule.score == Score::sigmoid;
    B* const key = rows.key.data;
    const bool finite = score_token(rule, experts, rows, logits, probs);

    // The order of the experts.
    if (bias != nullptr) {
        T* const value = rows.value.data;
        if (sigmoid_scores)
            for (index_t j = 0; j < experts; ++j) value[j] = sigmoid(logits[j]) + static_cast<T>(bias[j]);
        else
            for (index_t j = 0; j < experts; ++j) value[j] = probs[j] + static_cast<T>(bias[j]);
        for (index_t j = 0; j < experts; ++j) key[j] = ordered(value[j]);
    }
    std::fill(key + experts, key + size, std::numeric_limits<B>::min());
    if (rule.kept_groups < rule.groups) {
        const index_t groups = rule.groups, members = experts / groups;
        B* const group = rows.group.data;
        for (index_t g = 0; g < groups; ++g)
            group[g] = group_key<T>(key + g * members, members, rule.group_score, bias != nullptr, sigmoid_scores);
        std::fill(group + groups, group + padded<T>(groups), std::numeric_limits<B>::min());
        take_best(isa, group, padded<T>(groups), rule.kept_groups, rows.kept.data, rows.ranked.data);
        std::fill(group, group + groups, B(0));
        for (index_t g = 0; g < rule.kept_groups; ++g) group[rows.kept.data[g]] = 1;
        for (index_t g = 0; g < groups; ++g)
            if (group[g] == 0) std::fill(key + g * members, key + (g + 1) * members, std::numeric_limits<B>::min());
    }

    take_best(isa, key, size, top_k, expert, rows.ranked.data);
    weigh_token(rule, rows, logits, probs, expert, top_k, weight);
    return finite;
}

/// One token: dlogits += d(weights, probs)/dlogits.
///
/// With l the log-scores, p the probabilities, w the weights and c their centre:
///     from probs:                 dl_j  = p_j (dp_j - sum_i p_i dp_i)
///     from renormalised weights:  dl_ek = w_k (dw_k - c), c = sum_i w_i dw_i / scale
///     from softmax scores:        as from probs, with dp_ek += scale dw_k
///     from sigmoid scores:        dl_ek = w_k dw_k
/// and dz = dl for softmax, dl (1 - sigmoid(z)) for sigmoid.
template <class T>
void token_backward(const SelectionRule& rule, index_t experts, index_t top_k, const T* logits, const T* probs,
                    const expert_t* expert, const T* weight, const T* dweight, const T* dprobs, T* dlogits) {
    const bool sigmoid_scores = rule.score == Score::sigmoid;
    const bool renormalized = rule.weight == GateWeight::renormalized;
    T from_weights = 0, first = 0;
    if (dweight != nullptr) {
        index_t chosen = 0;
        while (renormalized && chosen < top_k && expert[chosen] < 0) ++chosen;
        if (renormalized && chosen < top_k) first = dweight[chosen];
        for (index_t k = 0; k < top_k; ++k)
            if (expert[k] >= 0) from_weights += weight[k] * (dweight[k] - first);
    }

    const bool weights_are_probs = !renormalized && !sigmoid_scores;
    const T mean =
        (dprobs != nullptr ? row_dot(probs, dprobs, experts) : T(0)) + (weights_are_probs ? from_weights : T(0));
    if (dprobs != nullptr && sigmoid_scores) {
        for (index_t j = 0; j < experts; ++j) dlogits[j] += probs[j] * (dprobs[j] - mean) * sigmoid(-logits[j]);
    } else if (dprobs != nullptr) {
        for (index_t j = 0; j < experts; ++j) dlogits[j] += probs[j] * (dprobs[j] - mean);
    } else if (weights_are_probs) {
        for (index_t j = 0; j < experts; ++j) dlogits[j] -= probs[j] * mean;
    }

    if (dweight == nullptr) return;
    // Around the first: the weights sum to `scale`, and where all dw are equal the gradient is exactly 0.
    const T centre = renormalized ? first + from_weights / static_cast<T>(rule.scale) : T(0);
    for (index_t k = 0; k < top_k; ++k) {
        const index_t e = expert[k];
        if (e < 0) continue;
        dlogits[e] += weight[k] * (dweight[k] - centre) * (sigmoid_scores ? sigmoid(-logits[e]) : T(1));
    }
}

}  // namespace steelyard::cpu::detail
