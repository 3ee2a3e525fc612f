#include "steelyard/cpu/router.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <random>

#include "cpu/instruction_sets.hpp"
#include "router/reference.hpp"
#include "router/routing_case.hpp"

using namespace steelyard;
using reference::Matrix;
using reference::RoutingCase;
using testing::instruction_sets;
using ops = router_ops<Cpu>;

namespace {

struct Case {
    index_t tokens, experts;
    int top_k, groups, kept;
};

/// Every token against the reference: exact order of the logits without a bias, best remaining value with one.
template <class T>
void compare(const RoutingCase<T>& got, const SelectionRule& rule, const std::vector<float>& bias,
             const std::vector<std::uint8_t>& mask) {
    // Differences of logits are rounded once before the exponential: the error grows with them.
    const double unit = static_cast<double>(std::numeric_limits<T>::epsilon());
    const index_t E = got.logits.columns;
    for (index_t t = 0; t < got.logits.rows; ++t) {
        CAPTURE(t);
        if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) {
            for (int k = 0; k < rule.top_k; ++k) {
                REQUIRE(got.expert(t, k) == -1);
                REQUIRE(got.weight(t, k) == T(0));
            }
            for (index_t e = 0; e < E; ++e) REQUIRE(got.probs(t, e) == T(0));
            continue;
        }
        std::vector<double> z, b(bias.begin(), bias.end());
        for (index_t e = 0; e < E; ++e) z.push_back(static_cast<double>(got.logits(t, e)));
        const auto want = reference::select(rule, z, b);
        const double highest = *std::max_element(want.log_score.begin(), want.log_score.end());
        const auto tolerance = [&](std::size_t e) {
            return unit * (20.0 + highest - want.log_score[e] + std::abs(want.log_score[e]));
        };
        for (index_t e = 0; e < E; ++e) {
            const double p = want.probs[static_cast<std::size_t>(e)];
            REQUIRE(std::abs(static_cast<double>(got.probs(t, e)) - p) <=
                    tolerance(static_cast<std::size_t>(e)) * p + 2e-38);
        }
        if (want.group_gap < 20.0 * unit) continue;  // a sum of two scores is rounded: groups that close tie
        std::vector<int> chosen;
        auto left = want.allowed;
        for (int k = 0; k < rule.top_k; ++k) {
            const int e = got.expert(t, k);
            REQUIRE(e >= 0);
            REQUIRE(e < E);
            REQUIRE(left[static_cast<std::size_t>(e)]);
            double best = -std::numeric_limits<double>::infinity();
            for (std::size_t i = 0; i < left.size(); ++i)
                if (left[i]) best = std::max(best, want.value[i]);
            REQUIRE(want.value[static_cast<std::size_t>(e)] >= best - (bias.empty() ? 0.0 : 20.0 * unit));
            left[static_cast<std::size_t>(e)] = false;
            chosen.push_back(e);
        }
        if (bias.empty()) REQUIRE(chosen == want.expert);
        const auto weight = reference::weights(rule, want, chosen);
        for (int k = 0; k < rule.top_k; ++k) {
            const double w = weight[static_cast<std::size_t>(k)];
            REQUIRE(std::abs(static_cast<double>(got.weight(t, k)) - w) <=
                    tolerance(static_cast<std::size_t>(chosen[static_cast<std::size_t>(k)])) * w + 2e-38 * rule.scale);
        }
    }
}

template <class T>
void fill(RoutingCase<T>& routing, double spread, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0.0, spread);
    for (index_t t = 0; t < routing.logits.rows; ++t)
        for (index_t e = 0; e < routing.logits.columns; ++e) routing.logits(t, e) = static_cast<T>(normal(random));
}

}  // namespace

