// The router's selection written down plainly, in double: what every device and element type is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "steelyard/ops/router_ops.hpp"

namespace reference {

using steelyard::GateWeight;
using steelyard::GroupScore;
using steelyard::index_t;
using steelyard::Score;
using steelyard::SelectionRule;

/// One token.
struct Selection {
    std::vector<double> log_score, score, probs;
    std::vector<double> value;  // what the choice is ordered by
    std::vector<bool> allowed;  // in a kept group
    std::vector<int> expert;
    std::vector<double> weight;
    double group_gap = INFINITY;  // between the last kept and the first dropped group
};

inline std::vector<double> softmax(const std::vector<double>& l) {
    const double highest = *std::max_element(l.begin(), l.end());
    std::vector<double> p(l.size());
    double sum = 0.0;
    for (std::size_t i = 0; i < l.size(); ++i) sum += p[i] = std::exp(l[i] - highest);
    for (double& v : p) v /= sum;
    return p;
}

/// The indices of the `count` best among the allowed, ties to the lowest index.
inline std::vector<int> best(const std::vector<double>& value, const std::vector<bool>& allowed, int count) {
    std::vector<int> order(value.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        const auto i = static_cast<std::size_t>(a), j = static_cast<std::size_t>(b);
        return allowed[i] != allowed[j] ? bool(allowed[i]) : value[i] > value[j];
    });
    order.resize(static_cast<std::size_t>(count));
    return order;
}

/// The combine weights of given choices.
inline std::vector<double> weights(const SelectionRule& rule, const Selection& s, const std::vector<int>& expert) {
    std::vector<double> w;
    for (int e : expert)
        w.push_back((rule.weight == GateWeight::renormalized ? s.log_score : s.score)[static_cast<std::size_t>(e)]);
    if (rule.weight == GateWeight::renormalized) w = softmax(w);
    for (double& v : w) v *= rule.scale;
    return w;
}

inline Selection select(const SelectionRule& rule, const std::vector<double>& z, const std::vector<double>& bias) {
    Selection s;
    const std::size_t experts = z.size();
    for (double v : z)
        s.log_score.push_back(rule.score == Score::softmax ? v : std::min(v, 0.0) - std::log1p(std::exp(-std::abs(v))));
    s.probs = softmax(s.log_score);
    s.score = s.probs;
    if (rule.score == Score::sigmoid)
        for (std::size_t e = 0; e < experts; ++e) s.score[e] = std::exp(s.log_score[e]);
    s.value = z;
    for (std::size_t e = 0; e < experts && !bias.empty(); ++e) s.value[e] = s.score[e] + bias[e];

    s.allowed.assign(experts, true);
    if (rule.kept_groups < rule.groups) {
        const std::size_t groups = static_cast<std::size_t>(rule.groups), members = experts / groups;
        std::vector<double> group;
        for (std::size_t g = 0; g < groups; ++g) {
            std::vector<double> in;
            for (std::size_t e = g * members; e < (g + 1) * members; ++e)
                in.push_back(bias.empty() && rule.group_score == GroupScore::top2_sum ? s.log_score[e] : s.value[e]);
            std::sort(in.rbegin(), in.rend());
            if (rule.group_score == GroupScore::max)
                group.push_back(in[0]);
            else
                group.push_back(bias.empty() ? in[0] + std::log1p(std::exp(in[1] - in[0])) : in[0] + in[1]);
        }
        const auto kept = best(group, std::vector<bool>(groups, true), rule.kept_groups);
        const auto ranked = best(group, std::vector<bool>(groups, true), rule.groups);
        const auto last = static_cast<std::size_t>(rule.kept_groups);
        s.group_gap = group[static_cast<std::size_t>(ranked[last - 1])] - group[static_cast<std::size_t>(ranked[last])];
        s.allowed.assign(experts, false);
        for (int g : kept) std::fill_n(s.allowed.begin() + g * static_cast<std::ptrdiff_t>(members), members, true);
    }
    s.expert = best(s.value, s.allowed, rule.top_k);
    s.weight = weights(rule, s, s.expert);
    return s;
}

}  // namespace reference
