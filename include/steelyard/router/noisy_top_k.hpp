// NoisyTopK: top-k with learned noise on the logits, and the smooth load that its loss is made of.
#pragma once

#include <algorithm>

#include "steelyard/ops/gating_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// The standard deviation of the noise: softplus(x W_n) + floor, learned for each expert and token, or spread / E.
enum class NoiseLevel { learned, fixed };

/// What a noisy logit has to pass: the K-th best of the *other* experts, or the K-th best of all.
enum class LoadThreshold { of_others, of_all };

/// Top-k of noisy logits, with the chance of each choice as a differentiable load.
///
///     c = x W_g^T                                       clean logits                   [T, E]
///     sigma = softplus(x W_n^T) + floor  or  spread / E                                [T, E]
///     z = c + sigma n,  n ~ N(0, 1)                     `Routing::logits`              [T, E]
///     w = softmax of z over the K best of z  or  softmax(z) as it is                   [T, K]
///     load_i = Phi((c_i - thr_i) / sigma_i)             `Routing::smooth_load`         [T, E]
///
/// thr_i is the value that z_i has to pass to be chosen: the K-th best of the other experts, which is the (K+1)-th of
/// z for those that are in and the K-th for those that are not. Gradients of the load go through c, through sigma and
/// through thr_i, as in the public implementations of both papers. With K = E every load is 1 with gradient 0. In
/// evaluation there is no noise, and the load is what the limit sigma -> 0 makes of it: 1 for the K best, 0 for the
/// others, with gradient 0. A selection bias of a balance policy acts on the choice and is not in the load.
///
/// V-MoE's router is `NoisyTopK::vision(k)`: a fixed sigma of 1 / E, the softmax over all experts taken before the
/// choice, and one threshold for all experts, the K-th best of z. Its public code has losses on the softmax of the
/// clean logits (importance) beside those on the noisy ones; here `probs` are those of the noisy logits.
///
/// Sources: Shazeer et al. 2017 (1701.06538), Riquelme et al. 2021 (2106.05974).
struct NoisyTopK {
    /// K: experts of a token, 1 to E.
    int k = 2;
    NoiseLevel level = NoiseLevel::learned;
    /// Added to the learned standard deviation, so that it stays above 0.
    double floor = 1e-2;
    /// E times the fixed standard deviation. 0: no noise.
    double spread = 1.0;
    LoadThreshold threshold = LoadThreshold::of_others;
    GateWeight weight = GateWeight::renormalized;
    /// Seed of the noise.
    std::uint64_t seed = 0;

    static constexpr bool has_smooth_load = true;

    /// The router of V-MoE.
    [[nodiscard]] static constexpr NoisyTopK vision(int k) {
        return {.k = k, .level = NoiseLevel::fixed, .threshold = LoadThreshold::of_all, .weight = GateWeight::score};
    }

    friend bool operator==(const NoisyTopK&, const NoisyTopK&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;  // [E, d]
        view<T, 2, Space> noise;   // [E, d]  W_n; [0, d] where the level is fixed

        template <class Field>
        void fields(Field&& field, const NoisyTopK& router, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
            field("noise", noise, router.level == NoiseLevel::learned ? shape.experts : 0, shape.width);
        }
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return k; }

    /// Refuses options that do not fit the shape.
    [[nodiscard]] Status check(const LayerShape& shape) const {
        if (Status s = detail::check_scored(shape); !s) return s;
        if (Status s = detail::check_choices("top_k", k, shape); !s) return s;
        if (Status s = detail::check_positive("floor", floor); !s) return s;
        return detail::check_not_negative("spread", spread);
    }

