// Hierarchical: a gate over groups of experts, then a gate inside each group, composed from two TopK.
#pragma once

#include <algorithm>

#include "steelyard/ops/gating_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"
#include "steelyard/router/top_k.hpp"

namespace steelyard {

/// Two-level gating: `outer` chooses K1 of G groups, `inner` K2 of the E / G experts of each of them; K = K1 K2.
///
///     p_ij = p_i p_j|i        w_ij = w_i w_j|i        logits_ij = a_i + log p_j|i
///
/// where p_i, w_i are the outer gate's and p_j|i, w_j|i the inner gate's of group i. `probs` are the p_ij of all
/// experts, whose softmax form `logits` are: so losses on logits and on probs see one flat gate. Choices are ordered by
/// logits. Expert j of group i is expert i E / G + j.
///
/// A selection bias acts on both choices: on the inner as it is, on the outer as the mean of each group's. Both levels
/// have softmax scores, and any other option of TopK: noise, scale, groups of their own, weights renormalised or not.
/// With one group, or with groups of one expert, this is the flat TopK.
///
/// Sources: Shazeer et al. 2017 (1701.06538, appendix B); Jordan and Jacobs 1994 for the dense form.
struct Hierarchical {
    TopK outer{.k = 2};
    TopK inner{.k = 2};
    /// G: a divisor of E.
    int groups = 1;

    friend bool operator==(const Hierarchical&, const Hierarchical&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> outer;  // [G, d]
        view<T, 2, Space> inner;  // [E, d]

        template <class Field>
        void fields(Field&& field, const Hierarchical& router, const LayerShape& shape) {
            field("outer", outer, router.groups, shape.width);
            field("inner", inner, shape.experts, shape.width);
        }
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return outer.k * inner.k; }

    /// Refuses options that do not fit the shape; what a level refuses is named "outer" or "inner".
    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_experts(shape); !s) return s;
        if (Status s = detail::check_divides_experts("groups", groups, shape); !s) return s;
        LayerShape level = shape;
        level.experts = groups;
        if (Status s = outer.check(level); !s) return refuse_option("outer." + s.tensor(), s.expected(), s.came());
        level.experts = shape.experts / groups;
        if (Status s = inner.check(level); !s) return refuse_option("inner." + s.tensor(), s.expected(), s.came());
        if (outer.score != Score::softmax || inner.score != Score::softmax)
            return refuse_option("score", "softmax at both levels", "sigmoid");
        return {};
    }

    /// Bytes of scratch for `route` and `backward`. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return bytes_of<Scratch<T, typename Device::space>>(
            *this, shape.tokens, shape.experts, router_ops<Device>::template scratch_bytes<T>(device, shape));
    }

    /// Writes the routing (=) of the tokens of x. See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        using ops = router_ops<Device>;
        const auto own = place_scratch<T, Device>(routing, scratch);
        const auto& mask = input.tokens.mask;
        ops::template logits<T>(device, input.x, params.outer, noise_of(outer, input, 0), own.outer.logits,
                                own.ops.data);
        ops::template logits<T>(device, input.x, params.inner, noise_of(inner, input, 1), routing.logits, own.ops.data);
        view<const float, 1, typename Device::space> group_bias;
        if (input.selection_bias.present()) {
            level_ops<Device>::mean_bias(device, input.selection_bias, own.bias);
            group_bias = own.bias;
        }
        index_t bad = ops::template select<T>(device, outer.rule(), group_bias, mask, own.outer, own.ops.data);
        auto both = own.inner;  // the inner gates work on the logits and probs of the result
        both.logits = routing.logits;
        both.probs = routing.probs;
        const index_t members = routing.logits.extents[1] / groups;
        for (int g = 0; g < groups; ++g) {
            const auto bias = input.selection_bias.present()
                                  ? input.selection_bias.slice(g * members, (g + 1) * members)
                                  : input.selection_bias;
            const index_t found =
                ops::template select<T>(device, inner.rule(), bias, mask, group_of(both, g), own.ops.data);
            if (found >= 0) bad = bad < 0 ? found : std::min(bad, found);
        }
        level_ops<Device>::template join<T>(device, mask, own.outer, both, routing);
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
        const auto own = place_scratch<T, Device>(routing, scratch);
        const auto& mask = input.tokens.mask;
        level_ops<Device>::template split<T>(device, mask, routing, own.outer, own.inner);
        (void)ops::template weigh<T>(device, outer.rule(), mask, own.outer, own.ops.data);
        for (int g = 0; g < groups; ++g)
            (void)ops::template weigh<T>(device, inner.rule(), mask, group_of(own.inner, g), own.ops.data);
        level_ops<Device>::template split_gradient<T>(device, mask, routing, grad, own.outer, own.inner, own.douter,
                                                      own.dinner);
        ops::template select_backward<T>(device, outer.rule(), mask, own.outer, own.douter);
        for (int g = 0; g < groups; ++g)
            ops::template select_backward<T>(device, inner.rule(), mask, group_of(own.inner, g),
                                             group_of(own.dinner, g));
        ops::template logits_backward<T>(device, input.x, mask, params.outer, noise_of(outer, input, 0),
                                         own.douter.logits, dinput.x, grads.outer, own.ops.data);
        ops::template logits_backward<T>(device, input.x, mask, params.inner, noise_of(inner, input, 1),
                                         own.dinner.logits, dinput.x, grads.inner, own.ops.data);
    }

