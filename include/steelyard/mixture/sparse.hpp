// The sparse mixture: each token visits the experts that were chosen for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>

#include "steelyard/mixture/types.hpp"
#include "steelyard/ops/memory_ops.hpp"
#include "steelyard/ops/plan_ops.hpp"
#include "steelyard/plan/overflow.hpp"
#include "steelyard/router/concept.hpp"

namespace steelyard {

/// y_t = sum_k weight_tk expert_{i(t,k)}(x_t)
///
///     route -> admit (where the overflow rule drops) -> plan -> experts -> combine
///
/// Backward replays the same plan. The mixture of every `Router`.
template <class Types>
class SparseMixture {
    using T = typename Types::T;
    using Gate = typename Types::Gate;
    using Space = typename Types::Space;
    using RouterT = typename Types::Router;
    using OverflowT = typename Types::Overflow;
    using Traits = RouterTraits<RouterT>;
    using Config = typename Types::Config;
    using Call = typename Types::Call;
    using Plans = plan_ops<typename Types::Device>;
    using Memory = memory_ops<typename Types::Device>;
    static constexpr bool rescales = detail::rescales<OverflowT>();

public:
    static constexpr bool has_routing = true, takes_overflow = true;

    explicit SparseMixture(const Config& config) : config_(config), top_k_(config.router.top_k(config.shape)) {}

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] index_t outputs() const { return 1; }

    [[nodiscard]] Status check() const {
        const auto& [shape, router, overflow, expert, device] = config_;
        if (Status s = router.check(shape); !s) return s;
        if (Status s = expert.check(shape); !s) return s;
        if (Status s = overflow.check(shape, router.top_k(shape)); !s) return s;
        constexpr index_t most = std::numeric_limits<std::int32_t>::max();
        if (shape.tokens > most / top_k_)
            return Status::refuse(Code::invalid_argument, "layer.config", "shape.tokens", "tokens * top_k below 2^31",
                                  std::to_string(shape.tokens));
        return {};
    }

    [[nodiscard]] index_t scratch_bytes() const {
        const auto& [shape, router, overflow, expert, device] = config_;
        LayerShape grouped = shape;
        grouped.tokens = rows();
        index_t bytes = std::max({router.template scratch_bytes<T>(device, shape),
                                  Plans::scratch_bytes(device, shape, static_cast<int>(top_k_)),
                                  expert.template scratch_bytes<T>(device, grouped)});
        if constexpr (OverflowT::drops)
            bytes = std::max(bytes, overflow.template scratch_bytes<T>(device, shape, static_cast<int>(top_k_)));
        return bytes;
    }

