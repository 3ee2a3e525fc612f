// A GPU's selection, one token at a time, by the arithmetic that its kernels share with the host: its decisions are
// those of the CPU's kernels.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "router/routing_case.hpp"
#include "steelyard/cpu/router.hpp"
#include "steelyard/cuda/score_math.hpp"

using namespace steelyard;
using reference::RoutingCase;

namespace {

#if defined(__clang__)
constexpr bool is_clang = true;
#else
constexpr bool is_clang = false;
#endif

struct Selected {
    std::vector<float> probs, weight;
    std::vector<int> expert;
};

float sum_in_lanes(const std::vector<float>& score) {
    float lanes[cuda::score_lanes] = {};
    for (std::size_t i = 0; i < score.size(); ++i) lanes[i % cuda::score_lanes] += score[i];
    for (int half = cuda::score_lanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

Selected select(const SelectionRule& rule, const float* z, std::size_t experts, const float* bias) {
    const bool sigmoid = rule.score == Score::sigmoid;
    float highest = -INFINITY;
    for (std::size_t e = 0; e < experts; ++e) highest = std::max(highest, z[e]);
    const float shift = sigmoid ? std::min(highest, 0.0f) : highest;
    std::vector<float> score(experts), value(z, z + experts);
    for (std::size_t e = 0; e < experts; ++e)
        score[e] = sigmoid ? cuda::shifted_sigmoid(z[e], shift) : cuda::exp_score(z[e] - shift);
    const float inverse = 1.0f / sum_in_lanes(score), factor = sigmoid ? cuda::exp_score(shift) : inverse;
    Selected out;
    for (std::size_t e = 0; e < experts; ++e) out.probs.push_back(score[e] * inverse);
    for (std::size_t e = 0; e < experts && bias != nullptr; ++e)
        value[e] = cuda::biased_score(score[e], factor, bias[e]);

    std::vector<std::uint32_t> key(experts), rank;
    for (std::size_t e = 0; e < experts; ++e) key[e] = cuda::order_of(value[e]);
    const auto take = [](std::vector<std::uint32_t>& keys) {
        const auto best = std::max_element(keys.begin(), keys.end());
        *best = 0;
        return static_cast<std::size_t>(best - keys.begin());
    };
    const auto groups = static_cast<std::size_t>(rule.groups), members = experts / groups;
    if (rule.kept_groups < rule.groups) {
        for (std::size_t g = 0; g < groups; ++g) {
            std::vector<float> own(value.begin() + static_cast<std::ptrdiff_t>(g * members),
                                   value.begin() + static_cast<std::ptrdiff_t>((g + 1) * members));
            std::sort(own.begin(), own.end(), std::greater<>());
            rank.push_back(cuda::order_of(rule.group_score == GroupScore::max
                                              ? own[0]
                                              : cuda::rank_of_pair(own[0], own[1], bias != nullptr, sigmoid)));
        }
        std::vector<bool> kept(groups);
        for (int i = 0; i < rule.kept_groups; ++i) kept[take(rank)] = true;
        for (std::size_t e = 0; e < experts; ++e)
            if (!kept[e / members]) key[e] = 0;
    }
    float most = -INFINITY, sum = 0.0f;
    for (int k = 0; k < rule.top_k; ++k) out.expert.push_back(static_cast<int>(take(key)));
    for (const int e : out.expert) most = std::max(most, z[e]);
    const float from = sigmoid ? std::min(most, 0.0f) : most, scale = static_cast<float>(rule.scale);
    const auto score_of = [&](int e) {
        return sigmoid ? cuda::shifted_sigmoid(z[e], from) : cuda::exp_score(z[e] - from);
    };
    for (const int e : out.expert) sum += score_of(e);
    for (const int e : out.expert) {
        if (rule.weight == GateWeight::renormalized)
            out.weight.push_back(scale * (score_of(e) / sum));
        else if (sigmoid)
            out.weight.push_back(scale * cuda::sigmoid_score(z[e]));
        else
            out.weight.push_back(scale * out.probs[static_cast<std::size_t>(e)]);
    }
    return out;
}

}  // namespace

TEST_CASE("a GPU chooses and weighs as AVX-512 does") {
    // Other instruction sets sum in other lanes, and clang++ fuses fewer products with sums.
    if (compiled_isa < Isa::avx512 || is_clang) return;
    struct Case {
        index_t experts;
        int top_k, groups, kept;
    };
    std::mt19937 generator(11);
    for (const Case c :
         {Case{3, 2, 1, 1}, {8, 8, 1, 1}, {64, 6, 8, 3}, {160, 6, 8, 3}, {256, 8, 8, 4}, {513, 16, 1, 1}})
        for (const Score score : {Score::softmax, Score::sigmoid})
            for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized})
                for (const GroupScore group : {GroupScore::max, GroupScore::top2_sum})
                    for (const double spread : {1e-6, 1.0, 12.0})
                        for (const bool biased : {false, true}) {
                            CAPTURE(c.experts);
                            CAPTURE(static_cast<int>(score));
                            CAPTURE(spread);
                            CAPTURE(biased);
                            const index_t tokens = 65;
                            RoutingCase<float> routing(tokens, c.experts, c.top_k);
                            // Some tokens with negative logits only, whose scores are shifted.
                            std::normal_distribution<double> normal(generator() % 2 == 0 ? 0.0 : -3.0, spread);
                            for (float& z : routing.logits.data) z = static_cast<float>(normal(generator));
                            std::vector<float> bias(static_cast<std::size_t>(c.experts));
                            for (float& b : bias) b = 1e-3f * static_cast<float>(generator() % 8);
                            const SelectionRule rule{c.top_k, score, weight, 2.5, c.groups, c.kept, group};
                            const LayerShape shape{.tokens = tokens, .width = 1, .experts = c.experts};
                            const Bytes scratch(router_ops<Cpu>::scratch_bytes<float>(Cpu{}, shape));
                            const view<const float, 1> given(biased ? bias.data() : nullptr, c.experts);
                            REQUIRE(router_ops<Cpu>::select<float>(Cpu{}, rule, given, {}, routing.routing(),
                                                                   scratch.data()) == -1);
                            bool experts_same = true, numbers_same = true;
                            for (index_t t = 0; t < tokens; ++t) {
                                const Selected want = select(rule, &routing.logits(t, 0),
                                                             static_cast<std::size_t>(c.experts), given.data);
                                for (int k = 0; k < c.top_k; ++k) {
                                    const auto i = static_cast<std::size_t>(k);
                                    experts_same = experts_same && want.expert[i] == routing.expert(t, k);
                                    numbers_same = numbers_same && want.weight[i] == routing.weight(t, k);
                                }
                                for (index_t e = 0; e < c.experts; ++e)
                                    numbers_same =
                                        numbers_same && want.probs[static_cast<std::size_t>(e)] == routing.probs(t, e);
                            }
                            CHECK(experts_same);
                            CHECK(numbers_same);
                        }
}
