// The multi-gate mixture: several tasks, each with a gate of its own, over one set of experts (MMoE, PLE).
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>

#include "steelyard/mixture/types.hpp"
#include "steelyard/ops/plan_ops.hpp"
#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

template <class Types>
class MultiGateMixture;

/// A dense softmax gate for each of n tasks, over experts that are computed once.
///
///     p_n = softmax(W_n x) over the experts that task n sees                    [E]
///     y_n = sum_e p_ne expert_e(x)           y = [y_0 | y_1 | ...]               [T, n d]
///
///  - `own = 0` (MMoE, KDD 2018): every task sees every expert.
///  - `own = m` (one layer of PLE, RecSys 2020): each task sees the shared experts, the first E - n m, and m experts of
///    its own; the loss of one task then gives no gradient to another's own experts. E >= n m.
///
/// Each token stands alone: causal. Backward runs the experts once for each task.
struct MultiGate {
    index_t tasks = 2;
    index_t own = 0;  ///< experts of each task alone

    template <class Types>
    using Mixture = MultiGateMixture<Types>;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 3, Space> weight;  // [n, E, d]

        template <class Field>
        void fields(Field&& field, const MultiGate& router, const LayerShape& shape) {
            field("weight", weight, router.tasks, shape.experts, shape.width);
        }
    };

    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (tasks < 1) return refuse_option("tasks", "at least 1", std::to_string(tasks));
        if (own < 0 || own * tasks > shape.experts)
            return refuse_option("own", "0 to " + std::to_string(shape.experts / tasks) + " (experts / tasks)",
                                 std::to_string(own));
        if (Status s = detail::check_experts(shape); !s) return s;
        if (shape.tokens > std::numeric_limits<std::int32_t>::max() / (tasks * shape.experts))
            return refuse_option("tokens", "tokens * tasks * experts below 2^31", std::to_string(shape.tokens));
        return {};
    }

    /// Whether a task's gate sees an expert.
    [[nodiscard]] bool sees(index_t task, index_t expert, index_t experts) const {
        const index_t first = experts - tasks * own;  // of the experts that are a task's own
        return expert < first || (expert - first) / own == task;
    }

    friend bool operator==(const MultiGate&, const MultiGate&) = default;
};

/// The mixture of `MultiGate`.
template <class Types>
class MultiGateMixture {
    using T = typename Types::T;
    using Space = typename Types::Space;
    using Config = typename Types::Config;
    using Call = typename Types::Call;
    using Plans = plan_ops<typename Types::Device>;
    using Routers = router_ops<typename Types::Device>;

public:
    static constexpr bool has_routing = false, takes_overflow = false;

