// Base: every expert gets the same number of tokens, those that suit it best together.
#pragma once

#include <algorithm>
#include <string>

#include "steelyard/ops/assign_ops.hpp"
#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// Balanced assignment of experts.
///
///     z = x W^T                     W: a centroid for each expert                            [T, E]
///     training:   a = the assignment of one expert to each of the n valid tokens that maximises sum_t (z + b)[t, a(t)]
///                 with n / E tokens for every expert; floor or ceil of it where E does not divide n (`remainder`)
///     evaluation: a(t) = arg max_e (z + b)[t, e]
///     w = sigmoid(z[t, a(t)])                                                                [T, 1]
///     probs = sigmoid(z) / sum_e sigmoid(z)                                                  [T, E]
///
/// b is the selection bias. Where E divides n, adding a number to a whole column moves every assignment's sum alike, so
/// it acts in evaluation only.
///
/// The assignment has no gradient: the centroids learn through w alone, dL/dz = w (1 - w) dL/dw. The paper's layer is
/// y = w f(x) + (1 - w) x with f(x) = x + FFN(x), which is x + w FFN(x): this router gives w FFN(x), and the model's
/// residual connection adds x.
///
/// Masked tokens take no expert. Each call assigns its own tokens, so with several ranks every rank is balanced by
/// itself (the paper shuffles tokens between ranks first).
///
/// **Not causal** in training: a token's expert depends on all tokens of the call. Evaluation is per token.
///
/// The exact solver takes O(n (n + E^2)) steps on one thread; the auction is for large calls. Both end always.
///
/// Source: Lewis et al., "BASE Layers: Simplifying Training of Large, Sparse Models" (2103.16716).
struct Base {
    AssignSolver solver = AssignSolver::exact;
    /// Who takes one token more where E does not divide n.
    Remainder remainder = Remainder::best;
    /// Auction only: the sum of scores is at most n * epsilon below the best. Above 0.
    double epsilon = 1e-3;

    static constexpr bool per_token = false, causal = false;

    friend bool operator==(const Base&, const Base&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;  // [E, d]

        template <class Field>
        void fields(Field&& field, const Base&, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
        }
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return 1; }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_scored(shape); !s) return s;
        if (solver != AssignSolver::exact && solver != AssignSolver::auction)
            return refuse_option("solver", "exact or auction", std::to_string(static_cast<int>(solver)));
        if (remainder != Remainder::best && remainder != Remainder::lowest)
            return refuse_option("remainder", "best or lowest", std::to_string(static_cast<int>(remainder)));
        return detail::check_positive("epsilon", epsilon);
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return std::max({router_ops<Device>::template scratch_bytes<T>(device, shape),
                         assign_ops<Device>::assign_scratch_bytes(device, shape),
                         assign_ops<Device>::top_choices_scratch_bytes(device, shape)});
    }

    /// Writes the routing (=). See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        using choose = assign_ops<Device>;
        const auto mask = input.tokens.mask;
        ops::template logits<T>(device, input.x, params.weight, RouterNoise{}, routing.logits, scratch);
        if (input.tokens.mode == Mode::evaluate)
            choose::template top_choices<T, float>(device, routing.logits, input.selection_bias, mask, routing.expert,
                                                   scratch);
        else
            choose::template assign<T>(device, {solver, remainder, epsilon}, routing.logits, input.selection_bias, mask,
                                       routing.expert, scratch);
        const index_t bad = ops::template weigh<T>(device, rule, mask, routing, scratch);
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
        ops::template select_backward<T>(device, rule, input.tokens.mask, routing, grad);
        ops::template logits_backward<T>(device, input.x, input.tokens.mask, params.weight, RouterNoise{}, grad.logits,
                                         dinput.x, grads.weight, scratch);
    }

private:
    static constexpr SelectionRule rule = {.top_k = 1, .score = Score::sigmoid, .weight = GateWeight::score};
};

static_assert(Router<Base>, "steelyard: Base is a Router");

}  // namespace steelyard