    struct Context {
        Routing<Gate, Space> routing;
        view<expert_t, 2, Space> admitted;     // [T, K]  choices after drops, where the overflow rule drops
        view<Gate, 2, Space> admitted_weight;  // [T, K]  their weights, where it rescales them
        Plan<Space> plan;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const SparseMixture& of) {
            const auto& shape = of.config_.shape;
            field.group("routing", routing, shape.tokens, shape.experts, of.top_k_, Traits::has_smooth_load);
            if constexpr (OverflowT::drops) field("admitted", admitted, shape.tokens, of.top_k_);
            if constexpr (rescales) field("admitted_weight", admitted_weight, shape.tokens, of.top_k_);
            field.group("plan", plan, shape.tokens, shape.experts, of.top_k_);
            if constexpr (Types::keeps) field.group("kept", kept, of.config_.expert, shape, of.rows());
        }
    };

    struct Workspace {
        view<T, 2, Space> rows;  // [N, d]  expert outputs in forward, input gradients in backward
        RoutingGrad<Gate, Space> grad;
        typename Types::Work work;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const SparseMixture& of) {
            const auto& shape = of.config_.shape;
            field("rows", rows, of.rows(), shape.width);
            field.group("grad", grad, shape.tokens, shape.experts, of.top_k_, Traits::has_smooth_load);
            field.group("work", work, of.config_.expert, shape, of.rows());
            if constexpr (!Types::keeps) field.group("kept", kept, of.config_.expert, shape, of.rows());
        }
    };

    [[nodiscard]] Routing<Gate, Space> routing(const Context& context, index_t tokens) const {
        return context.routing.first(tokens);
    }
    [[nodiscard]] RoutingGrad<Gate, Space> grad(const Workspace& workspace, index_t tokens) const {
        return workspace.grad.first(tokens);
    }
    void clear(const Workspace& workspace, index_t tokens) const {
        const auto of = grad(workspace, tokens);
        for (const auto* tensor : {&of.weight, &of.probs, &of.logits, &of.smooth_load})
            Memory::fill(config_.device, *tensor, Gate(0));
    }
    [[nodiscard]] Plan<Space> plan(const Context& context, index_t tokens) const { return context.plan.first(tokens); }

    Status route(const Call& call, const Context& context) const {
        return config_.router.template route<T>(config_.device, call.router, call.input,
                                                routing(context, call.tokens()), call.scratch);
    }

    void run(const Call& call, const Context& context, const Workspace& workspace) const {
        const auto decided = routing(context, call.tokens());
        auto choices = decided.expert;
        if constexpr (OverflowT::drops) {
            choices = context.admitted.slice(0, call.tokens());
            Memory::copy(config_.device, view<const expert_t, 2, Space>(decided.expert), choices);
            config_.overflow.template admit<T>(config_.device, decided, call.input.tokens, choices, call.scratch);
        }
        if constexpr (rescales)
            config_.overflow.template rescale<T>(config_.device, decided, view<const expert_t, 2, Space>(choices),
                                                 context.admitted_weight.slice(0, call.tokens()));
        const auto grouped = plan(context, call.tokens());
        Plans::make_plan(config_.device, view<const expert_t, 2, Space>(choices), grouped, call.scratch);
        auto kept = Types::keeps ? context.kept : workspace.kept;
        // What no backward will read need not be written: it is more than the layer's input and output together.
        if constexpr (kept_is_optional<typename Types::Expert>())
            if (!Types::keeps || call.input.tokens.mode == Mode::evaluate) kept = {};
        config_.expert.template forward<T>(config_.device, call.experts, call.input.x, grouped, kept, workspace.rows,
                                           call.scratch);
    }

    void combine(const Call& call, const Context& context, const Workspace& workspace, view<T, 2, Space> y,  // [T, d]
                 Write write) const {
        const view<const T, 2, Space> rows = workspace.rows;
        const index_t tokens = call.tokens();
        Plans::template combine<T>(config_.device, plan(context, tokens), rows, weight(context, tokens), y, write);
    }

    /// Tells the experts' gradients to replace what is there, where experts can do that.
    template <class Grads>
        requires requires(Grads grads) { grads.write; }
    void replace_gradients(Grads& grads) const { grads.write = Write::assign; }
    void backward(const Call& call, const Context& context, const Workspace& workspace,
                  view<const T, 2, Space> dy,         // [T, d]
                  view<T, 2, Space> dx, Write write,  // [T, d]
                  const typename Types::template ExpertParams<T>& grads) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const auto& kept = Types::keeps ? context.kept : workspace.kept;
        const auto grouped = plan(context, call.tokens());
        const auto blame = grad(workspace, call.tokens());
        const view<const T, 2, Space> rows = workspace.rows;
        if constexpr (!Types::keeps)
            expert.template forward<T>(device, call.experts, call.input.x, grouped, kept, view<T, 2, Space>{},
                                       call.scratch);
        expert.template backward<T>(device, call.experts, call.input.x, grouped, kept, weight(context, call.tokens()),
                                    dy, workspace.work, workspace.rows,
                                    Traits::learns ? blame.weight : view<Gate, 2, Space>{}, grads, call.scratch);
        Plans::template combine<T>(device, grouped, rows, view<const Gate, 2, Space>{}, dx, write);
        if constexpr (rescales)
            overflow.template rescale_backward<T>(
                device, routing(context, call.tokens()),
                view<const expert_t, 2, Space>(context.admitted.slice(0, call.tokens())), blame.weight);
    }

    void backward_router(const Call& call, const Context& context, const Workspace& workspace,
                         const RouterInputGrad<T, Space>& dinput,
                         const typename Types::template RouterParams<T>& grads) const {
        config_.router.template backward<T>(config_.device, call.router, call.input, routing(context, call.tokens()),
                                            grad(workspace, call.tokens()), dinput, grads, call.scratch);
    }

private:
    /// Most grouped rows.
    [[nodiscard]] index_t rows() const { return Traits::choice_rows(config_.router, config_.shape); }
    /// What the rows are combined with.
    [[nodiscard]] view<const Gate, 2, Space> weight(const Context& context, index_t tokens) const {
        if constexpr (rescales)
            return context.admitted_weight.slice(0, tokens);
        else
            return context.routing.weight.slice(0, tokens);
    }

    Config config_;
    index_t top_k_;
};

namespace detail {

template <class Types>
struct MixtureFor {
    using type = SparseMixture<Types>;
};
template <class Types>
    requires requires { typename Types::Router::template Mixture<Types>; }
struct MixtureFor<Types> {
    using type = typename Types::Router::template Mixture<Types>;
};

}  // namespace detail

/// The mixture that carries out a router's decisions.
template <class Types>
using MixtureOf = typename detail::MixtureFor<Types>::type;

/// No mixture at all: what stands beside the routed experts where there is no shared one.
struct NoMixture {
    static constexpr bool has_routing = false, takes_overflow = false;
    struct Context {
        template <class Field>
        void fields(Field&&, const NoMixture&) {}
    };
    using Workspace = Context;
    [[nodiscard]] Status check() const { return {}; }
    [[nodiscard]] index_t scratch_bytes() const { return 0; }
    [[nodiscard]] index_t outputs() const { return 1; }
    void routing(const Context&, index_t) const {}
    void grad(const Workspace&, index_t) const {}
};

static_assert(Mixture<NoMixture>);

}  // namespace steelyard