TEST_CASE_TEMPLATE("Every rule of selection agrees with the reference at awkward sizes", T, float, double) {
    const Case cases[] = {{0, 4, 2, 2, 1},     {1, 1, 1, 1, 1},    {31, 3, 2, 3, 2},   {33, 3, 3, 1, 1},
                          {33, 16, 4, 4, 2},   {31, 17, 17, 1, 1}, {33, 64, 4, 8, 3},  {31, 160, 6, 8, 3},
                          {33, 160, 60, 1, 1}, {5, 512, 8, 16, 4}, {2, 512, 512, 1, 1}};
    for (const Case& c : cases)
        for (const Score score : {Score::softmax, Score::sigmoid})
            for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized})
                for (const GroupScore group : {GroupScore::max, GroupScore::top2_sum})
                    for (const bool biased : {false, true})
                        for (const double spread : {1.0, 30.0, 1e4}) {
                            if (group == GroupScore::top2_sum && c.experts / c.groups < 2) continue;
                            if (testing::few_sizes && (c.tokens * c.experts > 2200 || spread == 30.0)) continue;
                            CAPTURE(c.tokens);
                            CAPTURE(c.experts);
                            CAPTURE(static_cast<int>(score));
                            CAPTURE(static_cast<int>(weight));
                            CAPTURE(static_cast<int>(group));
                            CAPTURE(biased);
                            CAPTURE(spread);
                            const SelectionRule rule{c.top_k, score, weight, 2.5, c.groups, c.kept, group};
                            RoutingCase<T> routing(c.tokens, c.experts, c.top_k, 3);
                            fill(routing, spread, static_cast<unsigned>(c.experts));
                            std::vector<float> bias;
                            for (index_t e = 0; e < c.experts && biased; ++e)
                                bias.push_back(0.013f * static_cast<float>((e * 37) % 101) - 0.5f);
                            std::vector<std::uint8_t> mask(static_cast<std::size_t>(c.tokens), 1);
                            for (std::size_t t = 2; t < mask.size(); t += 3) mask[t] = 0;
                            REQUIRE(routing.select(rule, bias, mask) == -1);
                            compare(routing, rule, bias, mask);
                            CHECK(routing.probs.padding_is(T(-99)));
                            CHECK(routing.weight.padding_is(T(-99)));
                            CHECK(routing.expert.padding_is(-99));
                        }
}

namespace {

/// Rows `take` of another routing's logits.
template <class T>
RoutingCase<T> rows_of(const RoutingCase<T>& all, const std::vector<index_t>& take) {
    RoutingCase<T> some(static_cast<index_t>(take.size()), all.logits.columns, all.expert.columns, 2);
    for (std::size_t i = 0; i < take.size(); ++i)
        for (index_t e = 0; e < all.logits.columns; ++e)
            some.logits(static_cast<index_t>(i), e) = all.logits(take[i], e);
    return some;
}

template <class T>
bool same_row(const RoutingCase<T>& a, index_t s, const RoutingCase<T>& b, index_t t) {
    const auto same = [&](const auto& x, const auto& y) {
        return std::memcmp(&x(s, 0), &y(t, 0), static_cast<std::size_t>(x.columns) * sizeof x(s, 0)) == 0;
    };
    return same(a.probs, b.probs) && same(a.weight, b.weight) && same(a.expert, b.expert);
}

}  // namespace

TEST_CASE("Every instruction set agrees with the reference, and a token's bits are its own") {
    std::vector<std::pair<index_t, int>> sizes;
    for (const index_t experts : {1, 3, 8, 17, 64, 65, 160, 256, 512})
        for (const int top_k : {1, 2, 3, 4, 6, 8, 11, 16, 17})
            if (top_k <= experts && (!testing::few_sizes || (experts < 100 && (top_k < 3 || top_k % 4 == 0))))
                sizes.push_back({experts, top_k});
    for (const Isa isa : instruction_sets())
        for (const auto& size : sizes)
            for (const bool biased : {false, true})
                for (const Score score : {Score::softmax, Score::sigmoid}) {
                    const index_t experts = size.first;
                    const int top_k = size.second;
                    CAPTURE(name_of(isa));
                    CAPTURE(experts);
                    CAPTURE(top_k);
                    CAPTURE(biased);
                    CAPTURE(static_cast<int>(score));
                    const int groups = experts % 8 == 0 && top_k <= experts / 4 && top_k % 2 == 0 ? 8 : 1;
                    const SelectionRule rule{top_k,
                                             score,
                                             top_k % 3 == 0 ? GateWeight::score : GateWeight::renormalized,
                                             1.5,
                                             groups,
                                             groups == 1 ? 1 : 2,
                                             GroupScore::max};
                    RoutingCase<float> all(33, experts, top_k, 3);
                    fill(all, biased ? 2.0 : 20.0, static_cast<unsigned>(experts + top_k));
                    for (index_t e = 0; e < experts; ++e) {
                        all.logits(5, e) = static_cast<float>((e * 7) % 3);  // ties
                        all.logits(6, e) = 0.25f;
                        all.logits(17, e) = -1000.0f - all.logits(17, e);  // every sigmoid underflows
                    }
                    std::vector<float> bias;
                    for (index_t e = 0; e < experts && biased; ++e)
                        bias.push_back(0.013f * static_cast<float>((e * 37) % 101) - 0.5f);
                    std::vector<std::uint8_t> mask(33, 1);
                    mask[9] = mask[31] = 0;
                    REQUIRE(all.select(rule, bias, mask, {1, isa}) == -1);
                    compare(all, rule, bias, mask);
                    for (const int threads : {2, 3, 7}) {
                        RoutingCase<float> again = all;
                        again.select(rule, bias, mask, {threads, isa});
                        REQUIRE(again.same_bits(all));
                    }
                    // Alone, and in batches that end anywhere in a block and hold the tokens in other places.
                    for (const index_t count : {0, 1, 15, 16, 17}) {
                        std::vector<index_t> take;
                        for (index_t i = 0; i < count; ++i) take.push_back((i * 5 + 3) % 33);
                        RoutingCase<float> some = rows_of(all, take);
                        REQUIRE(some.select(rule, bias, {}, {1, isa}) == -1);
                        for (std::size_t i = 0; i < take.size(); ++i)
                            if (mask[static_cast<std::size_t>(take[i])] != 0)
                                REQUIRE(same_row(some, static_cast<index_t>(i), all, take[i]));
                    }
                }
}