    explicit MultiGateMixture(const Config& config) : config_(config) {}

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] index_t outputs() const { return config_.router.tasks; }
    [[nodiscard]] Status check() const {
        if (Status s = config_.router.check(config_.shape); !s) return s;
        return config_.expert.check(config_.shape);
    }
    [[nodiscard]] index_t scratch_bytes() const {
        const auto& [shape, router, overflow, expert, device] = config_;
        LayerShape gates = shape;
        gates.experts = router.tasks * shape.experts;
        return std::max({Routers::template scratch_bytes<T>(device, gates),
                         Plans::scratch_bytes(device, shape, static_cast<int>(shape.experts)),
                         expert.template scratch_bytes<T>(device, shape)});
    }

    struct Context {
        Routing<T, Space> gates;             // of T n "tokens": row t n + i is task i of token t
        view<std::uint8_t, 1, Space> valid;  // [T n]
        view<expert_t, 2, Space> all;        // [T, E]  every expert, -1 where masked
        Plan<Space> plan;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const MultiGateMixture& of) {
            const auto& shape = of.config_.shape;
            const index_t gated = shape.tokens * of.outputs();
            field.group("gates", gates, gated, shape.experts, shape.experts);
            field("valid", valid, gated);
            field("all", all, shape.tokens, shape.experts);
            field.group("plan", plan, shape.tokens, shape.experts, shape.experts);
            if constexpr (Types::keeps) field.group("kept", kept, of.config_.expert, shape, of.rows());
        }
    };

    struct Workspace {
        view<T, 2, Space> rows;  // [T E, d]
        RoutingGrad<T, Space> grad;
        typename Types::Work work;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const MultiGateMixture& of) {
            const auto& shape = of.config_.shape;
            field("rows", rows, of.rows(), shape.width);
            field.group("grad", grad, shape.tokens * of.outputs(), shape.experts, shape.experts);
            field.group("work", work, of.config_.expert, shape, of.rows());
            if constexpr (!Types::keeps) field.group("kept", kept, of.config_.expert, shape, of.rows());
        }
    };

    [[nodiscard]] Routing<T, Space> routing(const Context&, index_t) const { return {}; }
    [[nodiscard]] RoutingGrad<T, Space> grad(const Workspace&, index_t) const { return {}; }
    [[nodiscard]] Plan<Space> plan(const Context& context, index_t tokens) const { return context.plan.first(tokens); }
    void clear(const Workspace& workspace, index_t tokens) const {
        const auto of = workspace.grad.first(tokens * outputs());
        for (const auto* tensor : {&of.weight, &of.logits}) std::fill_n(tensor->data, tensor->size(), T(0));
    }

    Status route(const Call& call, const Context& context) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const index_t tokens = call.tokens(), tasks = outputs(), experts = shape.experts;
        const auto gates = context.gates.first(tokens * tasks);
        if (const auto& weight = call.router.weight; weight.strides[0] != experts * weight.strides[1])
            return detail::refuse_option("weight", "gates whose rows follow at one stride", "a gap between tasks");
        for (index_t t = 0; t < tokens; ++t) {
            const bool valid = !call.input.tokens.mask.present() || call.input.tokens.mask[t] != 0;
            for (index_t e = 0; e < experts; ++e) context.all(t, e) = valid ? static_cast<expert_t>(e) : -1;
            for (index_t n = 0; n < tasks; ++n) {
                context.valid[t * tasks + n] = valid;
                for (index_t e = 0; e < experts; ++e)
                    gates.expert(t * tasks + n, e) = router.sees(n, e, experts) ? static_cast<expert_t>(e) : -1;
            }
        }
        Routers::template logits<T>(device, call.input.x, flat(call.router.weight), RouterNoise{},
                                    view<T, 2, Space>(gates.logits.data, tokens, tasks * experts), call.scratch);
        const index_t bad =
            Routers::template weigh<T>(device, rule(), context.valid.slice(0, tokens * tasks), gates, call.scratch);
        return bad < 0 ? Status{} : refuse_logits(gates.logits, bad);
    }

    void run(const Call& call, const Context& context, const Workspace& workspace) const {
        const auto plan = this->plan(context, call.tokens());
        Plans::make_plan(config_.device, view<const expert_t, 2, Space>(context.all.slice(0, call.tokens())), plan,
                         call.scratch);
        config_.expert.template forward<T>(config_.device, call.experts, call.input.x, plan,
                                           Types::keeps ? context.kept : workspace.kept, workspace.rows, call.scratch);
    }

    void combine(const Call& call, const Context& context, const Workspace& workspace, view<T, 2, Space> y,  // [T, n d]
                 Write write) const {
        const view<const T, 2, Space> rows = workspace.rows;
        for (index_t n = 0; n < outputs(); ++n)
            Plans::template combine<T>(config_.device, plan(context, call.tokens()), rows,
                                       view<const T, 2, Space>(of_task(context.gates.weight, n, call.tokens())),
                                       columns(y, n), write);
    }

    void backward(const Call& call, const Context& context, const Workspace& workspace,
                  view<const T, 2, Space> dy,         // [T, n d]
                  view<T, 2, Space> dx, Write write,  // [T, d]
                  const typename Types::template ExpertParams<T>& grads) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const auto plan = this->plan(context, call.tokens());
        const auto& kept = Types::keeps ? context.kept : workspace.kept;
        const view<const T, 2, Space> none, rows = workspace.rows;
        if constexpr (!Types::keeps)
            expert.template forward<T>(device, call.experts, call.input.x, plan, kept, view<T, 2, Space>{},
                                       call.scratch);
        for (index_t n = 0; n < outputs(); ++n) {
            expert.template backward<T>(device, call.experts, call.input.x, plan, kept,
                                        of_task(context.gates.weight, n, call.tokens()), columns(dy, n), workspace.work,
                                        workspace.rows, of_task(workspace.grad.weight, n, call.tokens()), grads,
                                        call.scratch);
            Plans::template combine<T>(device, plan, rows, none, dx, n == 0 ? write : Write::add);
        }
    }

    void backward_router(const Call& call, const Context& context, const Workspace& workspace,
                         const RouterInputGrad<T, Space>& dinput,
                         const typename Types::template RouterParams<T>& grads) const {
        const index_t tokens = call.tokens(), tasks = outputs(), experts = config_.shape.experts;
        RoutingGrad<T, Space> grad = workspace.grad.first(tokens * tasks);
        grad.probs = {};
        Routers::template select_backward<T>(config_.device, rule(), context.valid.slice(0, tokens * tasks),
                                             context.gates.first(tokens * tasks), grad);
        Routers::template logits_backward<T>(config_.device, call.input.x, call.input.tokens.mask,
                                             flat(call.router.weight), RouterNoise{},
                                             view<const T, 2, Space>(grad.logits.data, tokens, tasks * experts),
                                             dinput.x, flat(grads.weight), call.scratch);
    }

private:
    [[nodiscard]] index_t rows() const { return config_.shape.tokens * config_.shape.experts; }
    /// A softmax over the experts that a gate sees.
    [[nodiscard]] SelectionRule rule() const {
        return {.top_k = static_cast<int>(config_.shape.experts), .weight = GateWeight::renormalized};
    }
    /// The gates' weights as one matrix [n E, d].
    template <class U>
    static view<U, 2, Space> flat(const view<U, 3, Space>& weight) {
        view<U, 2, Space> matrix(weight.data, weight.extents[0] * weight.extents[1], weight.extents[2]);
        matrix.strides[0] = weight.strides[1];
        return matrix;
    }
    /// Rows of one task out of [T n, E].
    [[nodiscard]] view<T, 2, Space> of_task(const view<T, 2, Space>& all, index_t task, index_t tokens) const {
        view<T, 2, Space> rows = all.slice(task, task + 1);
        rows.extents[0] = tokens;
        rows.strides[0] = all.strides[0] * outputs();
        return rows;
    }
    /// Columns of one task out of [T, n d].
    template <class U>
    [[nodiscard]] view<U, 2, Space> columns(view<U, 2, Space> all, index_t task) const {
        all.data += task * config_.shape.width;
        all.extents[1] = config_.shape.width;
        return all;
    }

    Config config_;
};

}  // namespace steelyard