private:
    template <class T, class Space>
    struct Scratch {
        Routing<T, Space> outer, inner;  // inner choices and weights: [T, G K2]
        RoutingGrad<T, Space> douter, dinner;
        view<float, 1, Space> bias;  // [G]
        view<std::byte, 1, Space> ops;

        template <class Field>
        void fields(Field&& field, const Hierarchical& router, index_t tokens, index_t experts, index_t ops_bytes) {
            const index_t outer_experts = router.groups, slots = outer_experts * router.inner.k;
            field.group("outer", outer, tokens, outer_experts, index_t{router.outer.k});
            field.group("inner", inner, tokens, experts, slots);
            field.group("douter", douter, tokens, outer_experts, index_t{router.outer.k});
            field.group("dinner", dinner, tokens, experts, slots);
            field("bias", bias, outer_experts);
            field("ops", ops, ops_bytes);
        }
    };

    template <class T, class Device>
    [[nodiscard]] Scratch<T, typename Device::space> place_scratch(const Routing<T, typename Device::space>& routing,
                                                                   std::byte* scratch) const {
        return place<Scratch<T, typename Device::space>>(scratch, *this, routing.logits.extents[0],
                                                         routing.logits.extents[1], index_t{1});
    }

    /// Columns of one group.
    template <class V>
    [[nodiscard]] V columns(V tensor, int g) const {
        tensor.extents[1] /= groups;
        if (tensor.present()) tensor.data += g * tensor.extents[1];
        return tensor;
    }
    template <class T, class Space>
    [[nodiscard]] Routing<T, Space> group_of(const Routing<T, Space>& r, int g) const {
        return {columns(r.logits, g), columns(r.probs, g), columns(r.expert, g), columns(r.weight, g)};
    }
    template <class T, class Space>
    [[nodiscard]] RoutingGrad<T, Space> group_of(const RoutingGrad<T, Space>& r, int g) const {
        return {columns(r.weight, g), columns(r.probs, g), columns(r.logits, g)};
    }

    /// The two levels draw different numbers, also where their seeds are the same.
    template <class T, class Space>
    [[nodiscard]] static RouterNoise noise_of(const TopK& level, const RouterInput<T, Space>& input,
                                              std::uint64_t which) {
        if (input.tokens.mode == Mode::evaluate) return {};
        return {level.jitter, level.noise, level.seed ^ (which * 0x9E3779B97F4A7C15u), input.tokens.step, input.layer};
    }
};

static_assert(Router<Hierarchical>, "steelyard: Hierarchical is a Router");

}  // namespace steelyard