TEST_CASE("Of groups with equal ranks the first is kept") {
    for (const Isa isa : instruction_sets())
        for (const bool biased : {false, true}) {
            RoutingCase<float> routing(20, 6, 2);
            const float z[] = {0.0f, 5.0f, -1.0f, 4.0f, 5.0f, 4.0f};
            for (index_t t = 0; t < 20; ++t)
                for (index_t e = 0; e < 6; ++e) routing.logits(t, e) = z[e];
            REQUIRE(routing.select({.top_k = 2, .groups = 2, .kept_groups = 1},
                                   biased ? std::vector<float>(6, 0.5f) : std::vector<float>{}, {}, {1, isa}) == -1);
            for (index_t t = 0; t < 20; ++t) {
                CHECK(routing.expert(t, 0) == 1);
                CHECK(routing.expert(t, 1) == 0);
            }
        }
}

TEST_CASE("A token that is not finite changes no bit of its neighbours") {
    for (const Isa isa : instruction_sets())
        for (const bool biased : {false, true}) {
            const std::vector<float> bias = biased ? std::vector<float>(21, 0.25f) : std::vector<float>{};
            const SelectionRule rule{.top_k = 4, .weight = GateWeight::score};
            RoutingCase<float> clean(40, 21, 4);
            fill(clean, 1.0, 9);
            RoutingCase<float> dirty = clean;
            dirty.logits(7, 20) = std::numeric_limits<float>::quiet_NaN();
            dirty.logits(18, 0) = std::numeric_limits<float>::infinity();
            dirty.logits(35, 3) = -std::numeric_limits<float>::infinity();
            REQUIRE(clean.select(rule, bias, {}, {1, isa}) == -1);
            CHECK(dirty.select(rule, bias, {}, {1, isa}) == 7);
            std::vector<std::uint8_t> mask(40, 1);
            mask[7] = 0;
            CHECK(dirty.select(rule, bias, mask, {3, isa}) == 18);
            mask[18] = 0;
            CHECK(dirty.select(rule, bias, mask, {3, isa}) == 35);
            for (index_t t = 0; t < 40; ++t)
                if (t != 7 && t != 18 && t != 35) CHECK(same_row(dirty, t, clean, t));
        }
}

TEST_CASE("A bias that is not finite chooses distinct experts all the same") {
    RoutingCase<float> routing(20, 6, 3);
    fill(routing, 1.0, 2);
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    REQUIRE(routing.select({.top_k = 3}, {-inf, nan, 0.0f, inf, -inf, 0.0f}) == -1);
    for (index_t t = 0; t < 20; ++t) {
        CHECK(routing.expert(t, 0) == 3);
        CHECK(routing.expert(t, 1) + routing.expert(t, 2) == 7);
    }
}

