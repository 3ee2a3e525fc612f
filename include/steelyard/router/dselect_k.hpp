// DSelectK: a gate that is differentiable everywhere and becomes sparse by itself.
#pragma once

#include <algorithm>
#include <bit>

#include "steelyard/ops/gating_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// K selectors of one expert each; each spells its expert in m = ceil(log2 E) smooth bits.
///
///     S(t) = 0 | 1/2 + 3 t / (2 gamma) - 2 t^3 / gamma^3 | 1          below -gamma/2, between, above gamma/2
///     r_k(e) = product over bits b of S(z_kb) where bit b of e is 1, 1 - S(z_kb) where it is 0,   z = x W_z^T
///     w = softmax(x W_w^T),   q_e = sum_k w_k r_k(e)                  the weight of expert e
///
/// q is all there is: `logits`, `probs` and the weights are q, and every expert with q > 0 is a choice, by q
/// descending; nothing is selected beside it, so a selection bias has no effect, and there is no K to keep to before
/// the bits have converged to 0 or 1: room is made for E choices. After that at most K experts have weight.
///
/// Where E is not a power of two some codes spell no expert. A node of the tree of codes with a experts on its left and
/// b on its right goes right with b S / (b S + a (1 - S)): it ignores its bit where b = 0, and is S itself where a = b.
/// So no mass is lost, z = 0 gives 1 / E each, and nothing is divided by what may be 0. (The public code keeps the mass
/// of unreachable codes and penalises it with 1 / (reachable mass), which may be infinite.)
///
/// The paper's entropy term, which makes the bits converge sooner, is about the selectors, not about q: it is no
/// objective on the logits. Call `entropy` after `backward`, with the same scratch.
///
/// There are no constant terms; put a constant into x for them. Start with |z| well below gamma / 2 (the public code:
/// gamma / 100), since the step is flat beyond. Hazimeh et al. 2021 (2106.03760), per-example gating.
struct DSelectK {
    /// K: selectors, and the most experts of a token after convergence.
    int k = 2;
    /// Width of the smooth step.
    double gamma = 1.0;

    friend bool operator==(const DSelectK&, const DSelectK&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> codes;    // [K m, d]  W_z; selector k has rows k m to (k + 1) m - 1, highest bit first
        view<T, 2, Space> mixture;  // [K, d]    W_w

        template <class Field>
        void fields(Field&& field, const DSelectK& router, const LayerShape& shape) {
            field("codes", codes, index_t{router.k} * bits(shape.experts), shape.width);
            field("mixture", mixture, index_t{router.k}, shape.width);
        }
    };

    /// m: bits that spell one of E experts.
    [[nodiscard]] static constexpr int bits(index_t experts) {
        return experts < 2 ? 0 : static_cast<int>(std::bit_width(static_cast<std::uint64_t>(experts - 1)));
    }

    [[nodiscard]] int top_k(const LayerShape& shape) const { return static_cast<int>(shape.experts); }

    /// Refuses options that do not fit the shape.
    [[nodiscard]] Status check(const LayerShape& shape) const {
        if (Status s = detail::check_scored(shape); !s) return s;
        if (Status s = detail::check_choices("selectors", k, shape); !s) return s;
        return detail::check_positive("gamma", gamma);
    }

