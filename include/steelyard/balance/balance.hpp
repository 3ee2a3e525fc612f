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
    static_assert(ScopeT::counts || TokenObjective<ObjectiveT>,
                  "steelyard: this objective acts on a load: give it a scope that counts, such as MicroBatch");
    static_assert(ScopeT::remembers || !(ScopeT::communicates || ScopeT::sums_step || ScopeT::window > 0),
                  "steelyard: a scope that communicates, sums the step or keeps a window must have remembers = true");
    static_assert(
        !ScopeT::per_sequence || !(ScopeT::communicates || ScopeT::needs_rank_tokens || ScopeT::window > 0),
        "steelyard: a scope with a load for each sequence is the rank's own: no communicates, needs_rank_tokens "
        "or window");
    static_assert(ScopeT::counts || !ScopeT::remembers,
                  "steelyard: a scope that does not count has no load to remember");
    static_assert(ScopeT::window == 0 || !ShortfallObjective<ObjectiveT>,
                  "steelyard: an objective on shortfalls takes no window: its bins move with the bias at each step");
    return ScopeT::counts;
}

}  // namespace detail

/// `Balance<Scope, Objective>`: one term of a layer's balance.
///
/// With w = objective.coefficient / total_tokens (see StepInfo), a load objective contributes
/// w * sum_s own_tokens_s * loss_s to the total loss and w * dloss_s/dP_i to the gradient by each probability of
/// segment s; a token objective contributes w * sum_t loss(z_t). Summed over ranks and micro-steps, both are the mean
/// over the global batch. A mean objective contributes, with m the mean over the scope and q that over the segment's
/// own tokens,
///
///     w * sum_s own_tokens_s * (loss(m_s) + sum_i dloss/dm_i (q_si - m_si))
///
/// and w * dloss/dm_i to the gradient by each token's quantity: with m held fixed, as a count is, that is the
/// derivative of this share; and where a whole batch has one m, the second part sums to 0, the shares to loss(m), and
/// the gradients to its derivative. The policy object is an immutable value; what it remembers is `State`, bytes of the
/// caller's; what one forward leaves for its backward is `Record`.
template <Scope ScopeT, Objective ObjectiveT>
struct Balance {
    ScopeT scope = {};
    ObjectiveT objective = {};

    static constexpr bool has_load = detail::load_of<ScopeT, ObjectiveT>();
    static constexpr bool has_bias = BiasObjective<ObjectiveT> || ShortfallObjective<ObjectiveT>;
    static constexpr bool has_slopes = LoadObjective<ObjectiveT> || MeanObjective<ObjectiveT>;
    static constexpr bool has_loss = has_slopes || TokenObjective<ObjectiveT>;
    static constexpr Quantity quantity = [] {
        if constexpr (MeanObjective<ObjectiveT>) return Quantity(ObjectiveT::quantity);
        return Quantity::probs;
    }();
    static constexpr bool needs_smooth_load = quantity == Quantity::smooth_load;
    static constexpr bool uses_ids = ScopeT::uses_ids;
    static constexpr bool communicates = ScopeT::communicates;
    static constexpr bool communicates_at_step_end = ScopeT::sums_step;
    static constexpr bool needs_rank_tokens = ScopeT::needs_rank_tokens;
    static constexpr bool remembers = ScopeT::remembers || has_bias;

    /// What lasts between steps. Part of a checkpoint.
    template <class Space = HostSpace>
    struct State {
        LoadLog<Space> log;
        view<std::int64_t, 1, Space> ended;      // [2]  last step that was ended (-1: none); how many were
        view<std::int64_t, 1, Space> step_load;  // [W]  load of the step that is being ended
        view<std::int64_t, 2, Space> window;     // [N, W]  loads of the last N steps, a ring
        view<std::int64_t, 1, Space> past;       // [W]  their sum
        view<float, 1, Space> bias;              // [E]

        template <class Field>
        void fields(Field&& field, const Balance& policy, const LayerShape& shape) {
            [[maybe_unused]] const index_t words = policy.load_words(shape);
            if constexpr (remembers) {
                field.group("", log, shape, words);
                field("ended", ended, index_t{2});
                field("step_load", step_load, words);
            }
            if constexpr (ScopeT::window > 0) {
                field("window", window, ScopeT::window, words);
                field("past", past, words);
            }
            if constexpr (has_bias) field("bias", bias, shape.experts);
        }
    };

    /// What forward leaves for backward and for reports. Part of the context.
    template <class Space = HostSpace>
    struct Record {
        view<std::int64_t, 2, Space> load;  // [S, W]  the load that the objective saw
        view<double, 2, Space> slopes;      // [S, E]  dloss_s / dP_i, or dloss_s / dm_i
        view<double, 2, Space> prob_sums;   // [S, E]  of this call's tokens; of the quantity, for a mean objective
        view<std::int64_t, 1, Space> own;   // [S]     tokens of each segment
        view<double, 1, Space> loss;        // [1]     this call's share of the total loss