TEST_CASE("Weights of given choices, some of them none, are those of a selection in every instruction set") {
    for (const Isa isa : instruction_sets())
        for (const Score score : {Score::softmax, Score::sigmoid})
            for (const GateWeight kind : {GateWeight::score, GateWeight::renormalized})
                for (const int top_k : {1, 3, 16, 18}) {
                    const SelectionRule rule{.top_k = top_k, .score = score, .weight = kind, .scale = 2.0};
                    RoutingCase<float> routing(19, 40, top_k, 1);
                    fill(routing, 3.0, 4);
                    for (index_t t = 0; t < 19; ++t)
                        for (int k = 0; k < top_k; ++k)
                            routing.expert(t, k) =
                                (t + k) % 4 == 0 || t == 8 ? -1 : static_cast<expert_t>((t * 11 + k * 3) % 40);
                    std::vector<std::uint8_t> mask(19, 1);
                    mask[2] = 0;
                    const auto given = routing.expert;
                    const Bytes scratch(
                        ops::scratch_bytes<float>(Cpu{2, isa}, {.tokens = 19, .width = 4, .experts = 40}));
                    REQUIRE(ops::weigh<float>(Cpu{2, isa}, rule, {mask.data(), 19}, routing.routing(),
                                              scratch.data()) == -1);
                    for (index_t t = 0; t < 19; ++t) {
                        if (mask[static_cast<std::size_t>(t)] == 0) {
                            for (int k = 0; k < top_k; ++k) CHECK(routing.expert(t, k) == -1);
                            continue;
                        }
                        std::vector<double> z;
                        for (index_t e = 0; e < 40; ++e) z.push_back(static_cast<double>(routing.logits(t, e)));
                        const auto want = reference::select(rule, z, {});
                        std::vector<int> chosen, place;
                        for (int k = 0; k < top_k; ++k) {
                            CHECK(routing.expert(t, k) == given(t, k));
                            if (given(t, k) < 0)
                                CHECK(routing.weight(t, k) == 0.0f);
                            else
                                chosen.push_back(given(t, k)), place.push_back(k);
                        }
                        if (chosen.empty()) continue;
                        const auto weight = reference::weights(rule, want, chosen);
                        for (std::size_t i = 0; i < chosen.size(); ++i)
                            CHECK(static_cast<double>(routing.weight(t, place[i])) ==
                                  doctest::Approx(weight[i]).epsilon(1e-5));
                    }
                }
}

TEST_CASE("The gradient of selection agrees with that in double in every instruction set") {
    for (const Isa isa : instruction_sets())
        for (const index_t experts : {1, 3, 17, 64, 160})
            for (const Score score : {Score::softmax, Score::sigmoid})
                for (const GateWeight kind : {GateWeight::score, GateWeight::renormalized})
                    for (const int given : {1, 2, 3}) {  // dweight, dprobs, both
                        CAPTURE(name_of(isa));
                        CAPTURE(experts);
                        CAPTURE(given);
                        const int top_k = static_cast<int>(std::min<index_t>(experts, 5));
                        const SelectionRule rule{.top_k = top_k, .score = score, .weight = kind, .scale = 1.5};
                        constexpr index_t tokens = 35;
                        RoutingCase<double> wide(tokens, experts, top_k);
                        RoutingCase<float> narrow(tokens, experts, top_k, 2);
                        fill(narrow, 2.0, 8);
                        for (index_t t = 0; t < tokens; ++t)
                            for (index_t e = 0; e < experts; ++e)
                                wide.logits(t, e) = static_cast<double>(narrow.logits(t, e));
                        std::vector<std::uint8_t> mask(tokens, 1);
                        mask[4] = mask[34] = 0;
                        narrow.select(rule, {}, mask, {1, isa});
                        wide.select(rule, {}, mask);
                        narrow.expert(1, 0) = -1;  // a choice that was taken back
                        wide.expert(1, 0) = -1;
                        Matrix<double> dw(tokens, top_k, 0.5), dp(tokens, experts, 0.25), dz(tokens, experts, 1.0);
                        Matrix<float> dw_f(tokens, top_k, 0.5f, 1), dp_f(tokens, experts, 0.25f, 2),
                            dz_f(tokens, experts, 1.0f, 3), other(tokens, experts, 1.0f, 3);
                        for (index_t t = 0; t < tokens; ++t) {
                            for (int k = 0; k < top_k; ++k)
                                dw(t, k) = static_cast<double>(dw_f(t, k) = std::sin(static_cast<float>(t * 5 + k)));
                            for (index_t e = 0; e < experts; ++e)
                                dp(t, e) = static_cast<double>(dp_f(t, e) = std::cos(static_cast<float>(t * 9 + e)));
                        }
                        const view<const std::uint8_t, 1> masks(mask.data(), tokens);
                        const auto gradient = [&](auto& a, auto& b, auto& c) {
                            using V = decltype(a.mutable_view());
                            return RoutingGrad<typename V::value_type>{(given & 1) != 0 ? a.mutable_view() : V{},
                                                                       (given & 2) != 0 ? b.mutable_view() : V{},
                                                                       c.mutable_view()};
                        };
                        ops::select_backward<double>(Cpu{}, rule, masks, wide.routing(), gradient(dw, dp, dz));
                        ops::select_backward<float>(Cpu{1, isa}, rule, masks, narrow.routing(),
                                                    gradient(dw_f, dp_f, dz_f));
                        for (index_t t = 0; t < tokens; ++t)
                            for (index_t e = 0; e < experts; ++e)
                                REQUIRE(std::abs(static_cast<double>(dz_f(t, e)) - dz(t, e)) < 3e-6);
                        CHECK(dz_f.padding_is(1.0f));
                        for (const int threads : {2, 3, 7}) {
                            std::fill(other.data.begin(), other.data.end(), 1.0f);
                            ops::select_backward<float>(Cpu{threads, isa}, rule, masks, narrow.routing(),
                                                        gradient(dw_f, dp_f, other));
                            REQUIRE(other.data == dz_f.data);
                        }
                    }
}

