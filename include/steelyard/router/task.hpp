// TaskRouter: the task decides, not the token.
#pragma once

#include <string>
#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/ops/gating_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// Task-level gating: a row of learned logits for each task, by which all of its tokens choose.
///
///     z_t = logits[ids_t]                                            [T, E]
///     p, K best, w: as TopK makes them of z
///
/// `TokenInfo::ids` holds the task of each token, 0 to `tasks` - 1; other ids of valid tokens are refused. Since a
/// task's tokens all go to the same K experts, these are a network of their own that can be served without the others:
/// `experts_of` lists them. With renormalised weights it needs nothing more of the layer than those K experts; with
/// scores as they are, their weights too.
///
/// Source: Kudugunta et al. 2021 (2110.03742).
struct TaskRouter {
    /// K: experts of a task, 1 to E.
    int k = 1;
    /// Tasks that there are. At least 1.
    int tasks = 1;
    Score score = Score::softmax;
    GateWeight weight = GateWeight::renormalized;
    /// Multiplies every weight. Above 0.
    double scale = 1.0;

    static constexpr bool uses_ids = true;

    friend bool operator==(const TaskRouter&, const TaskRouter&) = default;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> logits;  // [tasks, E]

        template <class Field>
        void fields(Field&& field, const TaskRouter& router, const LayerShape& shape) {
            field("logits", logits, index_t{router.tasks}, shape.experts);
        }
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return k; }

    [[nodiscard]] SelectionRule rule() const { return {.top_k = k, .score = score, .weight = weight, .scale = scale}; }

    /// Refuses options that do not fit the shape.
    [[nodiscard]] Status check(const LayerShape& shape) const {
        using detail::refuse_option;
        if (Status s = detail::check_experts(shape); !s) return s;
        if (Status s = detail::check_choices("top_k", k, shape); !s) return s;
        if (tasks < 1) return refuse_option("tasks", "at least 1", std::to_string(tasks));
        return detail::check_positive("scale", scale);
    }

    /// Bytes of scratch for `route` and `backward`. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return router_ops<Device>::template scratch_bytes<T>(device, shape);
    }

    /// Writes the routing (=) of the tokens. See contract 5 to 8 of Router. Refuses ids that name no task.
    template <class T, class Device>
    Status route(const Device& device, const Params<const T, typename Device::space>& params,
                 const RouterInput<T, typename Device::space>& input, const Routing<T, typename Device::space>& routing,
                 std::byte* scratch) const {
        const auto& tokens = input.tokens;
        if (!tokens.ids.present() && routing.logits.extents[0] > 0)
            return detail::refuse_option("ids", "the task of each token", "nothing");
        const index_t unknown =
            table_ops<Device>::template lookup<T>(device, tokens.ids, tokens.mask, params.logits, routing.logits);
        if (unknown >= 0)
            return detail::refuse_option("id of token " + std::to_string(unknown),
                                         "a task, 0 to " + std::to_string(tasks - 1), "another number");
        const index_t bad =
            router_ops<Device>::template select<T>(device, rule(), input.selection_bias, tokens.mask, routing, scratch);
        return bad < 0 ? Status{} : refuse_logits(routing.logits, bad);
    }

    /// Accumulates into grad.logits and grads; x has no part in it. See contract 9 of Router.
    template <class T, class Device>
    void backward(const Device& device, const Params<const T, typename Device::space>&,
                  const RouterInput<T, typename Device::space>& input,
                  const Routing<T, typename Device::space>& routing, const RoutingGrad<T, typename Device::space>& grad,
                  const RouterInputGrad<T, typename Device::space>&, const Params<T, typename Device::space>& grads,
                  std::byte*) const {
        router_ops<Device>::template select_backward<T>(device, rule(), input.tokens.mask, routing, grad);
        if (grads.logits.present())
            table_ops<Device>::template lookup_backward<T>(device, input.tokens.ids, input.tokens.mask, grad.logits,
                                                           grads.logits);
    }

    /// The experts of a task, best first: the sub-network to extract. On a device with host memory; allocates.
    /// `selection_bias` is that of the balance policy, if one was in force. Empty if the task's logits are refused.
    template <class T, class Device>
    [[nodiscard]] std::vector<expert_t> experts_of(const Device& device, const Params<const T>& params, int task,
                                                   view<const float, 1> selection_bias = {}) const {
        const index_t experts = params.logits.extents[1];
        const std::int32_t id = task;
        const Bytes block(bytes_of<Routing<T>>(index_t{1}, experts, index_t{k}));
        const auto routing = place<Routing<T>>(block.data(), index_t{1}, experts, index_t{k});
        const Bytes scratch(scratch_bytes<T>(device, {.tokens = 1, .width = 1, .experts = experts}));
        RouterInput<T> input;
        input.selection_bias = selection_bias;
        input.tokens.ids = {&id, 1};
        if (!route<T>(device, params, input, routing, scratch.data()).ok()) return {};
        return {routing.expert.data, routing.expert.data + k};
    }
};

static_assert(Router<TaskRouter>, "steelyard: TaskRouter is a Router");

}  // namespace steelyard
