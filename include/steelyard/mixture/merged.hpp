// The merged mixture: tokens visit one expert, blended from the weights of all (SMEAR, Lory).
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

#include "steelyard/mixture/types.hpp"
#include "steelyard/ops/merge_ops.hpp"
#include "steelyard/ops/plan_ops.hpp"
#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

template <class Types>
class MergedMixture;

/// What routes the first segment of a sequence, which no segment is before.
enum class FirstSegment {
    own_mean,  ///< its own mean, through which no gradient flows into x (Lory). Not causal inside that segment
    uniform,   ///< nothing: all experts alike. Causal
};

/// Expert merging: each segment of tokens is computed by one expert whose weights are a mean of all experts'.
///
///     h_g = layernorm(mean of the valid tokens of a segment)                    [d]
///     p_g = softmax(W h_g)                                                      [E]
///     W_g = sum_e p_ge W_e   for every tensor of the expert;   y_t = f(x_t; W_g), t in segment g
///
///  - `segment = 0` (SMEAR, 2306.03745): each packed sequence is one segment, routed by its own mean. Not causal.
///  - `segment = n` (Lory, 2405.03133): runs of n tokens, each routed by the mean of the run before it, and the first
///    as `first` says: with `uniform` a token sees no later one.
///
/// Fully differentiable; nothing is chosen, so nothing needs a balance loss. Memory: the workspace holds one set of
/// merged weights and one of their gradients for each segment. Options that leave tensors out, and tensors that all
/// experts share, are not merged: every tensor of the expert must begin with E.
struct MergeExperts {
    index_t segment = 0;
    FirstSegment first = FirstSegment::own_mean;

    static constexpr bool per_token = false;
    template <class Types>
    using Mixture = MergedMixture<Types>;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> weight;  // [E, d]

        template <class Field>
        void fields(Field&& field, const MergeExperts&, const LayerShape& shape) {
            field("weight", weight, shape.experts, shape.width);
        }
    };

    [[nodiscard]] Status check(const LayerShape& shape) const {
        if (Status s = detail::check_experts(shape); !s) return s;
        if (segment < 0)
            return detail::refuse_option("segment", "0 (a sequence is a segment) or a number of tokens",
                                         std::to_string(segment));
        return {};
    }

    /// Most segments of one call.
    [[nodiscard]] index_t segments(const LayerShape& shape) const {
        return segment == 0 ? shape.sequences : shape.tokens / segment + shape.sequences;
    }

    friend bool operator==(const MergeExperts&, const MergeExperts&) = default;
};

namespace detail {

/// The tensors of an expert's bundle as [E, rows, columns], collected without allocation.
template <class T>
struct ExpertTensors {
    view<T, 3> tensor[max_tensors];
    int count = 0;

    template <class U, int Rank, class Space, class... Extents>
    void operator()(std::string_view, view<U, Rank, Space>& from, Extents...) {
        static_assert(Rank == 2 || Rank == 3, "steelyard: tensors of a merged expert are [E, n] or [E, rows, n]");
        view<T, 3>& to = tensor[count++];
        to.data = from.data;
        to.extents[0] = from.extents[0], to.strides[0] = from.strides[0];
        to.extents[1] = Rank == 3 ? from.extents[1] : 1, to.strides[1] = Rank == 3 ? from.strides[1] : 0;
        to.extents[2] = from.extents[Rank - 1], to.strides[2] = 1;
    }
    template <class Bundle, class... Dims>
    void group(std::string_view, Bundle& bundle, const Dims&... dims) {
        bundle.fields(*this, dims...);
    }
};

}  // namespace detail

/// The mixture of `MergeExperts`.
template <class Types>
class MergedMixture {
    using T = typename Types::T;
    using Space = typename Types::Space;
    using Config = typename Types::Config;
    using Call = typename Types::Call;
    using Plans = plan_ops<typename Types::Device>;
    using Routers = router_ops<typename Types::Device>;
    using Merge = merge_ops<typename Types::Device>;
    using Weights = typename Types::template ExpertParams<T>;
    using ReadOnly = typename Types::template ExpertParams<const T>;

public:
    static constexpr bool has_routing = false, takes_overflow = false;
    /// Reads the experts' matrices: a packed copy does not stand in for them.
    static constexpr bool merges_experts = true;