TEST_CASE_TEMPLATE("Equal logits go to the lowest indices, in groups too", T, float, double) {
    for (const bool biased : {false, true})
        for (const Score score : {Score::softmax, Score::sigmoid})
            for (const double value : {0.0, -0.0, 1e4, -1e4}) {
                RoutingCase<T> routing(2, 12, 5);
                for (index_t e = 0; e < 12; ++e) routing.logits(0, e) = routing.logits(1, e) = static_cast<T>(value);
                routing.logits(1, 4) = static_cast<T>(value == 0.0 ? -value : value);  // -0 is 0
                const SelectionRule rule{5, score, GateWeight::renormalized, 1.0, 3, 2, GroupScore::top2_sum};
                REQUIRE(routing.select(rule, biased ? std::vector<float>(12, 0.25f) : std::vector<float>{}) == -1);
                for (int t = 0; t < 2; ++t)
                    for (int k = 0; k < 5; ++k) {
                        CHECK(routing.expert(t, k) == k);
                        CHECK(static_cast<double>(routing.weight(t, k)) == doctest::Approx(0.2));
                    }
            }
}

TEST_CASE_TEMPLATE("Scores that underflow or saturate keep the order of their logits", T, float, double) {
    // Softmax of the last three is 0 and sigmoid of the first three is 1, in every precision.
    RoutingCase<T> routing(1, 6, 6);
    const double z[] = {5001.0, 5003.0, 5002.0, -4003.0, -4001.0, -4002.0};
    for (index_t e = 0; e < 6; ++e) routing.logits(0, e) = static_cast<T>(z[e]);
    for (const Score score : {Score::softmax, Score::sigmoid}) {
        REQUIRE(routing.select({.top_k = 6, .score = score}) == -1);
        const int order[] = {1, 2, 0, 4, 5, 3};
        for (int k = 0; k < 6; ++k) CHECK(routing.expert(0, k) == order[k]);
    }
}

TEST_CASE_TEMPLATE("Renormalised weights exist where every chosen score underflows", T, float, double) {
    RoutingCase<T> routing(1, 4, 2);
    const double z[] = {0.0, 0.0, -9000.0, -9001.0};
    for (index_t e = 0; e < 4; ++e) routing.logits(0, e) = static_cast<T>(z[e]);
    for (const Score score : {Score::softmax, Score::sigmoid}) {
        REQUIRE(routing.select({.top_k = 2, .score = score, .weight = GateWeight::renormalized}, {0, 0, 9, 8}) == -1);
        CHECK(routing.expert(0, 0) == 2);
        CHECK(routing.expert(0, 1) == 3);
        CHECK(static_cast<double>(routing.weight(0, 0)) == doctest::Approx(1.0 / (1.0 + std::exp(-1.0))));
    }
}

TEST_CASE("defect 9: sigmoid scores far below any epsilon still have probabilities that sum to 1") {
    RoutingCase<float> routing(1, 3, 1);
    const float z[] = {-1000.0f, -1001.0f, -1002.0f};
    for (index_t e = 0; e < 3; ++e) routing.logits(0, e) = z[e];
    REQUIRE(routing.select({.top_k = 1, .score = Score::sigmoid}) == -1);
    const auto want = reference::softmax({-1000.0, -1001.0, -1002.0});
    for (index_t e = 0; e < 3; ++e)
        CHECK(static_cast<double>(routing.probs(0, e)) ==
              doctest::Approx(want[static_cast<std::size_t>(e)]).epsilon(1e-6));
}

TEST_CASE_TEMPLATE("A row with a NaN or an infinity is reported and still gets distinct experts", T, float, double) {
    const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
    for (const T bad : {nan, -nan, inf, -inf})
        for (const bool biased : {false, true})
            for (const int groups : {1, 3}) {
                RoutingCase<T> routing(200, 6, 4);
                fill(routing, 1.0, 1);
                for (index_t e = 0; e < 6; ++e) routing.logits(70, e) = bad;
                routing.logits(150, 2) = bad;
                routing.logits(20, 2) = bad;
                std::vector<std::uint8_t> mask(200, 1);
                mask[20] = 0;
                SelectionRule rule{4,      Score::sigmoid,      GateWeight::renormalized, 1.0,
                                   groups, groups == 1 ? 1 : 2, GroupScore::top2_sum};
                for (int threads : {1, 3}) {
                    CHECK(routing.select(rule, biased ? std::vector<float>(6, 0.5f) : std::vector<float>{}, mask,
                                         {threads}) == 70);
                    for (index_t t : {70, 150})
                        for (int k = 0; k < 4; ++k) {
                            CHECK(routing.expert(t, k) >= 0);
                            CHECK(routing.expert(t, k) < 6);
                            for (int i = 0; i < k; ++i) CHECK(routing.expert(t, i) != routing.expert(t, k));
                        }
                }
            }
    RoutingCase<T> routing(1, 4, 4);
    for (index_t e = 0; e < 4; ++e) routing.logits(0, e) = static_cast<T>(e);
    routing.logits(0, 3) = nan;
    CHECK(routing.select({.top_k = 4}) == 0);
    CHECK(routing.expert(0, 0) == 2);
    CHECK(routing.expert(0, 3) == 3);  // a NaN ranks last
}

