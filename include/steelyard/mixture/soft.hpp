// The soft mixture: experts see blends of tokens instead of tokens (Soft MoE).
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "steelyard/mixture/types.hpp"
#include "steelyard/ops/plan_ops.hpp"
#include "steelyard/ops/soft_ops.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

template <class Types>
class SoftMixture;

/// Soft MoE's router: every expert has `slots` slots, each a blend of all tokens of a sequence.
///
///     L = scale * l2(x) l2(phi)^T          (normalize; otherwise x phi^T)          [T, P], P = E * slots
///     D = softmax over tokens, S = softmax over slots;   slot_p = sum_t D_tp x_t
///     y_t = sum_p S_tp expert_{p / slots}(slot_p)
///
/// Nothing is chosen and nothing dropped, so nothing needs a balance loss. Each packed sequence (an image, say) is
/// blended alone. A token sees the whole sequence: not causal. Masked tokens take no part; their y is 0.
/// Start the scale at 1.
///
/// Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts" (2308.00951).
struct SoftSlots {
    /// Slots of each expert, at least 1.
    index_t slots = 1;
    /// Whether tokens and slot vectors are normalised, with a learned scale.
    bool normalize = true;

    static constexpr bool per_token = false;
    template <class Types>
    using Mixture = SoftMixture<Types>;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> phi;    // [P, d]
        view<T, 1, Space> scale;  // [1], or [0] where nothing is normalised

        template <class Field>
        void fields(Field&& field, const SoftSlots& router, const LayerShape& shape) {
            field("phi", phi, shape.experts * router.slots, shape.width);
            field("scale", scale, index_t{router.normalize});
        }
    };

    [[nodiscard]] Status check(const LayerShape& shape) const {
        if (Status s = detail::check_experts(shape); !s) return s;
        if (slots < 1) return detail::refuse_option("slots", "at least 1", std::to_string(slots));
        return {};
    }

    friend bool operator==(const SoftSlots&, const SoftSlots&) = default;
};

/// The mixture of `SoftSlots`. The experts' rows are the slots: S P of them for S sequences, whatever T.
template <class Types>
class SoftMixture {
    using T = typename Types::T;
    using Space = typename Types::Space;
    using Config = typename Types::Config;
    using Call = typename Types::Call;
    using Plans = plan_ops<typename Types::Device>;
    using Soft = soft_ops<typename Types::Device>;

public:
    static constexpr bool has_routing = false, takes_overflow = false;

