#include "steelyard/cpu/plan.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cpu/instruction_sets.hpp"
#include "steelyard/core/bytes.hpp"

using namespace steelyard;
using testing::instruction_sets;

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

namespace {

/// Rows of a plan in memory of their own, each row followed by some elements that nothing may touch.
template <class T>
struct PlanCase {
    index_t tokens, experts, top_k, width, stride;
    std::vector<expert_t> choices;
    Bytes block, memory;
    Plan<> plan;
    view<T, 2> x, rows, y, weight;

    PlanCase(index_t t, index_t e, index_t k, index_t d, index_t padding)
        : tokens(t),
          experts(e),
          top_k(k),
          width(d),
          stride(d + padding),
          choices(static_cast<std::size_t>(t * k)),
          block(bytes_of<Plan<>>(t, e, k)),
          memory((t * k * stride + 2 * t * stride + t * k + 64) * static_cast<index_t>(sizeof(T))),
          plan(place<Plan<>>(block.data(), t, e, k)) {
        std::mt19937 random(7);
        for (expert_t& c : choices) c = static_cast<expert_t>(random() % static_cast<unsigned>(e + 1)) - 1;
        const Bytes scratch(plan_ops<Cpu>::scratch_bytes(Cpu{}, {.tokens = t, .width = d, .experts = e}, 1));
        plan_ops<Cpu>::make_plan(Cpu{}, {choices.data(), t, k}, plan, scratch.data());
        T* next = reinterpret_cast<T*>(memory.data());
        for (auto* v : {&rows, &x, &y}) {  // rows begin on a cache line where the stride is whole lines
            const index_t n = v == &rows ? t * k : t;
            *v = view<T, 2>(next, n, d);
            v->strides[0] = stride;
            next += n * stride;
        }
        weight = view<T, 2>(next, t, k);
        for (T* p = reinterpret_cast<T*>(memory.data()); p < next + t * k; ++p)
            *p = static_cast<T>(random()) * static_cast<T>(0x1.0p-31) - T(1);
    }

    [[nodiscard]] index_t filled() const { return plan.offsets(experts); }
    [[nodiscard]] std::vector<T> all(const view<T, 2>& v) const { return {v.data, v.data + v.extents[0] * stride}; }
};

template <class T>
void check_combine(PlanCase<T>& made, Isa isa, bool weighted, Write write) {
    const double tolerance = static_cast<double>(made.top_k) * 8.0 * std::numeric_limits<T>::epsilon();
    const std::vector<T> before = made.all(made.y);
    const view<const T, 2> weight = weighted ? view<const T, 2>(made.weight) : view<const T, 2>{};
    std::vector<T> first;
    for (const int threads : {1, 2, 3, 7}) {
        std::copy(before.begin(), before.end(), made.y.data);
        plan_ops<Cpu>::combine<T>(Cpu{threads, isa}, made.plan, view<const T, 2>(made.rows), weight, made.y, write);
        if (threads == 1) first = made.all(made.y);
        REQUIRE(made.all(made.y) == first);
    }
    for (index_t t = 0; t < made.tokens; ++t)
        for (index_t j = 0; j < made.stride; ++j) {
            const auto at = static_cast<std::size_t>(t * made.stride + j);
            if (j >= made.width) {
                REQUIRE(first[at] == before[at]);
                continue;
            }
            double sum = write == Write::add ? static_cast<double>(before[at]) : 0.0, size = std::abs(sum);
            for (index_t k = 0; k < made.top_k; ++k)
                if (const std::int32_t r = made.plan.row(t, k); r >= 0) {
                    const double term = (weighted ? static_cast<double>(made.weight(t, k)) : 1.0) *
                                        static_cast<double>(made.rows(r, j));
                    sum += term;
                    size += std::abs(term);
                }
            REQUIRE(std::abs(static_cast<double>(first[at]) - sum) <= tolerance * size);
        }
    std::copy(before.begin(), before.end(), made.y.data);
}

}  // namespace