TEST_CASE_TEMPLATE("Selection and its gradient have the same bits for any number of threads", T, float, double) {
    const SelectionRule rule{4, Score::sigmoid, GateWeight::renormalized, 2.0, 8, 4, GroupScore::top2_sum};
    const std::vector<float> bias(64, 0.125f);
    RoutingCase<T> one(333, 64, 4, 5);
    fill(one, 2.0, 7);
    RoutingCase<T> same = one;
    one.select(rule, bias);
    Matrix<T> dweight(333, 4, T(0.5), 1), dprobs(333, 64, T(0.25), 2), first(333, 64, T(1));
    for (index_t t = 0; t < 333; ++t)
        for (index_t e = 0; e < 64; ++e) dprobs(t, e) = static_cast<T>(std::sin(static_cast<double>(t * 64 + e)));
    for (index_t t = 0; t < 333; ++t) dweight(t, 1) = static_cast<T>(t);
    ops::select_backward<T>(Cpu{1}, rule, {}, one.routing(),
                            {dweight.mutable_view(), dprobs.mutable_view(), first.mutable_view()});
    for (int threads : {2, 3, 7}) {
        same.select(rule, bias, {}, {threads});
        CHECK(same.same_bits(one));
        Matrix<T> other(333, 64, T(1));
        ops::select_backward<T>(Cpu{threads}, rule, {}, one.routing(),
                                {dweight.mutable_view(), dprobs.mutable_view(), other.mutable_view()});
        CHECK(other.data == first.data);
    }
}

TEST_CASE("The gradient of a two-expert softmax is the one on paper") {
    // z = (ln 3, 0): p = (3/4, 1/4); L = p_0: dz = p_0 p_1 (1, -1) = (3/16, -3/16).
    RoutingCase<double> routing(1, 2, 1);
    routing.logits(0, 0) = std::log(3.0);
    routing.logits(0, 1) = 0.0;
    for (const bool by_weight : {false, true}) {
        const SelectionRule rule{.top_k = 1, .scale = by_weight ? 2.0 : 1.0};
        routing.select(rule);
        CHECK(routing.probs(0, 0) == doctest::Approx(0.75));
        CHECK(routing.weight(0, 0) == doctest::Approx(0.75 * rule.scale));
        Matrix<double> dweight(1, 1, by_weight ? 0.5 : 0.0), dprobs(1, 2, 0.0), dlogits(1, 2, 10.0);
        if (!by_weight) dprobs(0, 0) = 1.0;
        ops::select_backward<double>(Cpu{}, rule, {}, routing.routing(),
                                     {dweight.mutable_view(), dprobs.mutable_view(), dlogits.mutable_view()});
        CHECK(dlogits(0, 0) == doctest::Approx(10.0 + 3.0 / 16.0));
        CHECK(dlogits(0, 1) == doctest::Approx(10.0 - 3.0 / 16.0));
    }
}

