// XMoe: cosines in a low-dimensional space with a learned temperature, against the collapse of representations.
#pragma once

#include <algorithm>
#include <string>

#include "steelyard/ops/gating_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// Routing by direction: tokens and experts meet on a sphere of few dimensions.
///
///     h = W x                               projection                        [T, r]
///     s_i = <h, e_i> / (|h| |e_i|)          cosines, |s| <= 1                 [T, E]
///     z = s / tau                           `Routing::logits`                 [T, E]
///     w = softmax(z) or sigmoid(z) of the K best, as it is or renormalised    [T, K]
///     tau = temperature exp(rho)            rho learned, so tau stays above 0
///
/// A linear router pulls every token along its expert's weight vector, which lets the representations collapse into a
/// space of E dimensions; here the gradient by h is orthogonal to h, and that by x lies in the span of the rows of W.
/// `probs`, which the balance losses are made of, are taken at the *initial* temperature as the paper has it
/// (`probs_at_initial`), so that learning tau is no way round a balance loss. Norms below `epsilon` count as epsilon:
/// zero vectors give cosines 0 and finite gradients.
///
/// Source: Chi et al. 2022 (2204.09179). Defaults are the paper's: r = E / 2, tau = 0.07, rho starting at 0.
struct XMoe {
    /// K: experts of a token, 1 to E.
    int k = 1;
    Score score = Score::softmax;
    GateWeight weight = GateWeight::score;
    /// tau at rho = 0. Above 0.
    double temperature = 0.07;
    /// r: dimensions of the sphere. 0: half the number of experts, at least 1.
    int dimensions = 0;
    /// Balance losses see the softmax or the normalised sigmoid of s / temperature instead of s / tau.
    bool probs_at_initial = true;
    /// The smallest norm to divide by.
    double epsilon = 1e-4;

    friend bool operator==(const XMoe&, const XMoe&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> projection;  // [r, d]  W
        view<T, 2, Space> experts;     // [E, r]  e
        view<T, 1, Space> log_ratio;   // [1]     rho = log(tau / temperature)

        template <class Field>
        void fields(Field&& field, const XMoe& router, const LayerShape& shape) {
            const index_t r = router.rank(shape.experts);
            field("projection", projection, r, shape.width);
            field("experts", experts, shape.experts, r);
            field("log_ratio", log_ratio, index_t{1});
        }
    };

    /// r for E experts.
    [[nodiscard]] index_t rank(index_t experts) const {
        return dimensions > 0 ? index_t{dimensions} : std::max<index_t>(1, experts / 2);
    }

    [[nodiscard]] int top_k(const LayerShape&) const { return k; }

