// Threshold: as many experts as a token's probabilities ask for.
#pragma once

#include <algorithm>
#include <string>

#include "steelyard/ops/assign_ops.hpp"
#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// Which experts a threshold keeps, best first.
enum class Keep {
    each,        ///< those with p >= threshold (EvoMoE)
    cumulative,  ///< as few as needed for a sum of p of at least the threshold ("top p")
};

/// Experts whose probability is high enough: one at least, k at most.
///
///     z = (x W^T + noise * Gumbel(0, 1)) / temperature          logits                        [T, E]
///     p = softmax(z)                                                                          [T, E]
///     chosen = by descending p + b, at most k: the first; then those with p + b >= threshold, or (cumulative) until
///              the p of the chosen sum to at least the threshold           b: selection bias
///     w = p of the chosen, or p / sum of the chosen p                                         [T, k]
///
/// With a high temperature nearly all experts pass a small threshold, with a low one only the best: a temperature that
/// falls from step to step (DenseToSparseTemperature) takes a layer from dense to sparse. The temperature is part of
/// the router's value; `logits` are those after it, for losses on logits too.
///
/// Gradients: those of TopK in z for the experts that were kept, then dL/d(x W^T) = dL/dz / temperature.
///
/// Sources: EvoMoE's dense-to-sparse gate (Nie et al., 2112.14397: `each`, 0.02, weights as they are, noise 1);
/// "Harder Tasks Need More Experts" (Huang et al., 2403.07652: `cumulative`, 0.4).
struct Threshold {
    /// Of p, in [0, 1].
    double threshold = 0.02;
    Keep keep = Keep::each;
    /// Most experts of a token. 0: all E.
    int k = 0;
    GateWeight weight = GateWeight::score;
    /// Above 0.
    double temperature = 1.0;
    /// Training only: factor of the Gumbel noise on the logits. Not negative.
    double noise = 0.0;
    /// Seed of the noise.
    std::uint64_t seed = 0;

    friend bool operator==(const Threshold&, const Threshold&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;  // [E, d]

        template <class Field>
        void fields(Field&& field, const Threshold&, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
        }
    };

    [[nodiscard]] int top_k(const LayerShape& shape) const { return k == 0 ? static_cast<int>(shape.experts) : k; }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_scored(shape); !s) return s;
        if (!(threshold >= 0.0 && threshold <= 1.0))
            return refuse_option("threshold", "a number in [0, 1]", std::to_string(threshold));
        if (keep != Keep::each && keep != Keep::cumulative)
            return refuse_option("keep", "each or cumulative", std::to_string(static_cast<int>(keep)));
        if (k < 0 || k > shape.experts)
            return refuse_option("k", "0 (all) to " + std::to_string(shape.experts) + " (the number of experts)",
                                 std::to_string(k));
        if (weight != GateWeight::score && weight != GateWeight::renormalized)
            return refuse_option("weight", "score or renormalized", std::to_string(static_cast<int>(weight)));
        if (Status s = detail::check_positive("temperature", temperature); !s) return s;
        return detail::check_not_negative("noise", noise);
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return router_ops<Device>::template scratch_bytes<T>(device, shape);
    }

    /// Writes the routing (=). See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        using choose = assign_ops<Device>;
        const auto mask = input.tokens.mask;
        const auto bias = input.selection_bias;
        RouterNoise gumbel{0.0, noise, seed, input.tokens.step, input.layer};
        if (input.tokens.mode == Mode::evaluate) gumbel.noise = 0.0;
        ops::template logits<T>(device, input.x, params.weight, RouterNoise{}, routing.logits, scratch);
        choose::template temper<T>(device, temperature, gumbel, routing.logits);
        const index_t bad = ops::template select<T>(device, rule(routing), bias, mask, routing, scratch);
        if (bad >= 0) return refuse_logits(routing.logits, bad);
        choose::template keep<T>(device, {threshold, keep == Keep::cumulative}, routing.probs, bias, routing.expert);
        ops::template weigh<T>(device, rule(routing), mask, routing, scratch);
        return {};
    }

    /// Accumulates into grad.logits, dinput and grads. See contract 9 of Router. Leaves in grad.logits the gradient by
    /// x W^T.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>& params,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<T, typename Device::space>& routing, const RoutingGrad<T, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>& dinput,
                  const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        using ops = router_ops<Device>;
        ops::template select_backward<T>(device, rule(routing), input.tokens.mask, routing, grad);
        assign_ops<Device>::template scale<T>(device, 1.0 / temperature, grad.logits);
        ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.weight, RouterNoise{}, grad.logits,
                                         dinput.x, grads.weight, scratch);
    }

private:
    template <class T, class Space>
    [[nodiscard]] SelectionRule rule(const Routing<T, Space>& routing) const {
        return {.top_k = static_cast<int>(routing.expert.extents[1]), .weight = weight};
    }
};

static_assert(Router<Threshold>, "steelyard: Threshold is a Router");

}  // namespace steelyard
