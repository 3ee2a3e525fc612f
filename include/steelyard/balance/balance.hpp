// A balance policy from two halves: a scope (where the load comes from) and an objective (what acts on it).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "steelyard/balance/objective.hpp"
#include "steelyard/balance/scope.hpp"
#include "steelyard/balance/wire.hpp"
#include "steelyard/core/layout.hpp"

namespace steelyard {

namespace detail {

// Sentences about policies stand in functions: clang++ drops a class whose static_assert fails, and then complains at
// length of its absence.

/// Whether there is a load.
template <class ScopeT, class ObjectiveT>
constexpr bool load_of() {
    static_assert(ScopeT::counts || !(LoadObjective<ObjectiveT> || BiasObjective<ObjectiveT>),
                  "steelyard: this objective acts on a load: give it a scope that counts, such as MicroBatch");
    static_assert(ScopeT::remembers || !(ScopeT::communicates || ScopeT::sums_step || ScopeT::window > 0),
                  "steelyard: a scope that communicates, sums the step or keeps a window must have remembers = true");
    static_assert(!ScopeT::per_sequence || !(ScopeT::communicates || ScopeT::needs_rank_tokens || ScopeT::window > 0),
                  "steelyard: a scope with a load for each sequence is the rank's own: no communicates, needs_rank_tokens "
                  "or window");
    static_assert(ScopeT::counts || !ScopeT::remembers,
                  "steelyard: a scope that does not count has no load to remember");
    return ScopeT::counts;
}

}  // namespace detail

/// `Balance<Scope, Objective>`: one term of a layer's balance.
///
/// With w = objective.coefficient / total_tokens (see StepInfo), a load objective contributes
/// w * sum_s own_tokens_s * loss_s to the total loss and w * dloss_s/dP_i to the gradient by each probability of
/// segment s; a token objective contributes w * sum_t loss(z_t). Summed over ranks and micro-steps, both are the mean
/// over the global batch. The policy object is an immutable value; what it remembers is `State`, bytes of the caller's;
/// what one forward leaves for its backward is `Record`.
template <Scope ScopeT, Objective ObjectiveT>
struct Balance {
    ScopeT scope = {};
    ObjectiveT objective = {};

    static constexpr bool has_load = detail::load_of<ScopeT, ObjectiveT>();
    static constexpr bool has_bias = BiasObjective<ObjectiveT>;
    static constexpr bool has_loss = LoadObjective<ObjectiveT> || TokenObjective<ObjectiveT>;
    static constexpr bool communicates = ScopeT::communicates;
    static constexpr bool communicates_at_step_end = ScopeT::sums_step;
    static constexpr bool needs_rank_tokens = ScopeT::needs_rank_tokens;
    static constexpr bool remembers = ScopeT::remembers || has_bias;

    /// What lasts between steps. Part of a checkpoint.
    template <class Space = HostSpace>
    struct State {
        LoadLog<Space> log;
        view<std::int64_t, 1, Space> ended;      // [2]  last step that was ended (-1: none); how many were
        view<std::int64_t, 1, Space> step_load;  // [E + 1]  load of the step that is being ended
        view<std::int64_t, 2, Space> window;     // [W, E + 1]  loads of the last W steps, a ring
        view<std::int64_t, 1, Space> past;       // [E + 1]  their sum
        view<float, 1, Space> bias;              // [E]

        template <class Field>
        void fields(Field&& field, const Balance&, const LayerShape& shape) {
            if constexpr (remembers) {
                field.group("", log, shape);
                field("ended", ended, index_t{2});
                field("step_load", step_load, shape.experts + 1);
            }
            if constexpr (ScopeT::window > 0) {
                field("window", window, ScopeT::window, shape.experts + 1);
                field("past", past, shape.experts + 1);
            }
            if constexpr (has_bias) field("bias", bias, shape.experts);
        }
    };

    /// What forward leaves for backward and for reports. Part of the context.
    template <class Space = HostSpace>
    struct Record {
        view<std::int64_t, 2, Space> load;  // [S, E + 1]  the load that the objective saw
        view<double, 2, Space> slopes;      // [S, E]      dloss_s / dP_i
        view<double, 2, Space> prob_sums;   // [S, E]
        view<std::int64_t, 1, Space> own;   // [S]         valid tokens of each segment
        view<double, 1, Space> loss;        // [1]         this call's share of the total loss

