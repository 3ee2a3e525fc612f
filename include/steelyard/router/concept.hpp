// The Router axis: what a layer asks of whatever sends tokens to experts.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard {

namespace detail {

/// A device in name only, so that a router can be checked against the concept without one.
struct AnyDevice {
    using space = HostSpace;
};

/// A visitor of `fields` in name only.
struct AnyField {
    template <class T, int Rank, class Space, class... Extents>
    void operator()(const char*, view<T, Rank, Space>&, Extents...) const {}
    template <class Bundle, class... Dims>
    void group(const char*, Bundle&, const Dims&...) const {}
};

template <class R, class T>
concept RoutesWith = requires(const R& router, const AnyDevice& device, const LayerShape& shape,
                              const typename R::template Params<const T, HostSpace>& params,
                              const typename R::template Params<T, HostSpace>& grads, view<const T, 2> x,
                              view<const float, 1> bias, const TokenInfo<>& info, Routing<T> routing,
                              RoutingGrad<T> grad, view<T, 2> dx, std::byte* scratch) {
    { router.template scratch_bytes<T>(device, shape) } -> std::same_as<index_t>;
    {
        router.template route<T>(device, params, x, bias, info, std::uint32_t{0}, routing, scratch)
        } -> std::same_as<Status>;
    router.template backward<T>(device, params, x, info, std::uint32_t{0}, routing, grad, dx, grads, scratch);
};

}  // namespace detail

/// A router: an immutable value that turns token vectors into choices of experts and combine weights.
/// Contract, for T in {float, double} and a device whose memory space is `Space`:
///
/// 1. It is a value: copyable, compared with `==`, without state. `top_k()`, the number K of experts of a
///    token, is at least 1.
/// 2. `Status check(const LayerShape&) const` refuses, in one sentence, every option that cannot work with
///    these sizes. Everything below is called only with shapes that passed.
/// 3. `template <class T, class Space> struct Params` is a bundle (core/layout.hpp) of the router's tensors with
///    `fields(field, const Router&, const LayerShape&)`. With `const T` it is what is read, with `T` its gradient.
/// 4. `scratch_bytes<T>(device, shape)` is pure; `scratch` below has that many bytes, aligned to
///    `layout_alignment`, and keeps nothing between calls.
/// 5. `route<T>(device, params, x[T,d], selection_bias[E] or absent, info, layer, routing (=), scratch)` writes all
///    of `routing` for the tokens of x:
///    - `logits` are raw, noise included; a row of `probs` has the scores of all experts, normalised to sum 1;
///    - the K `expert`s of a token are distinct and in [0, E), best first; ties go to the lowest index;
///    - a masked token has expert -1, weight 0 and probs 0, and what its row of x holds changes nothing else;
///    - `selection_bias` acts on the choice alone: `weight` depends on the logits and on who was chosen. It is
///      float for every T, because small steps of it must not be lost.
/// 6. Logits of a valid token that are not finite are refused with `Code::not_finite` and stage "router".
/// 7. `route` is a pure function of its arguments, bit for bit, for any number of threads. Random numbers are
///    keyed by (seed, step, layer, token_offset + t), so they do not depend on how the batch is split. With
///    `Mode::evaluate` there are none.
/// 8. Nothing is allocated and no state of the balance is touched.
/// 9. `backward<T>(device, params, x, info, layer, routing, grad, dx (+=), grads (+=), scratch)` gets the `routing`
/// that
///    `route` wrote with the same arguments. It reads grad.weight and grad.probs, accumulates into grad.logits
///    (what was there, from losses on the logits, counts too), then into `dx` and `grads`. The choice itself has
///    no gradient. A tensor of `grads` that is absent is frozen, an absent `dx` is not wanted, absent grad.weight
///    or grad.probs are zero. Masked tokens contribute nothing.
///
/// `check_router_laws` (router/laws.hpp) tests a router against 5 to 9.
template <class R>
concept Router = std::copyable<R> && std::equality_comparable<R> &&
    requires(const R& router, const LayerShape& shape, typename R::template Params<float, HostSpace>& params,
             const detail::AnyField& field) {
    { router.top_k() } -> std::same_as<int>;
    { router.check(shape) } -> std::same_as<Status>;
    params.fields(field, router, shape);
} && detail::RoutesWith<R, float> && detail::RoutesWith<R, double>;

}  // namespace steelyard
