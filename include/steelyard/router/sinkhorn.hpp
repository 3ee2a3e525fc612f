// Sinkhorn: the choice comes from a balanced transport plan, the weights from the raw logits.
#pragma once

#include <algorithm>
#include <string>

#include "steelyard/core/layout.hpp"
#include "steelyard/ops/assign_ops.hpp"
#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// S-BASE: entropy-regularised balanced assignment.
///
///     z = x W^T                                                                          [T, E]
///     training:   log P = z / temperature + u_t + v_e with rows of sum 1 and columns of sum n / E   (n valid tokens)
///                 chosen = the K best of P[t, :]
///     evaluation: chosen = the K best of (z + b)[t, :]
///     w = sigmoid(z) of the choice for K = 1;  softmax(z) over all experts for K > 1     [T, K]
///     probs = the scores that the weights are made of, normalised to sum 1               [T, E]
///
/// P is found by Sinkhorn's iteration in the log domain (on the CPU hastened by Newton's method, so that 10 to 60
/// passes do for logits of 1e-2 to 1e6 temperatures), which ends at the tolerance (largest relative error of an
/// expert's share) or after `iterations`; it has no gradient. The plan is balanced; the best of each of its rows need
/// not be, though it comes near where the temperature is low. As the temperature falls, the plan tends to the
/// assignment of `Base`. b is the selection bias: in training it would only move v.
///
/// **Not causal** in training: v depends on all tokens of the call. Evaluation is per token. Each call balances its own
/// tokens.
///
/// Gradients are those of TopK with the same scores and unnormalised weights.
///
/// Source: Clark et al., "Unified Scaling Laws for Routed Language Models" (2202.01169), where K = 1.
struct Sinkhorn {
    /// K: experts of a token, 1 to E.
    int k = 1;
    /// Of the plan alone. Above 0; the lower, the nearer to an assignment.
    double temperature = 1.0;
    /// Largest relative error of an expert's share. Not negative; 0: always `iterations` passes.
    double tolerance = 1e-4;
    /// Passes over the logits at most; at least 1.
    int iterations = 300;

    static constexpr bool per_token = false, causal = false;

    friend bool operator==(const Sinkhorn&, const Sinkhorn&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;  // [E, d]

        template <class Field>
        void fields(Field&& field, const Sinkhorn&, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
        }
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return k; }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_scored(shape); !s) return s;
        if (Status s = detail::check_choices("top_k", k, shape); !s) return s;
        if (Status s = detail::check_positive("temperature", temperature); !s) return s;
        if (Status s = detail::check_not_negative("tolerance", tolerance); !s) return s;
        if (iterations < 1) return refuse_option("iterations", "at least 1", std::to_string(iterations));
        return {};
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        using choose = assign_ops<Device>;
        return bytes_of<Scratch<typename Device::space>>(shape) +
               std::max({router_ops<Device>::template scratch_bytes<T>(device, shape),
                         choose::sinkhorn_scratch_bytes(device, shape),
                         choose::top_choices_scratch_bytes(device, shape)});
    }

    /// Writes the routing (=). See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        using choose = assign_ops<Device>;
        const auto mask = input.tokens.mask;
        const LayerShape shape{.experts = routing.logits.extents[1]};
        const auto potential = place<Scratch<typename Device::space>>(scratch, shape).potential;
        std::byte* const rest = scratch + bytes_of<Scratch<typename Device::space>>(shape);
        ops::template logits<T>(device, input.x, params.weight, RouterNoise{}, routing.logits, rest);
        if (input.tokens.mode == Mode::evaluate) {
            choose::template top_choices<T, float>(device, routing.logits, input.selection_bias, mask, routing.expert,
                                                   rest);
        } else {
            choose::template sinkhorn<T>(device, {temperature, tolerance, iterations}, routing.logits, mask, potential,
                                         rest);
            choose::template top_choices<T, double>(device, routing.logits, potential, mask, routing.expert, rest);
        }
        const index_t bad = ops::template weigh<T>(device, rule(), mask, routing, rest);
        return bad < 0 ? Status{} : refuse_logits(routing.logits, bad);
    }

    /// Accumulates into grad.logits, dinput and grads. See contract 9 of Router.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>& params,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<T, typename Device::space>& routing, const RoutingGrad<T, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>& dinput,
                  const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        using ops = router_ops<Device>;
        ops::template select_backward<T>(device, rule(), input.tokens.mask, routing, grad);
        ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.weight, RouterNoise{}, grad.logits,
                                         dinput.x, grads.weight, scratch);
    }

private:
    template <class Space>
    struct Scratch {
        view<double, 1, Space> potential;  // [E]  temperature * v

        template <class Field>
        void fields(Field&& field, const LayerShape& shape) {
            field("potential", potential, shape.experts);
        }
    };

    [[nodiscard]] SelectionRule rule() const {
        return {.top_k = k, .score = k == 1 ? Score::sigmoid : Score::softmax, .weight = GateWeight::score};
    }
};

static_assert(Router<Sinkhorn>, "steelyard: Sinkhorn is a Router");

}  // namespace steelyard