    /// Bytes of scratch for `route` and `backward`. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return bytes_of<Scratch<T, typename Device::space>>(
            *this, shape.tokens, shape.experts,
            std::max(router_ops<Device>::template scratch_bytes<T>(device, shape),
                     noise_ops<Device>::template scratch_bytes<T>(device, shape)));
    }

    /// Writes the routing (=) of the tokens of x, the smooth load where there is room for it. See contract 5 to 8.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        const auto own = place_scratch<T, Device>(input, routing, scratch);
        const NoiseRule noise = rule_of(input, routing.logits.extents[1]);
        ops::template logits<T>(device, input.x, params.weight, RouterNoise{}, routing.logits, own.ops.data);
        const auto spread_of_tokens = raw_spread<T>(device, noise, params, input, own);
        noise_ops<Device>::template add_noise<T>(device, noise, spread_of_tokens, routing.logits, own.ops.data);
        const index_t bad =
            ops::template select<T>(device, rule(), input.selection_bias, input.tokens.mask, routing, own.ops.data);
        if (bad >= 0) return refuse_logits(routing.logits, bad);
        if (routing.smooth_load.size() != 0)
            noise_ops<Device>::template smooth_load<T>(device, noise, input.tokens.mask, spread_of_tokens,
                                                       routing.logits, routing.smooth_load, own.ops.data);
        return {};
    }

    /// Accumulates into grad.logits, dinput and grads. See contract 9 of Router.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>& params,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<T, typename Device::space>& routing, const RoutingGrad<T, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>& dinput,
                  const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        using ops = router_ops<Device>;
        const auto own = place_scratch<T, Device>(input, routing, scratch);
        const NoiseRule noise = rule_of(input, routing.logits.extents[1]);
        ops::template select_backward<T>(device, rule(), input.tokens.mask, routing, grad);
        const auto spread_of_tokens = raw_spread<T>(device, noise, params, input, own);
        noise_ops<Device>::template backward<T>(device, noise, input.tokens.mask, spread_of_tokens, routing.logits,
                                                grad.smooth_load, grad.logits, own.ops.data);
        ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.weight, RouterNoise{}, grad.logits,
                                         dinput.x, grads.weight, own.ops.data);
        if (spread_of_tokens.present())
            ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.noise, RouterNoise{},
                                             spread_of_tokens, dinput.x, grads.noise, own.ops.data);
    }

private:
    template <class T, class Space>
    struct Scratch {
        view<T, 2, Space> spread;       // [T, E]  x W_n^T, then its gradient
        view<std::byte, 1, Space> ops;  // of the kernels, one after the other

        template <class Field>
        void fields(Field&& field, const NoisyTopK& router, index_t tokens, index_t experts, index_t ops_bytes) {
            field("spread", spread, router.level == NoiseLevel::learned ? tokens : 0, experts);
            field("ops", ops, ops_bytes);
        }
    };

    [[nodiscard]] SelectionRule rule() const { return {.top_k = k, .weight = weight}; }

    template <class T, class Device>
    [[nodiscard]] Scratch<T, typename Device::space> place_scratch(const RouterInput<T, typename Device::space>& input,
                                                                   const Routing<T, typename Device::space>& routing,
                                                                   std::byte* scratch) const {
        return place<Scratch<T, typename Device::space>>(scratch, *this, input.x.extents[0], routing.logits.extents[1],
                                                         index_t{1});
    }

    template <class T, class Space>
    [[nodiscard]] NoiseRule rule_of(const RouterInput<T, Space>& input, index_t experts) const {
        NoiseRule noise{.top_k = k,
                        .sigma = spread / static_cast<double>(experts),
                        .floor = floor,
                        .without_itself = threshold == LoadThreshold::of_others};
        const bool any = level == NoiseLevel::learned || spread > 0.0;
        if (input.tokens.mode == Mode::train && any) noise.draw = {0.0, 1.0, seed, input.tokens.step, input.layer};
        return noise;
    }

    /// x W_n^T in scratch, or absent where the noise is fixed or off.
    template <class T, class Device>
    [[nodiscard]] view<T, 2, typename Device::space> raw_spread(const Device& device, const NoiseRule& noise,
                                                                const Params<const T, typename Device::space>& params,
                                                                const RouterInput<T, typename Device::space>& input,
                                                                const Scratch<T, typename Device::space>& own) const {
        if (level == NoiseLevel::fixed || !noise.active()) return {};
        router_ops<Device>::template logits<T>(device, input.x, params.noise, RouterNoise{}, own.spread, own.ops.data);
        return own.spread;
    }
};

static_assert(Router<NoisyTopK>, "steelyard: NoisyTopK is a Router");

}  // namespace steelyard