        template <class Field>
        void fields(Field&& field, const Balance& policy, const LayerShape& shape) {
            const index_t segments = policy.segments(shape);
            if constexpr (has_load) field("load", load, segments, shape.experts + 1);
            if constexpr (LoadObjective<ObjectiveT>) {
                field("slopes", slopes, segments, shape.experts);
                field("prob_sums", prob_sums, segments, shape.experts);
                field("own_tokens", own, segments);
            }
            field("loss", loss, index_t{1});
        }
    };

    /// Whether the objective's numbers can be worked with: its own `check()`, where it has one, and its coefficient.
    [[nodiscard]] Status check(const LayerShape&) const {
        if constexpr (requires { objective.check(); })
            if (Status s = objective.check(); !s) return s;
        if constexpr (requires { objective.coefficient; })
            if (!std::isfinite(static_cast<double>(objective.coefficient)))
                return Status::refuse(Code::invalid_argument, "balance", "coefficient", "a finite number",
                                      std::to_string(static_cast<double>(objective.coefficient)));
        return {};
    }

    [[nodiscard]] constexpr index_t segments(const LayerShape& shape) const {
        return ScopeT::per_sequence ? shape.sequences : 1;
    }

    /// A state that has seen nothing.
    template <class Space>
    constexpr void init(const State<Space>& state) const {
        if constexpr (remembers) {
            state.log.clear();
            state.ended[0] = -1;
            state.ended[1] = 0;
        }
        if constexpr (ScopeT::window > 0) {
            for (index_t w = 0; w < state.window.size(); ++w) state.window.data[w] = 0;
            for (index_t w = 0; w < state.past.size(); ++w) state.past[w] = 0;
        }
        if constexpr (has_bias)
            for (index_t i = 0; i < state.bias.extents[0]; ++i) state.bias[i] = 0.0f;
    }

    /// The bias that selection adds to the scores, absent for objectives without one.
    template <class Space>
    [[nodiscard]] view<const float, 1, Space> selection_bias(const State<Space>& state, const StepInfo&) const {
        return state.bias;
    }

    /// Integers that are summed over the data group between `observe` and `conclude`.
    [[nodiscard]] constexpr index_t wire_words(const LayerShape& shape) const {
        return communicates ? shape.experts + 1 : 0;
    }

    /// Whether this forward has anything to sum: a replay of a micro-step that the state holds has not.
    template <class Space>
    [[nodiscard]] constexpr bool exchanges(const State<Space>& state, const StepInfo& at) const {
        if constexpr (communicates) return !state.log.holds(at);
        return false;
    }

    /// Counts this call's choices into the record and, where they travel, onto the wire.
    template <class Device, class T, class Space>
    void observe(const Device& device, const Observation<T, Space>& seen,
                 [[maybe_unused]] const State<Space>& state, const Record<Space>& record,
                 [[maybe_unused]] Wire<Space>& wire) const {
        if constexpr (communicates) {
            if (state.log.holds(seen.tokens.step)) {  // a replay: conclude takes the load from the log
                (void)wire.take(record.load.extents[1]);
                return;
            }
        }
        if constexpr (ScopeT::needs_rank_tokens)
            balance_ops<Device>::template count_drawn<T>(device, seen, scope.draw(seen), record.load);
        else if constexpr (has_load)
            balance_ops<Device>::template count<T>(device, seen, record.load);
        if constexpr (communicates) copy(record.load[0], wire.take(record.load.extents[1]));
    }

    /// Takes the summed words back, enters it in the state once, and computes loss and slopes.
    template <class Device, class T, class Space>
    void conclude(const Device& device, const Observation<T, Space>& seen, const State<Space>& state,
                  const Record<Space>& record, Wire<Space>& wire, std::byte* scratch) const {
        const StepInfo& at = seen.tokens.step;
        if constexpr (communicates) {
            const auto summed = wire.take(record.load.extents[1]);
            copy(state.log.holds(at) ? state.log.load[at.micro_step] : summed, record.load[0]);
        }
        if constexpr (remembers) {
            if (!state.log.holds(at)) enter(at, state, record);
            if constexpr (!ScopeT::per_sequence)
                scope.template resolve<Space>(at, state.log, state.past, record.load[0]);
        }
        record.loss[0] = 0.0;
        if constexpr (LoadObjective<ObjectiveT>) {
            balance_ops<Device>::template sum_probs<T>(device, seen, record.prob_sums, record.own, scratch);
            for (index_t s = 0; s < record.load.extents[0]; ++s)
                record.loss[0] += static_cast<double>(record.own[s]) *
                                  objective.loss(segment(seen, record, s), record.slopes[s]);
            record.loss[0] *= weight(seen);
        } else if constexpr (TokenObjective<ObjectiveT>) {
            record.loss[0] =
                weight(seen) * balance_ops<Device>::template sum_tokens<T>(device, seen, objective, scratch);
        }
    }