    explicit MergedMixture(const Config& config) : config_(config), merged_(config.shape) {
        merged_.experts = std::max<index_t>(1, config.router.segments(config.shape));
    }

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] index_t outputs() const { return 1; }
    [[nodiscard]] Status check() const {
        if (Status s = config_.router.check(config_.shape); !s) return s;
        if (Status s = config_.expert.check(config_.shape); !s) return s;
        Weights weights;
        detail::Placement placement;
        weights.fields(placement, config_.expert, config_.shape);
        const auto tensors = tensors_of<T>(weights, config_.shape);
        for (int i = 0; i < tensors.count; ++i)
            if (tensors.tensor[i].extents[0] != config_.shape.experts)
                return Status::refuse(Code::invalid_argument, "layer.config", "expert",
                                      "tensors of " + std::to_string(config_.shape.experts) + " experts each, to merge",
                                      "one of " + std::to_string(tensors.tensor[i].extents[0]));
        return {};
    }
    [[nodiscard]] index_t scratch_bytes() const {
        const auto& [shape, router, overflow, expert, device] = config_;
        LayerShape segments = shape;
        segments.tokens = merged_.experts;
        return std::max({Routers::template scratch_bytes<T>(device, segments), Merge::template scratch_bytes<T>(device),
                         Plans::scratch_bytes(device, merged_, 1), expert.template scratch_bytes<T>(device, merged_)});
    }

    struct Context {
        view<index_t, 2, Space> ranges, learned;  // [G, 2]  the tokens that route a segment, and those that learn of it
        view<T, 2, Space> pooled;                 // [G, d]
        view<T, 1, Space> inverse;                // [G]
        Routing<T, Space> gate;                   // of G segments over all E experts
        view<expert_t, 2, Space> segment;         // [T, 1]  of each token, -1 where masked
        Plan<Space> plan;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const MergedMixture& of) {
            const auto& shape = of.config_.shape;
            const index_t segments = of.merged_.experts;
            field("ranges", ranges, segments, index_t{2});
            field("learned", learned, segments, index_t{2});
            field("pooled", pooled, segments, shape.width);
            field("inverse", inverse, segments);
            field.group("gate", gate, segments, shape.experts, shape.experts);
            field("segment", segment, shape.tokens, index_t{1});
            field.group("plan", plan, shape.tokens, segments, index_t{1});
            if constexpr (Types::keeps) field.group("kept", kept, of.config_.expert, of.merged_, shape.tokens);
        }
    };

    struct Workspace {
        Weights merged, dmerged;  // of G experts
        RoutingGrad<T, Space> grad;
        view<T, 2, Space> dpooled;  // [G, d]
        view<T, 2, Space> rows;     // [T, d]
        typename Types::Work work;
        typename Types::Kept kept;

        template <class Field>
        void fields(Field&& field, const MergedMixture& of) {
            const auto& shape = of.config_.shape;
            field.group("merged", merged, of.config_.expert, of.merged_);
            field.group("dmerged", dmerged, of.config_.expert, of.merged_);
            field.group("grad", grad, of.merged_.experts, shape.experts, index_t{0});
            field("dpooled", dpooled, of.merged_.experts, shape.width);
            field("rows", rows, shape.tokens, shape.width);
            field.group("work", work, of.config_.expert, of.merged_, shape.tokens);
            if constexpr (!Types::keeps) field.group("kept", kept, of.config_.expert, of.merged_, shape.tokens);
        }
    };

    [[nodiscard]] Routing<T, Space> routing(const Context&, index_t) const { return {}; }
    [[nodiscard]] RoutingGrad<T, Space> grad(const Workspace&, index_t) const { return {}; }
    [[nodiscard]] Plan<Space> plan(const Context& context, index_t tokens) const { return context.plan.first(tokens); }
    void clear(const Workspace&, index_t) const {}

    Status route(const Call& call, const Context& context) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const index_t segments = cut(call, context);
        const auto pooled = context.pooled.slice(0, segments);
        const auto gate = context.gate.first(segments);
        Merge::template pool<T>(device, call.input.tokens.mask, call.input.x, context.ranges.slice(0, segments), pooled,
                                context.inverse.slice(0, segments));
        Routers::template logits<T>(device, pooled, call.router.weight, RouterNoise{}, gate.logits, call.scratch);
        for (index_t g = 0; g < segments; ++g)
            for (index_t e = 0; e < shape.experts; ++e) gate.expert(g, e) = static_cast<expert_t>(e);
        const index_t bad = Routers::template weigh<T>(device, rule(), {}, gate, call.scratch);
        if (bad < 0) return {};
        return Status::refuse(Code::not_finite, "router", "logits of segment " + std::to_string(bad), "finite numbers",
                              "a value that is not");
    }

    void run(const Call& call, const Context& context, const Workspace& workspace) const {
        const auto plan = this->plan(context, call.tokens());
        Plans::make_plan(config_.device, view<const expert_t, 2, Space>(context.segment.slice(0, call.tokens())), plan,
                         call.scratch);
        merge(call, context, workspace);
        config_.expert.template forward<T>(
            config_.device, read_only<ReadOnly>(workspace.merged, config_.expert, merged_), call.input.x, plan,
            Types::keeps ? context.kept : workspace.kept, workspace.rows, call.scratch);
    }

    void combine(const Call& call, const Context& context, const Workspace& workspace, view<T, 2, Space> y,  // [T, d]
                 Write write) const {
        const view<const T, 2, Space> rows = workspace.rows;
        Plans::template combine<T>(config_.device, plan(context, call.tokens()), rows, view<const T, 2, Space>{}, y,
                                   write);
    }

    void backward(const Call& call, const Context& context, const Workspace& workspace,
                  view<const T, 2, Space> dy,         // [T, d]
                  view<T, 2, Space> dx, Write write,  // [T, d]
                  const Weights& grads) const {
        const auto& [shape, router, overflow, expert, device] = config_;
        const auto plan = this->plan(context, call.tokens());
        const auto& kept = Types::keeps ? context.kept : workspace.kept;
        const view<const T, 2, Space> none, rows = workspace.rows;
        merge(call, context, workspace);
        const auto merged = read_only<ReadOnly>(workspace.merged, expert, merged_);
        if constexpr (!Types::keeps)
            expert.template forward<T>(device, merged, call.input.x, plan, kept, view<T, 2, Space>{}, call.scratch);

        const index_t segments = segments_of(context);
        const auto dmerged = tensors_of<T>(workspace.dmerged, merged_);
        for (int i = 0; i < dmerged.count; ++i) std::fill_n(dmerged.tensor[i].data, dmerged.tensor[i].size(), T(0));
        expert.template backward<T>(device, merged, call.input.x, plan, kept, none, dy, workspace.work, workspace.rows,
                                    view<T, 2, Space>{}, workspace.dmerged, call.scratch);
        Plans::template combine<T>(device, plan, rows, none, dx, write);

        const view<const T, 2, Space> probs = context.gate.probs.slice(0, segments);
        const auto dprobs = workspace.grad.probs.slice(0, segments);
        std::fill_n(dprobs.data, dprobs.size(), T(0));
        const auto weights = tensors_of<const T>(call.experts, shape);
        const auto gradients = tensors_of<T>(grads, shape);
        for (int i = 0; i < weights.count; ++i)
            Merge::template merge_backward<T>(device, probs, weights.tensor[i], dmerged.tensor[i].slice(0, segments),
                                              dprobs, gradients.tensor[i], call.scratch);
    }

    void backward_router(const Call& call, const Context& context, const Workspace& workspace,
                         const RouterInputGrad<T, Space>& dinput,
                         const typename Types::template RouterParams<T>& grads) const {
        const index_t segments = segments_of(context);
        const view<const T, 2, Space> pooled = context.pooled.slice(0, segments);
        const auto dpooled = workspace.dpooled.slice(0, segments);
        RoutingGrad<T, Space> grad = workspace.grad.first(segments);
        grad.weight = {};
        std::fill_n(grad.logits.data, grad.logits.size(), T(0));
        std::fill_n(dpooled.data, dpooled.size(), T(0));
        Routers::template select_backward<T>(config_.device, rule(), {}, context.gate.first(segments), grad);
        Routers::template logits_backward<T>(config_.device, pooled, {}, call.router.weight, RouterNoise{}, grad.logits,
                                             dpooled, grads.weight, call.scratch);
        if (dinput.x.present())
            Merge::template pool_backward<T>(config_.device, call.input.tokens.mask, context.learned.slice(0, segments),
                                             pooled, context.inverse.slice(0, segments), dpooled, dinput.x);
    }