TEST_CASE_TEMPLATE("Dispatch, combine and its gradient agree with plain sums in every instruction set", T, float,
                   double) {
    for (const Isa isa : instruction_sets())
        for (const auto& size : {std::pair<index_t, index_t>{0, 2}, {1, 1}, {33, 4}, {65, 8}, {17, 11}})
            for (const index_t width : {1, 3, 15, 16, 17, 37, 64, 67, 130, 256}) {
                const index_t tokens = size.first, top_k = size.second;
                CAPTURE(name_of(isa));
                CAPTURE(tokens);
                CAPTURE(width);
                PlanCase<T> made(tokens, 5, top_k, width, width % 2 == 0 ? 0 : 3);
                for (const bool weighted : {false, true})
                    for (const Write write : {Write::assign, Write::add}) check_combine(made, isa, weighted, write);

                std::vector<T> first(static_cast<std::size_t>(tokens * top_k), T(1));
                for (const int threads : {1, 2, 7}) {
                    std::vector<T> dweight(first.size(), T(1));
                    plan_ops<Cpu>::combine_backward<T>(Cpu{threads, isa}, made.plan, view<const T, 2>(made.rows),
                                                       view<const T, 2>(made.x),
                                                       view<T, 2>(dweight.data(), tokens, top_k));
                    if (threads == 1) first = dweight;
                    REQUIRE(dweight == first);
                }
                for (index_t t = 0; t < tokens; ++t)
                    for (index_t k = 0; k < top_k; ++k) {
                        double sum = 1.0;
                        for (index_t j = 0; j < width && made.plan.row(t, k) >= 0; ++j)
                            sum += static_cast<double>(made.x(t, j)) *
                                   static_cast<double>(made.rows(made.plan.row(t, k), j));
                        REQUIRE(std::abs(static_cast<double>(first[static_cast<std::size_t>(t * top_k + k)]) - sum) <=
                                1000.0 * std::numeric_limits<T>::epsilon());
                    }

                const std::vector<T> before = made.all(made.rows);
                plan_ops<Cpu>::dispatch<T>(Cpu{2, isa}, made.plan, view<const T, 2>(made.x), made.rows);
                for (index_t r = 0; r < tokens * top_k; ++r)
                    for (index_t j = 0; j < made.stride; ++j) {
                        const T want = r < made.filled() && j < width
                                           ? made.x(made.plan.choice(r) / top_k, j)
                                           : before[static_cast<std::size_t>(r * made.stride + j)];
                        REQUIRE(made.rows.data[r * made.stride + j] == want);
                    }
            }
}

TEST_CASE("Rows that are written past the caches have the same bits, and nothing beside them is written") {
    for (const Isa isa : instruction_sets())
        for (const index_t padding : {0, 5, 16}) {  // with 5, rows are not aligned
            CAPTURE(name_of(isa));
            CAPTURE(padding);
            PlanCase<float> made(1200, 3, 2, 1536, padding);
            REQUIRE((made.filled() + made.tokens) * made.width * 4 > cpu::past_caches_bytes);
            for (const Write write : {Write::assign, Write::add}) {
                const std::vector<float> before = made.all(made.y);
                plan_ops<Cpu>::combine<float>(Cpu{2, isa}, made.plan, view<const float, 2>(made.rows),
                                              view<const float, 2>(made.weight), made.y, write);
                const std::vector<float> large = made.all(made.y);
                std::copy(before.begin(), before.end(), made.y.data);
                for (index_t t = 0; t < made.tokens; ++t) {  // each token alone is small
                    const Plan<> one{made.plan.offsets, made.plan.choice, made.plan.row.slice(t, t + 1)};
                    // So few rows that they stay in the caches: the offsets tell how many there are.
                    std::vector<index_t> none(static_cast<std::size_t>(made.experts + 1), 0);
                    Plan<> small = one;
                    small.offsets = view<index_t, 1>(none.data(), made.experts + 1);
                    plan_ops<Cpu>::combine<float>(Cpu{1, isa}, small, view<const float, 2>(made.rows),
                                                  view<const float, 2>(made.weight.slice(t, t + 1)),
                                                  made.y.slice(t, t + 1), write);
                }
                CHECK(made.all(made.y) == large);
                std::copy(before.begin(), before.end(), made.y.data);
            }
            plan_ops<Cpu>::dispatch<float>(Cpu{2, isa}, made.plan, view<const float, 2>(made.x), made.rows);
            bool same = true;
            for (index_t r = 0; r < made.filled(); ++r)
                same = same && std::equal(&made.rows(r, 0), &made.rows(r, 0) + made.width,
                                          &made.x(made.plan.choice(r) / made.top_k, 0));
            CHECK(same);
        }
}
