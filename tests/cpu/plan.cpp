#include "steelyard/cpu/plan.hpp"

#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "steelyard/core/bytes.hpp"

using namespace steelyard;

TEST_CASE("The plan has the same bits for any number of threads, and for more tokens than blocks of the sort") {
    // 64 blocks of 1024 tokens is where blocks grow instead of getting more.
    for (const index_t tokens : {1, 1023, 1024, 1025, 5000, 70001}) {
        const index_t experts = 9, top_k = 2;
        std::mt19937 random(3);
        std::vector<expert_t> choices(static_cast<std::size_t>(tokens * top_k));
        for (expert_t& c : choices) c = static_cast<expert_t>(random() % 10) - 1;
        std::vector<index_t> want(static_cast<std::size_t>(experts + 1));
        std::vector<std::int32_t> order;
        for (index_t e = 0; e < experts; ++e) {
            for (std::size_t i = 0; i < choices.size(); ++i)
                if (choices[i] == e) order.push_back(static_cast<std::int32_t>(i));
            want[static_cast<std::size_t>(e + 1)] = static_cast<index_t>(order.size());
        }
        for (int threads : {1, 2, 3, 7}) {
            const Cpu device{threads};
            const Bytes block(bytes_of<Plan<>>(tokens, experts, top_k));
            // Memory is sized for more tokens than come.
            const Bytes scratch(
                plan_ops<Cpu>::scratch_bytes(device, {.tokens = tokens + 3000, .width = 1, .experts = experts}, 2));
            const auto plan = place<Plan<>>(block.data(), tokens, experts, top_k);
            plan_ops<Cpu>::make_plan(device, {choices.data(), tokens, top_k}, plan, scratch.data());
            CHECK(std::vector<index_t>(plan.offsets.data, plan.offsets.data + experts + 1) == want);
            CHECK(std::vector<std::int32_t>(plan.choice.data, plan.choice.data + order.size()) == order);
        }
    }
}

TEST_CASE_TEMPLATE("Combine has the same bits for any number of threads", T, float, double) {
    const index_t tokens = 300, experts = 8, top_k = 3, width = 37;
    std::mt19937 random(4);
    std::normal_distribution<double> normal;
    std::vector<expert_t> choices(static_cast<std::size_t>(tokens * top_k));
    for (expert_t& c : choices) c = static_cast<expert_t>(random() % 9) - 1;
    std::vector<T> rows(static_cast<std::size_t>(tokens * top_k * width)), weight(choices.size());
    for (auto* v : {&rows, &weight})
        for (T& value : *v) value = static_cast<T>(normal(random));
    const Bytes block(bytes_of<Plan<>>(tokens, experts, top_k));
    const auto plan = place<Plan<>>(block.data(), tokens, experts, top_k);
    const Bytes scratch(plan_ops<Cpu>::scratch_bytes(Cpu{}, {.tokens = tokens, .width = width, .experts = experts}, 3));
    plan_ops<Cpu>::make_plan(Cpu{}, {choices.data(), tokens, top_k}, plan, scratch.data());
    std::vector<T> first, first_dweight;
    for (int threads : {1, 2, 3, 7}) {
        std::vector<T> y(static_cast<std::size_t>(tokens * width), T(-99)), dweight(weight.size(), T(1));
        const view<const T, 2> r(rows.data(), tokens * top_k, width);
        plan_ops<Cpu>::combine<T>(Cpu{threads}, plan, r, view<const T, 2>(weight.data(), tokens, top_k),
                                  view<T, 2>(y.data(), tokens, width));
        plan_ops<Cpu>::combine_backward<T>(Cpu{threads}, plan, r, view<const T, 2>(y.data(), tokens, width),
                                           view<T, 2>(dweight.data(), tokens, top_k));
        if (threads == 1) first = y, first_dweight = dweight;
        CHECK(y == first);
        CHECK(dweight == first_dweight);
    }
    for (index_t t = 0; t < tokens; ++t)
        for (index_t j = 0; j < width; ++j) {
            double sum = 0.0;
            for (index_t k = 0; k < top_k; ++k)
                if (plan.row(t, k) >= 0)
                    sum += static_cast<double>(weight[static_cast<std::size_t>(t * top_k + k)]) *
                           static_cast<double>(rows[static_cast<std::size_t>(plan.row(t, k) * width + j)]);
            REQUIRE(static_cast<double>(first[static_cast<std::size_t>(t * width + j)]) ==
                    doctest::Approx(sum).epsilon(1e-5));
        }
}