    explicit SoftMixture(const Config& config) : config_(config) {
        config_.shape.tokens = config.shape.sequences * slots();  // as the experts see it
        tokens_ = config.shape.tokens;
    }

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] index_t outputs() const { return 1; }
    [[nodiscard]] Status check() const {
        if (Status s = config_.router.check(config_.shape); !s) return s;
        return config_.expert.check(config_.shape);
    }
    [[nodiscard]] index_t scratch_bytes() const {
        const auto& [shape, router, overflow, expert, device] = config_;
        return std::max({Soft::template scratch_bytes<T>(device, slots()), Plans::scratch_bytes(device, shape, 1),
                         expert.template scratch_bytes<T>(device, shape)});
    }

    struct Context {
        view<T, 2, Space> similarity, dispatch, combine;  // [T, P]
        view<T, 2, Space> slots;                          // [S P, d]  what the experts see
        view<T, 2, Space> rows;                           // [S P, d]  what they answer
        view<expert_t, 2, Space> expert;                  // [S P, 1]  of each slot
        Plan<Space> plan;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const SoftMixture& of) {
            const auto& shape = of.config_.shape;
            field("similarity", similarity, of.tokens_, of.slots());
            field("dispatch", dispatch, of.tokens_, of.slots());
            field("combine", combine, of.tokens_, of.slots());
            field("slots", slots, shape.tokens, shape.width);
            field("rows", rows, shape.tokens, shape.width);
            field("expert", expert, shape.tokens, index_t{1});
            field.group("plan", plan, shape.tokens, shape.experts, index_t{1});
            if constexpr (Types::keeps) field.group("kept", kept, of.config_.expert, shape, shape.tokens);
        }
    };

    struct Workspace {
        view<T, 2, Space> ddispatch, dcombine;  // [T, P]
        view<T, 2, Space> grouped;              // [S P, d]  the experts' rows in the plan's order
        view<T, 2, Space> dslots;               // [S P, d]
        typename Types::Work work;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const SoftMixture& of) {
            const auto& shape = of.config_.shape;
            field("ddispatch", ddispatch, of.tokens_, of.slots());
            field("dcombine", dcombine, of.tokens_, of.slots());
            field("grouped", grouped, shape.tokens, shape.width);
            field("dslots", dslots, shape.tokens, shape.width);
            field.group("work", work, of.config_.expert, shape, shape.tokens);
            if constexpr (!Types::keeps) field.group("kept", kept, of.config_.expert, shape, shape.tokens);
        }
    };

    [[nodiscard]] Routing<T, Space> routing(const Context&, index_t) const { return {}; }
    [[nodiscard]] RoutingGrad<T, Space> grad(const Workspace&, index_t) const { return {}; }
    [[nodiscard]] Plan<Space> plan(const Context& context, index_t) const { return context.plan; }
    void clear(const Workspace&, index_t) const {}

    Status route(const Call& call, const Context& context) const {
        const index_t count = call.tokens();
        const index_t bad =
            Soft::template route<T>(config_.device, call.input.tokens, call.input.x, call.router.phi, scale(call),
                                    context.similarity.slice(0, count), context.dispatch.slice(0, count),
                                    context.combine.slice(0, count), call.scratch);
        if (bad < 0) return {};
        return Status::refuse(Code::not_finite, "router", "logits of token " + std::to_string(bad), "finite numbers",
                              "a value that is not");
    }

    void run(const Call& call, const Context& context, const Workspace& workspace) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const index_t count = call.tokens(), filled = slots_of(call);
        const auto slots = context.slots.slice(0, filled);
        Soft::template mix<T>(device, call.input.tokens, context.dispatch.slice(0, count), call.input.x, slots,
                              call.scratch);
        for (index_t p = 0; p < filled; ++p)
            context.expert(p, 0) = static_cast<expert_t>(p % this->slots() / router.slots);
        const auto plan = context.plan.first(filled);
        Plans::make_plan(device, view<const expert_t, 2, Space>(context.expert.slice(0, filled)), plan, call.scratch);
        expert.template forward<T>(device, call.experts, slots, plan, Types::keeps ? context.kept : workspace.kept,
                                   workspace.grouped, call.scratch);
        const view<const T, 2, Space> grouped = workspace.grouped;
        Plans::template combine<T>(device, plan, grouped, view<const T, 2, Space>{}, context.rows.slice(0, filled),
                                   Write::assign);
    }

    void combine(const Call& call, const Context& context, const Workspace&, view<T, 2, Space> y,  // [T, d]
                 Write write) const {
        Soft::template spread<T>(config_.device, call.input.tokens, context.combine.slice(0, call.tokens()),
                                 context.rows.slice(0, slots_of(call)), y, write, call.scratch);
    }

    void backward(const Call& call, const Context& context, const Workspace& workspace,
                  view<const T, 2, Space> dy,         // [T, d]
                  view<T, 2, Space> dx, Write write,  // [T, d]
                  const typename Types::template ExpertParams<T>& grads) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const index_t count = call.tokens(), filled = slots_of(call);
        const TokenInfo<Space>& tokens = call.input.tokens;
        const view<const T, 2, Space> none, slots = context.slots.slice(0, filled);
        const auto dispatch = context.dispatch.slice(0, count), combine = context.combine.slice(0, count);
        const auto dslots = workspace.dslots.slice(0, filled);
        const auto& kept = Types::keeps ? context.kept : workspace.kept;
        const auto plan = context.plan.first(filled);

        Soft::template products<T>(device, tokens, dy, context.rows.slice(0, filled),
                                   workspace.dcombine.slice(0, count), call.scratch);
        Soft::template mix<T>(device, tokens, combine, dy, dslots, call.scratch);
        if constexpr (!Types::keeps)
            expert.template forward<T>(device, call.experts, slots, plan, kept, view<T, 2, Space>{}, call.scratch);
        expert.template backward<T>(device, call.experts, slots, plan, kept, none, dslots, workspace.work,
                                    workspace.grouped, view<T, 2, Space>{}, grads, call.scratch);
        const view<const T, 2, Space> grouped = workspace.grouped;
        Plans::template combine<T>(device, plan, grouped, none, dslots, Write::assign);
        Soft::template products<T>(device, tokens, call.input.x, dslots, workspace.ddispatch.slice(0, count),
                                   call.scratch);
        Soft::template spread<T>(device, tokens, dispatch, dslots, dx, write, call.scratch);
    }

    void backward_router(const Call& call, const Context& context, const Workspace& workspace,
                         const RouterInputGrad<T, Space>& dinput,
                         const typename Types::template RouterParams<T>& grads) const {
        const index_t count = call.tokens();
        const auto dlogits = workspace.dcombine.slice(0, count);
        Soft::template softmax_backward<T>(config_.device, call.input.tokens, context.dispatch.slice(0, count),
                                           context.combine.slice(0, count), workspace.ddispatch.slice(0, count),
                                           dlogits);
        Soft::template logits_backward<T>(config_.device, call.input.tokens, call.input.x, call.router.phi, scale(call),
                                          context.similarity.slice(0, count), dlogits, dinput.x, grads.phi, grads.scale,
                                          call.scratch);
    }

private:
    /// Absent where nothing is normalised, also if the caller's tensor of no elements has an address.
    [[nodiscard]] view<const T, 1, Space> scale(const Call& call) const {
        return config_.router.normalize ? call.router.scale : view<const T, 1, Space>{};
    }
    [[nodiscard]] index_t slots() const { return config_.shape.experts * config_.router.slots; }
    [[nodiscard]] index_t slots_of(const Call& call) const {
        const auto& offsets = call.input.tokens.sequences;
        return slots() * (offsets.present() ? offsets.extents[0] - 1 : 1);
    }

    Config config_;  // with the slots as tokens
    index_t tokens_ = 0;
};

}  // namespace steelyard
