// The contracts of plan kernels and of overflow rules as tests that anyone can run on their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/core/random.hpp"
#include "steelyard/plan/dispatch.hpp"
#include "steelyard/plan/overflow.hpp"

namespace steelyard {

namespace detail::plan_laws {

inline Status broken(std::string_view test, std::string_view law, std::string expected, std::string came) {
    return Status::refuse(Code::invalid_argument, test, law, std::move(expected), std::move(came));
}

inline std::size_t size(index_t rows, index_t columns) { return static_cast<std::size_t>(rows * columns); }

/// Distinct choices of each token; every seventh token takes none, and some single choices are missing.
inline std::vector<expert_t> random_choices(index_t tokens, index_t experts, index_t top_k, bool gaps) {
    const Philox stream(5, Stream::user);
    std::vector<expert_t> choices(size(tokens, top_k)), pool(size(1, experts));
    std::uint64_t at = 0;
    for (index_t t = 0; t < tokens; ++t) {
        for (index_t e = 0; e < experts; ++e) pool[static_cast<std::size_t>(e)] = static_cast<expert_t>(e);
        for (index_t k = 0; k < top_k; ++k) {
            const auto left = static_cast<std::uint32_t>(experts - k);
            std::swap(pool[static_cast<std::size_t>(k)], pool[static_cast<std::size_t>(k) + stream.below(at++, left)]);
            const bool none = gaps && (t % 7 == 6 || stream.below(at++, 8) == 0);
            choices[size(t, top_k) + static_cast<std::size_t>(k)] = none ? -1 : pool[static_cast<std::size_t>(k)];
        }
    }
    return choices;
}

/// Small integers, so that every sum is exact in any order.
inline std::vector<double> integers(std::size_t count, std::uint64_t seed) {
    const Philox stream(seed, Stream::user);
    std::vector<double> values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<double>(stream.below(i, 17)) - 8.0;
    return values;
}

inline Status check_order(const Plan<>& plan, const std::vector<expert_t>& choices) {
    constexpr std::string_view test = "check_plan_laws";
    const index_t experts = plan.experts(), top_k = plan.top_k();
    const auto taken =
        static_cast<index_t>(std::count_if(choices.begin(), choices.end(), [](expert_t e) { return e >= 0; }));
    if (plan.offsets(0) != 0 || plan.offsets(experts) != taken)
        return broken(test, "offsets", "0 to " + std::to_string(taken) + " (the choices that take a row)",
                      std::to_string(plan.offsets(0)) + " to " + std::to_string(plan.offsets(experts)));
    for (index_t e = 0; e < experts; ++e) {
        const index_t count = plan.offsets(e + 1) - plan.offsets(e);
        if (count != std::count(choices.begin(), choices.end(), static_cast<expert_t>(e)))
            return broken(test, "offsets", "as many rows as choices of expert " + std::to_string(e),
                          std::to_string(count));
        for (index_t r = plan.offsets(e); r < plan.offsets(e + 1); ++r) {
            const std::int32_t choice = plan.choice(r);
            if (choice < 0 || choice >= static_cast<std::int32_t>(choices.size()) ||
                choices[static_cast<std::size_t>(choice)] != e)
                return broken(test, "choice[" + std::to_string(r) + "]", "a choice of expert " + std::to_string(e),
                              std::to_string(choice));
            if (r > plan.offsets(e) && plan.choice(r - 1) >= choice)
                return broken(test, "order of rows", "ascending tokens in expert " + std::to_string(e),
                              std::to_string(plan.choice(r - 1)) + " before " + std::to_string(choice));
            if (plan.row(choice / top_k, choice % top_k) != r)
                return broken(test, "row", "the inverse of choice",
                              std::to_string(plan.row(choice / top_k, choice % top_k)));
        }
    }
    for (index_t i = 0; i < static_cast<index_t>(choices.size()); ++i)
        if (choices[static_cast<std::size_t>(i)] < 0 && plan.row(i / top_k, i % top_k) != -1)
            return broken(test, "row", "-1 where there is no choice", std::to_string(plan.row(i / top_k, i % top_k)));
    return {};
}

template <class Device>
Status check_movement(const Device& device, const Plan<>& plan, index_t tokens, index_t width) {
    constexpr std::string_view test = "check_plan_laws";
    const index_t top_k = plan.top_k(), filled = plan.offsets(plan.experts());
    const auto x = integers(size(tokens, width), 1), weight = integers(size(tokens, top_k), 2);
    std::vector<double> rows(size(filled, width), std::nan("")), y(size(tokens, width), std::nan(""));
    const view<const double, 2> xs(x.data(), tokens, width), weights(weight.data(), tokens, top_k);
    const view<double, 2> out(y.data(), tokens, width), written(rows.data(), filled, width);

    if (Status s = dispatch<double>(device, plan, xs, written); !s) return s;
    for (index_t r = 0; r < filled; ++r)
        for (index_t j = 0; j < width; ++j)
            if (written(r, j) != xs(plan.choice(r) / top_k, j))
                return broken(test, "dispatch", "each row a copy of its token", "another row " + std::to_string(r));

    if (Status s = combine<double>(device, plan, written, {}, out); !s) return s;
    for (index_t t = 0; t < tokens; ++t) {
        double taken = 0.0;
        for (index_t k = 0; k < top_k; ++k) taken += plan.row(t, k) >= 0 ? 1.0 : 0.0;
        for (index_t j = 0; j < width; ++j)
            if (out(t, j) != taken * xs(t, j))
                return broken(test, "combine of dispatch", "the token times its rows",
                              "another token " + std::to_string(t));
    }

    // Transposes of each other: <dispatch(x), r> = <x, combine(r)>; and combine with weights, and its gradient.
    const auto r = integers(size(filled, width), 3), dy = integers(size(tokens, width), 4);
    const view<const double, 2> rs(r.data(), filled, width), dys(dy.data(), tokens, width);
    if (Status s = combine<double>(device, plan, rs, {}, out); !s) return s;
    double left = 0.0, right = 0.0;
    for (std::size_t i = 0; i < r.size(); ++i) left += rows[i] * r[i];
    for (std::size_t i = 0; i < y.size(); ++i) right += x[i] * y[i];
    if (left != right)
        return broken(test, "combine", "the transpose of dispatch", std::to_string(right - left) + " more");

    std::vector<double> dweight(size(tokens, top_k), 1.0);
    const view<double, 2> dweights(dweight.data(), tokens, top_k);
    if (Status s = combine<double>(device, plan, rs, weights, out); !s) return s;
    plan_ops<Device>::template combine_backward<double>(device, plan, rs, dys, dweights);
    for (index_t t = 0; t < tokens; ++t) {
        std::vector<double> sum(size(1, width), 0.0);
        for (index_t k = 0; k < top_k; ++k) {
            double product = 1.0;
            for (index_t j = 0; j < width && plan.row(t, k) >= 0; ++j) {
                sum[static_cast<std::size_t>(j)] += weights(t, k) * rs(plan.row(t, k), j);
                product += dys(t, j) * rs(plan.row(t, k), j);
            }
            if (dweights(t, k) != product)
                return broken(test, "combine_backward", "the product of dy and the row, added to what was there",
                              std::to_string(dweights(t, k)));
        }
        for (index_t j = 0; j < width; ++j)
            if (out(t, j) != sum[static_cast<std::size_t>(j)])
                return broken(test, "combine", "the weighted sum of the rows", "another token " + std::to_string(t));
    }
    return {};
}

}  // namespace detail::plan_laws

/// Runs the plan kernels of a device on host memory through their laws, in double, for these sizes: ok, or the first
/// law that fails. Choices are random, once one of each rank for every token and once with gaps.
template <class Device>
Status check_plan_laws(const LayerShape& shape, int top_k, const Device& device) {
    static_assert(std::is_same_v<typename Device::space, HostSpace>,
                  "steelyard: check_plan_laws reads the results, so it takes a device on host memory");
    namespace laws = detail::plan_laws;
    const index_t T = shape.tokens, E = shape.experts, K = top_k;
    if (K < 1 || K > E) return laws::broken("check_plan_laws", "top_k", "1 to " + std::to_string(E), std::to_string(K));
    Bytes block(bytes_of<Plan<>>(T, E, K)), scratch(plan_scratch_bytes(device, shape, top_k));
    const Plan<> plan = place<Plan<>>(block.data(), T, E, K);
    for (const bool gaps : {false, true}) {
        const auto choices = laws::random_choices(T, E, K, gaps);
        if (Status s = make_plan(device, {choices.data(), T, K}, plan, scratch.data()); !s) return s;
        if (Status s = laws::check_order(plan, choices); !s) return s;
        if (Status s = laws::check_movement(device, plan, T, shape.width); !s) return s;
    }
    return {};
}

/// Runs an overflow rule through its contract for these sizes: it only ever takes choices away, and a replay takes
/// the same ones. ok, or the first law that fails.
template <Overflow O, class Device>
Status check_overflow_laws(const O& overflow, const LayerShape& shape, int top_k, const Device& device) {
    namespace laws = detail::plan_laws;
    constexpr std::string_view test = "check_overflow_laws";
    const index_t T = shape.tokens, E = shape.experts, K = top_k;
    if (K < 1 || K > E) return laws::broken(test, "top_k", "1 to " + std::to_string(E), std::to_string(K));
    if (Status s = overflow.check(shape, top_k); !s) return s;
    if constexpr (O::drops) {
        Bytes scratch(overflow.template scratch_bytes<double>(device, shape, top_k));
        auto expert = laws::random_choices(T, E, K, false);
        std::vector<std::uint8_t> mask(static_cast<std::size_t>(T), 1);
        for (index_t t = 6; t < T; t += 7) {
            mask[static_cast<std::size_t>(t)] = 0;
            std::fill_n(expert.begin() + t * K, K, expert_t{-1});
        }
        const Philox stream(6, Stream::user);
        std::vector<double> logits(laws::size(T, E), 0.0), probs(laws::size(T, E), 1.0 / static_cast<double>(E));
        std::vector<double> weight(laws::size(T, K));
        for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = expert[i] < 0 ? 0.0 : stream.uniform(i);
        if (!weight.empty() && expert[0] >= 0) weight[0] = 0.0;  // still a choice
        const Routing<double> routing{
            {logits.data(), T, E}, {probs.data(), T, E}, {expert.data(), T, K}, {weight.data(), T, K}};
        TokenInfo<> info;
        info.mask = {mask.data(), T};
        auto once = expert, twice = expert;
        overflow.template admit<double>(device, routing, info, {once.data(), T, K}, scratch.data());
        overflow.template admit<double>(device, routing, info, {twice.data(), T, K}, scratch.data());
        for (std::size_t i = 0; i < once.size(); ++i) {
            if (once[i] != expert[i] && once[i] != -1)
                return laws::broken(test, "choice " + std::to_string(i),
                                    std::to_string(expert[i]) + ", or -1 where it is dropped", std::to_string(once[i]));
            if (once[i] != twice[i]) return laws::broken(test, "replay", "the same drops", "others");
        }
    }
    return {};
}

}  // namespace steelyard
