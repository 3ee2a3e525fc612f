// ExpertChoice: each expert takes the tokens it likes best.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "steelyard/ops/assign_ops.hpp"
#include "steelyard/ops/overflow_ops.hpp"
#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// Expert choice routing: experts choose tokens, so every expert has the same load and no balance loss is needed.
///
///     z = x W^T,  p = softmax(z) over the experts          [T, E]
///     expert e takes the C valid tokens with the highest p[t, e]; ties go to the lowest token
///     w = p of the choice
///     C = multiple_of * round(capacity_factor * N / (E * multiple_of)), 1 to N, for N valid tokens of the call
///
/// A token has between 0 and E experts; one that nobody takes gets nothing from the layer. Experts are compared by
/// log p, so the order holds where p underflows. A selection bias, the same for all tokens of an expert, changes
/// nothing.
///
/// **Not causal**: whether a token is taken depends on all tokens of the call, later ones too. In a language model it
/// sees the future in training, and in generation its routing is another. Evaluation routes as training does.
///
/// The choice has no gradient; the weights have that of the softmax: dL/dz_j += p_j (g_j - sum_i p_i g_i), where g is
/// dL/dp and the gradient by the weight of each choice.
///
/// Source: Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (2202.09368), whose capacity factor is 2: what
/// a token gets on average.
struct ExpertChoice {
    /// Experts of a token on average. Counted in millionths; above 0, at most 4096.
    double capacity_factor = 2.0;
    Rounding rounding = Rounding::ceil;
    /// C is rounded to a multiple of this; at least 1.
    index_t multiple_of = 1;
    /// Tokens of an expert whatever the factor says. 0: by the factor.
    index_t capacity = 0;

    static constexpr bool per_token = false, causal = false;

    friend bool operator==(const ExpertChoice&, const ExpertChoice&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;  // [E, d]

        template <class Field>
        void fields(Field&& field, const ExpertChoice&, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
        }
    };

    [[nodiscard]] int top_k(const LayerShape& shape) const { return static_cast<int>(shape.experts); }

    /// How C comes about; an explicit capacity is a minimum without a factor.
    [[nodiscard]] FillRule fill() const {
        if (capacity > 0) return {.factor_millionths = 0, .minimum = capacity};
        return {
            .factor_millionths = std::llround(capacity_factor * 1e6), .rounding = rounding, .multiple_of = multiple_of};
    }

    /// C: the tokens of each expert in a call of `valid_tokens`.
    [[nodiscard]] index_t tokens_of_expert(index_t valid_tokens, index_t experts) const {
        return fill().capacity(valid_tokens, experts);
    }

    /// E C: most choices of a call.
    [[nodiscard]] index_t choice_rows(const LayerShape& shape) const {
        return shape.experts * tokens_of_expert(shape.tokens, shape.experts);
    }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_scored(shape); !s) return s;
        if (!(capacity_factor >= 1e-6 && capacity_factor <= 4096.0))
            return refuse_option("capacity_factor", "a number from 1e-6 to 4096", std::to_string(capacity_factor));
        if (rounding != Rounding::ceil && rounding != Rounding::floor)
            return refuse_option("rounding", "ceil or floor", std::to_string(static_cast<int>(rounding)));
        if (multiple_of < 1) return refuse_option("multiple_of", "at least 1", std::to_string(multiple_of));
        if (capacity < 0) return refuse_option("capacity", "a number that is not negative", std::to_string(capacity));
        return {};
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return std::max(router_ops<Device>::template scratch_bytes<T>(device, shape),
                        assign_ops<Device>::expert_choice_scratch_bytes(device, shape));
    }

    /// Writes the routing (=). See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        const auto mask = input.tokens.mask;
        ops::template logits<T>(device, input.x, params.weight, RouterNoise{}, routing.logits, scratch);
        assign_ops<Device>::template expert_choice<T>(device, fill(), routing.logits, mask, routing.expert, scratch);
        const index_t bad = ops::template weigh<T>(device, rule(routing), mask, routing, scratch);
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
        ops::template select_backward<T>(device, rule(routing), input.tokens.mask, routing, grad);
        ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.weight, RouterNoise{}, grad.logits,
                                         dinput.x, grads.weight, scratch);
    }

private:
    template <class T, class Space>
    [[nodiscard]] static SelectionRule rule(const Routing<T, Space>& routing) {
        return {.top_k = static_cast<int>(routing.logits.extents[1]), .weight = GateWeight::score};
    }
};

static_assert(Router<ExpertChoice>, "steelyard: ExpertChoice is a Router");

}  // namespace steelyard