        template <class Field>
        void fields(Field&& field, const Balance& policy, const LayerShape& shape) {
            const index_t segments = policy.segments(shape);
            if constexpr (has_load) field("load", load, segments, policy.load_words(shape));
            if constexpr (has_slopes) {
                field("slopes", slopes, segments, shape.experts);
                field("prob_sums", prob_sums, segments, shape.experts);
                field("own_tokens", own, segments);
            }
            field("loss", loss, index_t{1});
        }
    };

    /// Whether the objective's numbers can be worked with: its own `check()`, where it has one, and its coefficient.
    [[nodiscard]] Status check(const LayerShape&) const {
        if constexpr (uses_ids)
            if (scope.id < 0)
                return Status::refuse(Code::invalid_argument, "balance", "id", "at least 0", std::to_string(scope.id));
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

    /// W: integers of one load.
    [[nodiscard]] constexpr index_t load_words([[maybe_unused]] const LayerShape& shape) const {
        if constexpr (ShortfallObjective<ObjectiveT>)
            return shape.experts * static_cast<index_t>(objective.bins) + 1;
        else
            return shape.experts + 1;
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
        return communicates ? load_words(shape) : 0;
    }

    /// Whether this forward has anything to sum: a replay of a micro-step that the state holds has not.
    template <class Space>
    [[nodiscard]] constexpr bool exchanges(const State<Space>& state, const StepInfo& at) const {
        if constexpr (communicates) return !state.log.holds(at);
        return false;
    }

    /// Counts this call's choices, or what the objective acts on instead of them, and sums what its loss needs, into
    /// the record (=). On the device, whose order it keeps: the record may be read when that has come so far.
    template <class Device, class T, class Space>
    void observe([[maybe_unused]] const Device& device, const Observation<T, Space>& all,
                 [[maybe_unused]] const State<>& state, [[maybe_unused]] const Record<>& record,
                 [[maybe_unused]] std::byte* scratch) const {
        [[maybe_unused]] const auto seen = of_scope(all);
        using ops = balance_ops<Device>;
        if (!replays(state, seen.tokens.step)) {  // else conclude takes the load from the log
            if constexpr (ScopeT::needs_rank_tokens) {
                // Without the tokens of each rank this is a replay whose load is yet to come.
                if (seen.tokens_of_rank.present())
                    ops::template count_drawn<T>(device, seen, scope.draw(seen), record.load, tally(state), scratch);
            } else if constexpr (has_load)
                ops::template count<T>(device, seen, record.load, tally(state), scratch);
        }
        if constexpr (has_slopes)
            ops::template sum_quantity<T, quantity>(device, seen, record.prob_sums, record.own, scratch);
        else if constexpr (TokenObjective<ObjectiveT>)
            ops::template sum_tokens<T>(device, seen, objective, record.loss, scratch);
    }

    /// Puts what was counted on the wire, where it travels. Like `conclude`, arithmetic of the host's alone: nothing of
    /// a routing is read.
    template <class T, class Space>
    void post([[maybe_unused]] const Observation<T, Space>& seen, [[maybe_unused]] const State<>& state,
              [[maybe_unused]] const Record<>& record, [[maybe_unused]] Wire<>& wire) const {
        if constexpr (communicates) {
            const auto words = wire.take(record.load.extents[1]);
            if (!replays(state, seen.tokens.step)) copy(record.load[0], words);
        }
    }

    /// Takes the summed words back, enters them in the state once, and computes loss and slopes.
    template <class T, class Space>
    void conclude(const Observation<T, Space>& all, [[maybe_unused]] const State<>& state, const Record<>& record,
                  [[maybe_unused]] Wire<>& wire) const {
        const auto seen = of_scope(all);
        const StepInfo& at = seen.tokens.step;
        if constexpr (communicates) {
            const auto summed = wire.take(record.load.extents[1]);
            copy(state.log.holds(at) ? state.log.load[at.micro_step] : summed, record.load[0]);
        }
        if constexpr (remembers) {
            if (!state.log.holds(at)) enter(at, state, record);
            if constexpr (!ScopeT::per_sequence)
                scope.template resolve<HostSpace>(at, state.log, state.past, record.load[0]);
        }
        if constexpr (has_slopes) {
            record.loss[0] = 0.0;
            for (index_t s = 0; s < record.load.extents[0]; ++s)
                record.loss[0] += static_cast<double>(record.own[s]) * segment_loss(seen, record, s);
            record.loss[0] *= weight(seen);
        } else if constexpr (TokenObjective<ObjectiveT>) {
            record.loss[0] *= weight(seen);
        } else {
            record.loss[0] = 0.0;
        }
    }

    /// Adds (+=) the gradient of this call's share of the total loss, times StepInfo::grad_scale.
    template <class Device, class T, class Space>
    void gradient([[maybe_unused]] const Device& device, const Observation<T, Space>& all,
                  [[maybe_unused]] const Record<>& record, [[maybe_unused]] const RoutingGrad<T, Space>& grad,
                  [[maybe_unused]] std::byte* scratch) const {
        [[maybe_unused]] const auto seen = of_scope(all);
        [[maybe_unused]] const double scale = seen.tokens.step.grad_scale;
        if constexpr (has_slopes)
            balance_ops<Device>::template add_quantity_gradient<T, quantity>(device, seen, record.slopes,
                                                                             scale * weight(seen), grad, scratch);
        else if constexpr (TokenObjective<ObjectiveT>)
            balance_ops<Device>::template add_token_gradient<T>(device, seen, objective, scale * weight(seen),
                                                                grad.logits, scratch);
    }

    /// This call's share of the total loss, before grad_scale. Summed over ranks and micro-steps: the total.
    template <class Space>
    [[nodiscard]] double loss(const Record<Space>& record, const StepInfo&) const {
        return record.loss[0];
    }

    /// Integers that are summed over the data group at the end of an optimizer step.
    [[nodiscard]] constexpr index_t step_words(const LayerShape& shape) const {
        return communicates_at_step_end ? load_words(shape) : 0;
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
            if constexpr (communicates_at_step_end)
                copy(summed, state.step_load);
            else
                state.log.sum(step, state.log.step.extents[0], state.step_load);
            if constexpr (ScopeT::window > 0) {
                const auto slot = state.window[state.ended[1] % ScopeT::window];
                for (index_t w = 0; w < slot.extents[0]; ++w) {
                    state.past[w] += state.step_load[w] - slot[w];
                    slot[w] = state.step_load[w];
                }
            }
            if constexpr (ShortfallObjective<ObjectiveT>)
                move_by_shortfalls(state);
            else if constexpr (has_bias)
                objective.update(state.step_load.slice(0, state.bias.extents[0]), state.bias);
            state.ended[0] = step;
            ++state.ended[1];
        }
    }

