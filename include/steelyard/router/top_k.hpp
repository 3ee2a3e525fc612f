// TopK: a linear router that sends each token to the experts with the best scores.
#pragma once

#include <string>
#include <type_traits>

#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// The K experts with the best scores of a linear router.
///
///     z = (x * jitter) W^T + c + noise * N(0, 1)    logits, c with the option `bias`                [T, E]
///     s = softmax(z)   or   sigmoid(z)              scores
///     p = s / sum_i s_i                             probabilities, which balance losses are made of  [T, E]
///     chosen = the K best of s + b                  b: selection bias of the balance policy
///     w = scale * s   or   scale * s / sum_chosen s combine weights                                  [T, K]
///
/// With groups, experts lie in `groups` equal contiguous groups, and only those of the `kept_groups` best may be
/// chosen. Ties, of experts and of groups, go to the lowest index. Products with the scores are done in
/// log-scores l = z or log sigmoid(z), so nothing underflows into a wrong order or a division by zero:
/// p = softmax(l), w = scale * softmax(l over the chosen).
///
/// Gradients. The choice has none; with g = dL/dp, h = dL/dw, and D = 1 (softmax) or 1 - sigmoid(z):
///
///     dL/dz_j  += D_j p_j (g_j - sum_i p_i g_i)
///     dL/dz_ek += D_ek w_k (h_k - sum_i w_i h_i / scale)      renormalised
///     dL/dz_ek += D_ek w_k h_k                                sigmoid scores as they are
///     softmax scores as they are: g_ek += scale * h_k in the first line
///     dL/dx = (dL/dz W) * jitter,   dL/dW = dL/dz^T (x * jitter),   dL/dc = sum_t dL/dz
///
/// K = 1 with renormalised weights has a weight of `scale` and so no gradient from the experts' output.
///
/// Which model is which setting:
///
/// | model                | k | score   | weight       | more                                                        |
/// |----------------------|---|---------|--------------|-------------------------------------------------------------|
/// | Switch               | 1 | softmax | score        | jitter = 0.01                                               |
/// | GShard, Mixtral      | 2 | softmax | renormalized |                                                             |
/// | Qwen1.5-MoE          | 4 | softmax | score        |                                                             |
/// | Qwen3-MoE            | 8 | softmax | renormalized |                                                             |
/// | DeepSeekMoE 16B      | 6 | softmax | score        |                                                             |
/// | DeepSeek-V2          | 6 | softmax | score        | scale = 16, groups = 8, kept_groups = 3                     |
/// | DeepSeek-V3          | 8 | sigmoid | renormalized | scale = 2.5, groups = 8, kept_groups = 4, top2_sum; LossFree |
/// | gpt-oss              | 4 | softmax | renormalized | bias                                                        |
///
/// Sources: Shazeer et al. 2017 (1701.06538), GShard (2006.16668), Switch Transformer (2101.03961), Mixtral
/// (2401.04088), DeepSeekMoE (2401.06066), DeepSeek-V2 (2405.04434), loss-free balancing (2408.15664), DeepSeek-V3
/// (2412.19437), gpt-oss (2508.10925).
struct TopK {
    /// K: experts of a token, 1 to E.
    int k = 2;
    /// How logits become scores.
    Score score = Score::softmax;
    /// Whether the weights of the chosen experts are divided by their sum. Softmax "after selection" is
    /// `renormalized` too: the two are one function.
    GateWeight weight = GateWeight::renormalized;
    /// Routed scaling factor: multiplies every weight. Above 0.
    double scale = 1.0;
    /// n_group: groups of experts. 1: no groups.
    int groups = 1;
    /// topk_group: groups whose experts may be chosen.
    int kept_groups = 1;
    /// A group's rank: its best expert, or the sum of its two best; of s + b.
    GroupScore group_score = GroupScore::max;
    /// Training only: inputs are multiplied by uniform(1 - jitter, 1 + jitter). In [0, 1).
    double jitter = 0.0;
    /// Training only: standard deviation of the normal noise on the logits.
    double noise = 0.0;
    /// Seed of jitter and noise.
    std::uint64_t seed = 0;
    /// Adds a learned number to each expert's logit: the tensor "bias".
    bool bias = false;