TEST_CASE_TEMPLATE("Absent gradients are zero gradients, and a masked row is cleared", T, float, double) {
    for (const Score score : {Score::softmax, Score::sigmoid})
        for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized}) {
            const SelectionRule rule{.top_k = 3, .score = score, .weight = weight};
            RoutingCase<T> routing(3, 9, 3);
            fill(routing, 1.0, 3);
            const std::vector<std::uint8_t> mask{1, 0, 1};
            routing.select(rule, {}, mask);
            const view<const std::uint8_t, 1> masks(mask.data(), 3);
            Matrix<T> dweight(3, 3, T(0.5)), dprobs(3, 9, T(0)), zero_weight(3, 3, T(0));
            dweight(0, 1) = dweight(2, 2) = T(-2);
            dprobs(0, 4) = dprobs(2, 0) = T(3);
            Matrix<T> a(3, 9, T(1)), b(3, 9, T(1)), zero_probs(3, 9, T(0));
            ops::select_backward<T>(Cpu{}, rule, masks, routing.routing(),
                                    {dweight.mutable_view(), {}, a.mutable_view()});
            ops::select_backward<T>(Cpu{}, rule, masks, routing.routing(),
                                    {dweight.mutable_view(), zero_probs.mutable_view(), b.mutable_view()});
            for (std::size_t i = 0; i < 27; ++i)
                CHECK(static_cast<double>(a.data[i]) == doctest::Approx(static_cast<double>(b.data[i])).epsilon(1e-6));
            Matrix<T> c(3, 9, T(1)), d(3, 9, T(1));
            ops::select_backward<T>(Cpu{}, rule, masks, routing.routing(),
                                    {{}, dprobs.mutable_view(), c.mutable_view()});
            ops::select_backward<T>(Cpu{}, rule, masks, routing.routing(),
                                    {zero_weight.mutable_view(), dprobs.mutable_view(), d.mutable_view()});
            CHECK(c.data == d.data);
            for (index_t e = 0; e < 9; ++e) {
                CHECK(a(1, e) == T(0));
                CHECK(c(1, e) == T(0));
            }
        }
}

namespace {

/// Logits and their gradients for sizes above every block, with jitter, noise, a mask and padded rows.
template <class T>
struct Linear {
    index_t tokens, width, experts;
    RouterNoise noise;
    Matrix<T> x, weight, dlogits;
    std::vector<std::uint8_t> mask;
    Matrix<T> logits, dx, dweight;

    Linear(index_t t, index_t d, index_t e, RouterNoise n)
        : tokens(t),
          width(d),
          experts(e),
          noise(n),
          x(t, d, T(0), 3),
          weight(e, d, T(0), 2),
          dlogits(t, e, T(0), 1),
          mask(static_cast<std::size_t>(t), 1),
          logits(t, e, T(-99), 4),
          dx(t, d, T(1), 1),
          dweight(e, d, T(1), 5) {
        std::mt19937 random(5);
        std::normal_distribution<double> normal;
        for (auto* m : {&x, &weight, &dlogits})
            for (T& v : m->data) v = static_cast<T>(normal(random));
        for (index_t i = 3; i < t; i += 10) {
            mask[static_cast<std::size_t>(i)] = 0;
            for (index_t j = 0; j < d; ++j) x(i, j) = std::numeric_limits<T>::quiet_NaN();
            for (index_t j = 0; j < e; ++j) dlogits(i, j) = T(0);
        }
    }
    void run(int threads) {
        const Cpu device{threads};
        const Bytes scratch(ops::scratch_bytes<T>(device, {.tokens = tokens, .width = width, .experts = experts}));
        ops::logits<T>(device, x.get(), weight.get(), noise, logits.mutable_view(), scratch.data());
        ops::logits_backward<T>(device, x.get(), {mask.data(), tokens}, weight.get(), noise, dlogits.get(),
                                dx.mutable_view(), dweight.mutable_view(), scratch.data());
    }
    [[nodiscard]] double factor(index_t t, index_t j) const {
        const auto four =
            noise.jitter_factors(noise.jitter_stream(), noise.position(t), static_cast<std::uint64_t>(j / 4), width);
        return four[static_cast<std::size_t>(j % 4)];
    }
    [[nodiscard]] double added(index_t t, index_t e) const {
        const auto four =
            noise.logit_noise(noise.noise_stream(), noise.position(t), static_cast<std::uint64_t>(e / 4), experts);
        return four[static_cast<std::size_t>(e % 4)];
    }
};

}  // namespace