    /// Adds (+=) the gradient of this call's share of the total loss, times StepInfo::grad_scale.
    template <class Device, class T, class Space>
    void gradient([[maybe_unused]] const Device& device, [[maybe_unused]] const Observation<T, Space>& seen,
                  [[maybe_unused]] const Record<Space>& record,
                  [[maybe_unused]] const RoutingGrad<T, Space>& grad) const {
        [[maybe_unused]] const double scale = seen.tokens.step.grad_scale;
        if constexpr (LoadObjective<ObjectiveT>)
            balance_ops<Device>::template add_to_probs<T>(device, seen, record.slopes, scale * weight(seen),
                                                          grad.probs);
        else if constexpr (TokenObjective<ObjectiveT>)
            balance_ops<Device>::template add_token_gradient<T>(device, seen, objective, scale * weight(seen),
                                                                grad.logits);
    }

    /// This call's share of the total loss, before grad_scale. Summed over ranks and micro-steps: the total.
    template <class Space>
    [[nodiscard]] double loss(const Record<Space>& record, const StepInfo&) const {
        return record.loss[0];
    }

    /// Integers that are summed over the data group at the end of an optimizer step.
    [[nodiscard]] constexpr index_t step_words(const LayerShape& shape) const {
        return communicates_at_step_end ? shape.experts + 1 : 0;
    }

    /// Where the step's load travels, adds it up on the wire. Changes no state: the sum may yet be refused.
    template <class Space>
    constexpr void collect_step([[maybe_unused]] const State<Space>& state, [[maybe_unused]] std::int64_t step,
                                [[maybe_unused]] Wire<Space>& wire) const {
        if constexpr (communicates_at_step_end)
            state.log.sum(step, state.log.step.extents[0], wire.take(state.step_load.extents[0]));
    }

    /// Ends optimizer step `step`: moves the window and the bias, once however often it is called.
    template <class Space>
    constexpr void end_step(const State<Space>& state, std::int64_t step, [[maybe_unused]] Wire<Space>& wire) const {
        [[maybe_unused]] view<std::int64_t, 1, Space> summed;
        if constexpr (communicates_at_step_end) summed = wire.take(state.step_load.extents[0]);
        if constexpr (remembers) {
            if (state.ended[0] >= step) return;
            if constexpr (communicates_at_step_end) copy(summed, state.step_load);
            else state.log.sum(step, state.log.step.extents[0], state.step_load);
            if constexpr (ScopeT::window > 0) {
                const auto slot = state.window[state.ended[1] % ScopeT::window];
                for (index_t w = 0; w < slot.extents[0]; ++w) {
                    state.past[w] += state.step_load[w] - slot[w];
                    slot[w] = state.step_load[w];
                }
            }
            if constexpr (has_bias) objective.update(state.step_load.slice(0, state.bias.extents[0]), state.bias);
            state.ended[0] = step;
            ++state.ended[1];
        }
    }

    friend bool operator==(const Balance&, const Balance&) = default;

private:
    template <class Space>
    static constexpr void copy(view<std::int64_t, 1, Space> from, view<std::int64_t, 1, Space> to) {
        for (index_t w = 0; w < to.extents[0]; ++w) to[w] = from[w];
    }

    /// The log keeps one row for each micro-step, whatever the segments.
    template <class Space>
    static constexpr void enter(const StepInfo& at, const State<Space>& state, const Record<Space>& record) {
        copy(record.load[0], state.step_load);
        for (index_t s = 1; s < record.load.extents[0]; ++s)
            for (index_t w = 0; w < state.step_load.extents[0]; ++w) state.step_load[w] += record.load(s, w);
        state.log.enter(at, state.step_load);
    }

    template <class T, class Space>
    static SegmentLoad segment(const Observation<T, Space>& seen, const Record<Space>& record, index_t s) {
        const index_t experts = seen.experts();
        return {record.load[s].slice(0, experts), record.load(s, experts), record.prob_sums[s], record.own[s],
                seen.top_k()};
    }

    template <class T, class Space>
    [[nodiscard]] double weight(const Observation<T, Space>& seen) const {
        const std::int64_t given = seen.tokens.step.total_tokens;
        const std::int64_t total = given > 0 ? given : seen.valid_tokens;
        return total == 0 ? 0.0 : static_cast<double>(objective.coefficient) / static_cast<double>(total);
    }
};

}  // namespace steelyard