    friend bool operator==(const TopK&, const TopK&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;     // [E, d]
        view<T, 1, Space> bias = {};  // [E] with the option

        template <class Field>
        void fields(Field&& field, const TopK& router, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
            if (router.bias) field("bias", bias, shape.experts);
        }
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return k; }

    /// The selection alone, as the device's kernels read it.
    [[nodiscard]] SelectionRule rule() const { return {k, score, weight, scale, groups, kept_groups, group_score}; }

    /// Refuses options that do not fit the shape.
    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        const index_t experts = shape.experts;
        if (Status s = detail::check_scored(shape); !s) return s;
        if (Status s = detail::check_choices("top_k", k, shape); !s) return s;
        if (score != Score::softmax && score != Score::sigmoid)
            return refuse_option("score", "softmax or sigmoid", std::to_string(static_cast<int>(score)));
        if (weight != GateWeight::score && weight != GateWeight::renormalized)
            return refuse_option("weight", "score or renormalized", std::to_string(static_cast<int>(weight)));
        if (group_score != GroupScore::max && group_score != GroupScore::top2_sum)
            return refuse_option("group_score", "max or top2_sum", std::to_string(static_cast<int>(group_score)));
        if (Status s = detail::check_positive("scale", scale); !s) return s;
        if (Status s = detail::check_divides_experts("groups", groups, shape); !s) return s;
        if (kept_groups < 1 || kept_groups > groups)
            return refuse_option("kept_groups", "1 to " + std::to_string(groups) + " (the number of groups)",
                                 std::to_string(kept_groups));
        if (kept_groups * (experts / groups) < k)
            return refuse_option("kept_groups", "groups that hold at least top_k = " + std::to_string(k) + " experts",
                                 std::to_string(kept_groups) + " groups of " + std::to_string(experts / groups));
        if (group_score == GroupScore::top2_sum && experts / groups < 2)
            return refuse_option("group_score", "groups of at least two experts for top2_sum",
                                 std::to_string(experts) + " experts in " + std::to_string(groups) + " groups");
        if (!(jitter >= 0.0 && jitter < 1.0))
            return refuse_option("jitter", "a number in [0, 1)", std::to_string(jitter));
        return detail::check_not_negative("noise", noise);
    }

    /// Bytes of scratch for `route` and `backward`. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return router_ops<Device>::template scratch_bytes<T>(device, shape);
    }

    /// Writes the routing (=) of the tokens of x. See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input,
                 const Routing<gate_t<T>, typename Device::space>& routing, std::byte* scratch) const {
        using ops = router_ops<Device>;
        ops::template logits<T>(device, input.x, params.weight, noise_of(input), routing.logits, scratch);
        if (bias) ops::template add_bias<T>(device, params.bias, routing.logits);
        const index_t bad =
            ops::template select<gate_t<T>>(device, rule(), input.selection_bias, input.tokens.mask, routing, scratch);
        return bad < 0 ? Status{} : refuse_logits(routing.logits, bad);
    }

    /// Accumulates into grad.logits, dinput and grads. See contract 9 of Router.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>& params,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<gate_t<T>, typename Device::space>& routing,
                  const RoutingGrad<gate_t<T>, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>& dinput,
                  const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        using ops = router_ops<Device>;
        ops::template select_backward<gate_t<T>>(device, rule(), input.tokens.mask, routing, grad);
        ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.weight, noise_of(input),
                                         grad.logits, dinput.x, grads.weight, scratch);
        if (bias && grads.bias.present()) ops::template bias_backward<T>(device, grad.logits, grads.bias);
    }

private:
    template <class T, class Space>
    [[nodiscard]] RouterNoise noise_of(const RouterInput<T, Space>& input) const {
        if (input.tokens.mode == Mode::evaluate) return {};
        return {jitter, noise, seed, input.tokens.step, input.layer};
    }
};

static_assert(Router<TopK>, "steelyard: TopK is a Router");

}  // namespace steelyard