TEST_CASE_TEMPLATE("Logits and their gradients are those of a linear map with jitter and noise", T, float, double) {
    const double tolerance = sizeof(T) == 4 ? 2e-4 : 1e-12;
    for (const bool noisy : {false, true})
        for (const auto& [t, d, e] : {std::array<index_t, 3>{0, 3, 2}, {1, 1, 1}, {33, 131, 3}, {530, 6, 130}}) {
            CAPTURE(noisy);
            RouterNoise noise;
            if (noisy)
                noise = {
                    .jitter = 0.25, .noise = 0.5, .seed = 11, .step = {.step = 2, .token_offset = 100}, .layer = 3};
            Linear<T> linear(t, d, e, noise);
            linear.run(1);
            for (index_t i = 0; i < t; ++i) {
                const bool valid = linear.mask[static_cast<std::size_t>(i)] != 0;
                for (index_t j = 0; j < e && valid; ++j) {
                    double z = linear.added(i, j);
                    for (index_t c = 0; c < d; ++c)
                        z += static_cast<double>(linear.x(i, c)) * linear.factor(i, c) *
                             static_cast<double>(linear.weight(j, c));
                    REQUIRE(std::abs(static_cast<double>(linear.logits(i, j)) - z) <= tolerance);
                }
                for (index_t c = 0; c < d; ++c) {
                    double g = 0.0;
                    for (index_t j = 0; j < e; ++j)
                        g += static_cast<double>(linear.dlogits(i, j)) * static_cast<double>(linear.weight(j, c));
                    REQUIRE(std::abs(static_cast<double>(linear.dx(i, c)) - (1.0 + g * linear.factor(i, c))) <=
                            tolerance);
                }
            }
            for (index_t j = 0; j < e; ++j)
                for (index_t c = 0; c < d; ++c) {
                    double g = 1.0;
                    for (index_t i = 0; i < t; ++i)
                        if (linear.mask[static_cast<std::size_t>(i)] != 0)
                            g += static_cast<double>(linear.dlogits(i, j)) * static_cast<double>(linear.x(i, c)) *
                                 linear.factor(i, c);
                    REQUIRE(std::abs(static_cast<double>(linear.dweight(j, c)) - g) <= tolerance);
                }
            CHECK(linear.logits.padding_is(T(-99)));
            CHECK(linear.dx.padding_is(T(1)));
            CHECK(linear.dweight.padding_is(T(1)));
            for (int threads : {2, 3, 7}) {
                Linear<T> again(t, d, e, noise);
                again.run(threads);
                CHECK(std::memcmp(again.logits.data.data(), linear.logits.data.data(),
                                  linear.logits.data.size() * sizeof(T)) == 0);
                CHECK(again.dx.data == linear.dx.data);
                CHECK(again.dweight.data == linear.dweight.data);
            }
        }
}

TEST_CASE("Jitter stays in its interval, noise has its standard deviation, and neither repeats itself") {
    const RouterNoise noise{.jitter = 0.1, .noise = 2.0, .seed = 1, .step = {}, .layer = 0};
    const Philox jitter = noise.jitter_stream(), normal = noise.noise_stream();
    double sum = 0.0, squares = 0.0, mean = 0.0;
    constexpr index_t tokens = 500, width = 18;  // not a multiple of four: the next token starts a block of its own
    std::vector<double> seen;
    for (index_t t = 0; t < tokens; ++t)
        for (index_t j = 0; j < width; ++j) {
            const auto at = static_cast<std::uint64_t>(j / 4);
            const double f =
                noise.jitter_factors(jitter, noise.position(t), at, width)[static_cast<std::size_t>(j % 4)];
            const double n = noise.logit_noise(normal, noise.position(t), at, width)[static_cast<std::size_t>(j % 4)];
            CHECK(f > 0.9);
            CHECK(f < 1.1);
            mean += f / (tokens * width);
            sum += n / (tokens * width);
            squares += n * n / (tokens * width);
            seen.push_back(n);
        }
    CHECK(mean == doctest::Approx(1.0).epsilon(0.003));
    CHECK(std::abs(sum) < 0.08);
    CHECK(std::sqrt(squares) == doctest::Approx(2.0).epsilon(0.03));
    std::sort(seen.begin(), seen.end());
    CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
}

TEST_CASE_TEMPLATE("A bias meets every logit, and its gradient has the same bits for any number of threads", T, float,
                   double) {
    for (const auto& [tokens, experts] : {std::array<index_t, 2>{0, 3}, {1, 1}, {33, 5}, {131, 300}}) {
        std::vector<T> bias(static_cast<std::size_t>(experts)), logits(static_cast<std::size_t>(tokens * experts)),
            sums;
        for (index_t e = 0; e < experts; ++e) bias[static_cast<std::size_t>(e)] = static_cast<T>(e) / T(8);
        for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<T>(std::sin(static_cast<double>(i)));
        const view<T, 2> matrix(logits.data(), tokens, experts);
        for (const int threads : {1, 2, 5}) {
            std::vector<T> biased = logits, dbias(bias.size(), T(1));
            router_ops<Cpu>::add_bias<T>(Cpu{threads}, {bias.data(), experts}, {biased.data(), tokens, experts});
            for (std::size_t i = 0; i < logits.size(); ++i) REQUIRE(biased[i] == logits[i] + bias[i % bias.size()]);
            router_ops<Cpu>::bias_backward<T>(Cpu{threads}, matrix, {dbias.data(), experts});
            if (threads == 1) sums = dbias;
            CHECK(dbias == sums);
        }
        for (index_t e = 0; e < experts; ++e) {
            double sum = 1;
            for (index_t t = 0; t < tokens; ++t) sum += static_cast<double>(matrix(t, e));
            CHECK(static_cast<double>(sums[static_cast<std::size_t>(e)]) == doctest::Approx(sum).epsilon(1e-6));
        }
    }
}