    friend bool operator==(const Balance&, const Balance&) = default;

private:
    /// Whether the log holds this micro-step already, of a scope that communicates.
    [[nodiscard]] static bool replays([[maybe_unused]] const State<>& state, [[maybe_unused]] const StepInfo& at) {
        if constexpr (communicates) return state.log.holds(at);
        return false;
    }

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

    /// The tokens that the scope sees.
    template <class T, class Space>
    [[nodiscard]] Observation<T, Space> of_scope(const Observation<T, Space>& all) const {
        Observation<T, Space> seen = all;
        if constexpr (uses_ids) seen.only_id = scope.id;
        return seen;
    }

    /// What is tallied of each token.
    template <class Space>
    [[nodiscard]] auto tally([[maybe_unused]] const State<Space>& state) const {
        if constexpr (MeanObjective<ObjectiveT>)
            return FixedSums<quantity>{};
        else if constexpr (ShortfallObjective<ObjectiveT>)
            return Shortfalls<Space>{objective.score, state.bias, static_cast<index_t>(objective.bins)};
        else
            return Choices{};
    }

    template <class Space>
    void move_by_shortfalls(const State<Space>& state) const {
        const index_t experts = state.bias.extents[0], bins = static_cast<index_t>(objective.bins);
        objective.update(view<const std::int64_t, 2>(state.step_load.data, experts, bins),
                         state.step_load[experts * bins], state.bias);
    }

    /// The value of segment s; writes its slopes.
    template <class T, class Space>
    [[nodiscard]] double segment_loss(const Observation<T, Space>& seen, const Record<>& record, index_t s) const {
        const index_t experts = seen.experts();
        const auto words = record.load[s].slice(0, experts);
        const std::int64_t tokens = record.load(s, experts), own = record.own[s];
        const auto slopes = record.slopes[s], sums = record.prob_sums[s];
        if constexpr (MeanObjective<ObjectiveT>) {
            if (tokens == 0 || own == 0) {
                for (index_t i = 0; i < experts; ++i) slopes[i] = 0.0;
                return 0.0;
            }
            const SegmentMean of{words, tokens};
            double value = objective.loss(of, slopes);
            for (index_t i = 0; i < experts; ++i)
                value += slopes[i] * (sums[i] / static_cast<double>(own) - of.mean(i));
            return value;
        } else {
            return objective.loss(SegmentLoad{words, tokens, sums, own, seen.top_k()}, slopes);
        }
    }

    template <class T, class Space>
    [[nodiscard]] double weight(const Observation<T, Space>& seen) const {
        const std::int64_t given = seen.tokens.step.total_tokens;
        const std::int64_t total = given > 0 ? given : seen.valid_tokens;
        return total == 0 ? 0.0 : static_cast<double>(objective.coefficient) / static_cast<double>(total);
    }
};

}  // namespace steelyard