private:
    [[nodiscard]] SelectionRule rule() const {
        return {.top_k = static_cast<int>(config_.shape.experts), .score = Score::softmax, .weight = GateWeight::score};
    }

    template <class U, class Bundle>
    [[nodiscard]] detail::ExpertTensors<U> tensors_of(Bundle bundle, const LayerShape& shape) const {
        detail::ExpertTensors<U> tensors;
        bundle.fields(tensors, config_.expert, shape);
        return tensors;
    }

    /// Cuts the call into segments; returns how many. The rest of `ranges` is empty.
    index_t cut(const Call& call, const Context& context) const {
        const auto& offsets = call.input.tokens.sequences;
        const index_t sequences = offsets.present() ? offsets.extents[0] - 1 : 1, run = config_.router.segment;
        const bool own = config_.router.first == FirstSegment::own_mean;
        index_t g = 0;
        for (index_t s = 0; s < sequences; ++s) {
            const index_t begin = offsets.present() ? offsets[s] : 0;
            const index_t end = offsets.present() ? offsets[s + 1] : call.tokens();
            for (index_t from = begin; from < end; from += run == 0 ? end - begin : run, ++g) {
                const index_t to = run == 0 ? end : std::min(end, from + run);
                const bool first = run != 0 && from == begin;
                const index_t source = run == 0 || first ? from : from - run;
                const index_t until = run == 0 ? to : first ? (own ? to : from) : from;
                context.ranges(g, 0) = context.learned(g, 0) = source;
                context.ranges(g, 1) = until;
                context.learned(g, 1) = first ? source : until;
                for (index_t t = from; t < to; ++t) {
                    const auto& mask = call.input.tokens.mask;
                    context.segment(t, 0) = mask.present() && mask[t] == 0 ? -1 : static_cast<expert_t>(g);
                }
            }
        }
        for (index_t rest = g; rest < merged_.experts; ++rest)
            for (index_t side = 0; side < 2; ++side) context.ranges(rest, side) = context.learned(rest, side) = -1;
        return g;
    }
    /// How many segments the call was cut into.
    [[nodiscard]] index_t segments_of(const Context& context) const {
        index_t g = 0;
        while (g < merged_.experts && context.ranges(g, 0) >= 0) ++g;
        return g;
    }

    /// The merged weights (=) of the call's segments.
    void merge(const Call& call, const Context& context, const Workspace& workspace) const {
        const index_t segments = segments_of(context);
        const auto weights = tensors_of<const T>(call.experts, config_.shape);
        const auto merged = tensors_of<T>(workspace.merged, merged_);
        for (int i = 0; i < weights.count; ++i)
            Merge::template merge<T>(config_.device, context.gate.probs.slice(0, segments), weights.tensor[i],
                                     merged.tensor[i].slice(0, segments), call.scratch);
    }

    Config config_;
    LayerShape merged_;  // the segments as experts
};

}  // namespace steelyard