    /// Bytes of scratch for `route`, `backward` and `entropy`. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        LayerShape wide = shape;
        wide.experts = std::max(shape.experts, index_t{k} * std::max(1, bits(shape.experts)));
        return bytes_of<Scratch<T, typename Device::space>>(
            *this, shape.tokens, shape.experts,
            std::max(router_ops<Device>::template scratch_bytes<T>(device, wide),
                     selector_ops<Device>::template scratch_bytes<T>(device, shape, rule(shape.experts))));
    }

    /// Writes the routing (=) of the tokens of x. See contract 5 to 8 of Router.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        const auto own = evaluate<T>(device, params, input, routing.logits.extents[1], scratch);
        const index_t bad = selector_ops<Device>::template select<T>(
            device, rule(routing.logits.extents[1]), input.tokens.mask, own.codes, own.mixture, routing, own.ops.data);
        return bad < 0 ? Status{} : refuse_logits(routing.logits, bad);
    }

    /// Accumulates into grad.logits, dinput and grads. See contract 9 of Router.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>& params,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<T, typename Device::space>& routing, const RoutingGrad<T, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>& dinput,
                  const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        const auto own = evaluate<T>(device, params, input, routing.logits.extents[1], scratch);
        selector_ops<Device>::template backward<T>(device, rule(routing.logits.extents[1]), input.tokens.mask,
                                                   own.codes, own.mixture, routing, grad, own.ops.data);
        through_codes<T>(device, params, input, own, dinput, grads);
        router_ops<Device>::template logits_backward<T>(device, input.x, input.tokens.mask, params.mixture,
                                                        RouterNoise{}, own.mixture, dinput.x, grads.mixture,
                                                        own.ops.data);
    }

    /// The entropy regulariser: returns H = sum over valid tokens and selectors of -sum_e r_k(e) log(r_k(e) + 1e-6),
    /// and accumulates (+=) factor dH/dx into dinput.x and factor dH/dW_z into grads.codes. The paper's term is 1e-6 H
    /// for the sum over a batch. `experts` is E; scratch is that of `route`.
    template <class T, class Device>
    double entropy(const Device& device, const Params<const T, typename Device::space>& params,
                   const RouterInput<T, typename Device::space>& input, index_t experts, double factor,
                   const RouterInputGrad<T, typename Device::space>& dinput,
                   const Params<T, typename Device::space>& grads, std::byte* scratch) const {
        const auto own = evaluate<T>(device, params, input, experts, scratch);
        const double sum = selector_ops<Device>::template entropy<T>(device, rule(experts), input.tokens.mask, experts,
                                                                     own.codes, factor, own.ops.data);
        through_codes<T>(device, params, input, own, dinput, grads);
        return sum;
    }

private:
    template <class T, class Space>
    struct Scratch {
        view<T, 2, Space> codes;    // [T, K m]  z, then its gradient
        view<T, 2, Space> mixture;  // [T, K]
        view<std::byte, 1, Space> ops;

        template <class Field>
        void fields(Field&& field, const DSelectK& router, index_t tokens, index_t experts, index_t ops_bytes) {
            field("codes", codes, tokens, index_t{router.k} * bits(experts));
            field("mixture", mixture, tokens, index_t{router.k});
            field("ops", ops, ops_bytes);
        }
    };

    [[nodiscard]] SelectorRule rule(index_t experts) const { return {k, bits(experts), gamma}; }

    /// z and the logits of w, in scratch.
    template <class T, class Device>
    [[nodiscard]] Scratch<T, typename Device::space> evaluate(const Device& device,
                                                              const Params<const T, typename Device::space>& params,
                                                              const RouterInput<T, typename Device::space>& input,
                                                              index_t experts, std::byte* scratch) const {
        using ops = router_ops<Device>;
        const auto own =
            place<Scratch<T, typename Device::space>>(scratch, *this, input.x.extents[0], experts, index_t{1});
        if (bits(experts) > 0)
            ops::template logits<T>(device, input.x, params.codes, RouterNoise{}, own.codes, own.ops.data);
        ops::template logits<T>(device, input.x, params.mixture, RouterNoise{}, own.mixture, own.ops.data);
        return own;
    }

    template <class T, class Device>
    void through_codes(const Device& device, const Params<const T, typename Device::space>& params,
                       const RouterInput<T, typename Device::space>& input,
                       const Scratch<T, typename Device::space>& own,
                       const RouterInputGrad<T, typename Device::space>& dinput,
                       const Params<T, typename Device::space>& grads) const {
        if (own.codes.extents[1] == 0) return;  // one expert: nothing to spell
        router_ops<Device>::template logits_backward<T>(device, input.x, input.tokens.mask, params.codes, RouterNoise{},
                                                        own.codes, dinput.x, grads.codes, own.ops.data);
    }
};

static_assert(Router<DSelectK>, "steelyard: DSelectK is a Router");

}  // namespace steelyard