    /// Refuses options that do not fit the shape.
    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_scored(shape); !s) return s;
        if (Status s = detail::check_choices("top_k", k, shape); !s) return s;
        if (Status s = detail::check_positive("temperature", temperature); !s) return s;
        if (dimensions < 0) return refuse_option("dimensions", "at least 0", std::to_string(dimensions));
        return detail::check_positive("epsilon", epsilon);
    }

    /// Bytes of scratch for `route` and `backward`. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        LayerShape wide = shape;  // every product that is asked for
        wide.width = std::max(shape.width, rank(shape.experts));
        wide.experts = std::max(shape.experts, rank(shape.experts));
        return bytes_of<Scratch<T, typename Device::space>>(
            *this, shape.tokens, shape.experts,
            std::max(router_ops<Device>::template scratch_bytes<T>(device, wide),
                     cosine_ops<Device>::scratch_bytes(device, shape)));
    }

    /// Writes the routing (=) of the tokens of x. See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        using cosine = cosine_ops<Device>;
        const auto own = meet<T>(device, params, input, routing, scratch);
        ops::template logits<T>(device, own.unit, own.unit_experts, RouterNoise{}, routing.logits, own.ops.data);
        if (probs_at_initial)
            cosine::template temper<T>(device, 1.0 / temperature, params.log_ratio, 0, routing.logits, own.logits);
        cosine::template temper<T>(device, 1.0 / temperature, params.log_ratio, -1, routing.logits, routing.logits);
        const auto& mask = input.tokens.mask;
        const index_t bad = ops::template select<T>(device, rule(), input.selection_bias, mask, routing, own.ops.data);
        if (bad >= 0) return refuse_logits(routing.logits, bad);
        if (probs_at_initial)
            (void)ops::template weigh<T>(device, rule(), mask, {own.logits, routing.probs, routing.expert, own.weight},
                                         own.ops.data);
        return {};
    }

    /// Accumulates into grad.logits, dinput and grads. See contract 9 of Router.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>& params,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<T, typename Device::space>& routing, const RoutingGrad<T, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>& dinput,
                  const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        using Space = typename Device::space;
        using ops = router_ops<Device>;
        using cosine = cosine_ops<Device>;
        const auto own = meet<T>(device, params, input, routing, scratch);
        const auto& mask = input.tokens.mask;
        view<const T, 2, Space> dinitial;
        if (probs_at_initial) {
            // Weights come from the logits, probs from others; each has a backward of its own.
            const Routing<T, Space> learned{routing.logits, own.probs, routing.expert, own.weight};
            const Routing<T, Space> initial{own.logits, routing.probs, routing.expert, own.weight};
            (void)ops::template weigh<T>(device, rule(), mask, learned, own.ops.data);
            ops::template select_backward<T>(device, rule(), mask, learned, {grad.weight, {}, grad.logits});
            cosine::template temper<T>(device, 1.0, params.log_ratio, 1, routing.logits, own.logits);
            cosine::template clear<T>(device, own.dlogits);
            ops::template select_backward<T>(device, rule(), mask, initial, {{}, grad.probs, own.dlogits});
            dinitial = own.dlogits;
        } else {
            ops::template select_backward<T>(device, rule(), mask, routing, grad);
        }
        cosine::template temper_backward<T>(device, mask, temperature, params.log_ratio, routing.logits, grad.logits,
                                            dinitial, own.dcosine, grads.log_ratio, own.ops.data);
        cosine::template clear<T>(device, own.dunit);
        cosine::template clear<T>(device, own.dunit_experts);
        ops::template logits_backward<T>(device, own.unit, mask, own.unit_experts, RouterNoise{}, own.dcosine,
                                         own.dunit, own.dunit_experts, own.ops.data);
        cosine::template normalize_backward<T>(device, mask, own.unit, own.norm, epsilon, own.dunit);
        cosine::template normalize_backward<T>(device, {}, own.unit_experts, own.norm_experts, epsilon,
                                               own.dunit_experts);
        if (grads.experts.present()) cosine::template add<T>(device, own.dunit_experts, grads.experts);
        ops::template logits_backward<T>(device, input.x, mask, params.projection, RouterNoise{}, own.dunit, dinput.x,
                                         grads.projection, own.ops.data);
    }

private:
    template <class T, class Space>
    struct Scratch {
        view<T, 2, Space> unit, dunit;                  // [T, r]
        view<T, 1, Space> norm;                         // [T]
        view<T, 2, Space> unit_experts, dunit_experts;  // [E, r]
        view<T, 1, Space> norm_experts;                 // [E]
        view<T, 2, Space> dcosine;                      // [T, E]
        view<T, 2, Space> logits, probs, dlogits;       // [T, E]  where probs are at the initial temperature
        view<T, 2, Space> weight;                       // [T, K]
        view<std::byte, 1, Space> ops;

        template <class Field>
        void fields(Field&& field, const XMoe& router, index_t tokens, index_t n, index_t ops_bytes) {
            const index_t r = router.rank(n), apart = router.probs_at_initial ? tokens : 0;
            field("unit", unit, tokens, r);
            field("dunit", dunit, tokens, r);
            field("norm", norm, tokens);
            field("unit_experts", unit_experts, n, r);
            field("dunit_experts", dunit_experts, n, r);
            field("norm_experts", norm_experts, n);
            field("dcosine", dcosine, tokens, n);
            field("logits", logits, apart, n);
            field("probs", probs, apart, n);
            field("dlogits", dlogits, apart, n);
            field("weight", weight, apart, index_t{router.k});
            field("ops", ops, ops_bytes);
        }
    };

    [[nodiscard]] SelectionRule rule() const { return {.top_k = k, .score = score, .weight = weight}; }

    /// The unit vectors of tokens and experts, in scratch.
    template <class T, class Device>
    [[nodiscard]] Scratch<T, typename Device::space> meet(const Device& device,
                                                          const Params<const T, typename Device::space>& params,
                                                          const RouterInput<T, typename Device::space>& input,
                                                          const Routing<T, typename Device::space>& routing,
                                                          std::byte* scratch) const {
        using cosine = cosine_ops<Device>;
        const auto own = place<Scratch<T, typename Device::space>>(scratch, *this, input.x.extents[0],
                                                                   routing.logits.extents[1], index_t{1});
        router_ops<Device>::template logits<T>(device, input.x, params.projection, RouterNoise{}, own.unit,
                                               own.ops.data);
        cosine::template normalize<T>(device, own.unit, own.unit, own.norm, epsilon);
        cosine::template normalize<T>(device, params.experts, own.unit_experts, own.norm_experts, epsilon);
        return own;
    }
};

static_assert(Router<XMoe>, "steelyard: XMoe is a Router");

}  // namespace steelyard
