// The mixture: how a router's decision is carried out, from x through the experts to y, and back.
#pragma once

#include <concepts>
#include <cstddef>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard {

/// Whether forward of an expert X can do without `kept`.
template <class X>
[[nodiscard]] constexpr bool kept_is_optional() {
    if constexpr (requires { X::kept_is_optional; }) return X::kept_is_optional;
    return false;
}

/// The policies that a mixture composes, their values, and what it sees of one call.
template <class Element, class RouterT, class OverflowT, class ExpertT, class DeviceT, bool keep>
struct MixtureTypes {
    using T = Element;
    using Gate = gate_t<Element>;
    using Space = typename DeviceT::space;
    using Router = RouterT;
    using Overflow = OverflowT;
    using Expert = ExpertT;
    using Device = DeviceT;
    static constexpr bool keeps = keep;  ///< the experts' inner activations: kept for backward, or recomputed in it

    template <class U>
    using RouterParams = typename RouterT::template Params<U, Space>;
    template <class U>
    using ExpertParams = typename ExpertT::template Params<U, Space>;
    using Kept = typename ExpertT::template Kept<T, Space>;
    using Work = typename ExpertT::template Work<T, Space>;

    struct Config {
        LayerShape shape;
        RouterT router = {};
        OverflowT overflow = {};
        ExpertT expert = {};
        DeviceT device = {};
    };

    struct Call {
        RouterInput<T, Space> input;
        RouterParams<const T> router;
        ExpertParams<const T> experts;
        std::byte* scratch = nullptr;

        [[nodiscard]] index_t tokens() const { return input.x.extents[0]; }
    };
};

/// A mixture: a value made of `Types::Config`. It holds no memory; what a call leaves for its backward is its
/// `Context`, what is dead when a call returns its `Workspace`, both bundles described from the mixture itself.
/// Contract:
///
/// 1. `check()` refuses, in one sentence, what cannot work; `scratch_bytes()` is pure and asked only after that.
///    y has `outputs() * d` columns.
/// 2. `route(call, context)` decides, and may refuse; nothing but its own context has changed then.
/// 3. `run(call, context, workspace)` computes the experts; `combine(call, context, workspace, y, write)` writes
///    (= or +=) y. A masked token's row of y is 0 (or stays, under +=).
/// 4. `backward(call, context, workspace, dy, dx, write, grads)` brings dy back through combine and experts: dx (= or
///    +=), the experts' grads (+=), and what the router's decision is to blame for into the workspace.
///    `backward_router(call, context, workspace, dinput, grads)` brings that back through the router (+=).
/// 5. `routing(context, tokens)` is what balance and reports see: absent views where `has_routing` is false.
///    `grad(workspace, tokens)` is where losses on it add (+=) their gradients, between the two halves of backward;
///    `clear(workspace, tokens)` sets it to 0 before. `takes_overflow` is false where there is nothing to drop.
/// 6. Results do not depend on the number of threads; nothing is allocated.
///
/// A router that needs another mixture than `SparseMixture` names it: `template <class Types> using Mixture = ...`.
template <class M>
concept Mixture = std::copyable<M> &&
    requires(const M& mixture, typename M::Context context, typename M::Workspace workspace, index_t tokens) {
    { M::has_routing } -> std::convertible_to<bool>;
    { M::takes_overflow } -> std::convertible_to<bool>;
    { mixture.check() } -> std::same_as<Status>;
    { mixture.scratch_bytes() } -> std::same_as<index_t>;
    { mixture.outputs() } -> std::same_as<index_t>;
    mixture.routing(context, tokens);
    mixture.grad(workspace, tokens);
};

}  // namespace steelyard
