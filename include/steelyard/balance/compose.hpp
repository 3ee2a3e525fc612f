// Balance policies made of balance policies: several at once, or one after the other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "steelyard/balance/balance.hpp"
#include "steelyard/balance/traits.hpp"

namespace steelyard {

namespace detail {

template <class... Parts>
constexpr bool bias_of() {
    static_assert(
        ((Parts::has_bias ? 1 : 0) + ... + 0) <= 1,
        "steelyard: AllOf takes at most one policy with a selection bias: two would fight over the selection");
    return (Parts::has_bias || ...);
}

}  // namespace detail

/// Several balance policies at once; their losses and gradients add up. At most one may steer a selection bias.
///
/// States, records and words on the wire follow each other in the order of the parts.
template <class... Parts>
struct AllOf {
    std::tuple<Parts...> parts;

    static constexpr bool has_loss = (Parts::has_loss || ...);
    static constexpr bool has_bias = detail::bias_of<Parts...>();
    static constexpr bool communicates = (Parts::communicates || ...);
    static constexpr bool communicates_at_step_end = (Parts::communicates_at_step_end || ...);
    static constexpr bool needs_rank_tokens = (Parts::needs_rank_tokens || ...);
    static constexpr bool remembers = (Parts::remembers || ...);
    static constexpr bool needs_smooth_load = (BalanceTraits<Parts>::needs_smooth_load || ...);
    static constexpr bool uses_ids = (BalanceTraits<Parts>::uses_ids || ...);

    constexpr AllOf() = default;
    constexpr explicit AllOf(Parts... policies) requires(sizeof...(Parts) > 0) : parts(std::move(policies)...) {}

    template <class Space = HostSpace>
    struct State {
        std::tuple<typename Parts::template State<Space>...> of;
        template <class Field>
        void fields(Field&& field, const AllOf& policy, const LayerShape& shape) {
            policy.each([&](const auto& part, auto& state) { field.group("", state, part, shape); }, of);
        }
    };

    template <class Space = HostSpace>
    struct Record {
        std::tuple<typename Parts::template Record<Space>...> of;
        template <class Field>
        void fields(Field&& field, const AllOf& policy, const LayerShape& shape) {
            policy.each([&](const auto& part, auto& record) { field.group("", record, part, shape); }, of);
        }
    };

    template <class Space>
    constexpr void init(const State<Space>& state) const {
        each([&](const auto& part, const auto& own) { part.init(own); }, state.of);
    }

    template <class Space>
    [[nodiscard]] view<const float, 1, Space> selection_bias(const State<Space>& state, const StepInfo& at) const {
        view<const float, 1, Space> bias;
        each(
            [&](const auto& part, const auto& own) {
                if (const auto found = part.selection_bias(own, at); found.present()) bias = found;
            },
            state.of);
        return bias;
    }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        Status status;
        each([&](const auto& part) {
            if (status) status = part.check(shape);
        });
        return status;
    }

    [[nodiscard]] constexpr index_t wire_words(const LayerShape& shape) const {
        return std::apply([&](const auto&... part) { return (part.wire_words(shape) + ... + index_t{0}); }, parts);
    }

    template <class Space>
    [[nodiscard]] constexpr bool exchanges(const State<Space>& state, const StepInfo& at) const {
        bool any = false;
        each([&](const auto& part, const auto& own) { any = part.exchanges(own, at) || any; }, state.of);
        return any;
    }

    template <class Device, class T, class Space>
    void observe(const Device& device, const Observation<T, Space>& seen, const State<>& state, const Record<>& record,
                 std::byte* scratch) const {
        each([&](const auto& part, const auto& own,
                 const auto& kept) { part.observe(device, seen, own, kept, scratch); },
             state.of, record.of);
    }

    template <class T, class Space>
    void post(const Observation<T, Space>& seen, const State<>& state, const Record<>& record, Wire<>& wire) const {
        each([&](const auto& part, const auto& own, const auto& kept) { part.post(seen, own, kept, wire); }, state.of,
             record.of);
    }

    template <class T, class Space>
    void conclude(const Observation<T, Space>& seen, const State<>& state, const Record<>& record, Wire<>& wire) const {
        each([&](const auto& part, const auto& own, const auto& kept) { part.conclude(seen, own, kept, wire); },
             state.of, record.of);
    }

    template <class Device, class T, class Space>
    void gradient(const Device& device, const Observation<T, Space>& seen, const Record<>& record,
                  const RoutingGrad<T, Space>& grad, std::byte* scratch) const {
        each([&](const auto& part, const auto& kept) { part.gradient(device, seen, kept, grad, scratch); }, record.of);
    }

    template <class Space>
    [[nodiscard]] double loss(const Record<Space>& record, const StepInfo& at) const {
        double sum = 0.0;
        each([&](const auto& part, const auto& kept) { sum += part.loss(kept, at); }, record.of);
        return sum;
    }

    [[nodiscard]] constexpr index_t step_words(const LayerShape& shape) const {
        return std::apply([&](const auto&... part) { return (part.step_words(shape) + ... + index_t{0}); }, parts);
    }

    template <class Space>
    constexpr void collect_step(const State<Space>& state, std::int64_t step, Wire<Space>& wire) const {
        each([&](const auto& part, const auto& own) { part.collect_step(own, step, wire); }, state.of);
    }

    template <class Space>
    constexpr void end_step(const State<Space>& state, std::int64_t step, Wire<Space>& wire) const {
        each([&](const auto& part, const auto& own) { part.end_step(own, step, wire); }, state.of);
    }

    friend bool operator==(const AllOf&, const AllOf&) = default;

private:
    /// body(part, its element of each tuple), part by part in order.
    template <class Body, class... Tuples>
    constexpr void each(Body&& body, Tuples&... tuples) const {
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            [[maybe_unused]] const auto at = [&]<std::size_t J>(std::integral_constant<std::size_t, J>) {
                body(std::get<J>(parts), std::get<J>(tuples)...);
            };
            (at(std::integral_constant<std::size_t, I>{}), ...);
        }
        (std::index_sequence_for<Parts...>{});
    }
};

/// No balance at all: no state, no statistics, no loss.
using NoBalance = AllOf<>;

/// One policy before optimizer step `at_step`, another from it on (2501.11873, table 3: "2 -> 512", "512 -> 2").
///
/// The second starts with an empty state; the inactive one is neither observed nor ended.
template <class First, class Then>
struct Scheduled {
    std::int64_t at_step = 0;
    First first = {};
    Then then = {};

    static constexpr bool has_bias = First::has_bias || Then::has_bias;
    static constexpr bool has_loss = First::has_loss || Then::has_loss;
    static constexpr bool communicates = First::communicates || Then::communicates;
    static constexpr bool communicates_at_step_end = First::communicates_at_step_end || Then::communicates_at_step_end;
    static constexpr bool needs_rank_tokens = First::needs_rank_tokens || Then::needs_rank_tokens;
    static constexpr bool remembers = First::remembers || Then::remembers;
    static constexpr bool needs_smooth_load =
        BalanceTraits<First>::needs_smooth_load || BalanceTraits<Then>::needs_smooth_load;
    static constexpr bool uses_ids = BalanceTraits<First>::uses_ids || BalanceTraits<Then>::uses_ids;

    template <class Space = HostSpace>
    struct State {
        typename First::template State<Space> first;
        typename Then::template State<Space> then;
        template <class Field>
        void fields(Field&& field, const Scheduled& policy, const LayerShape& shape) {
            field.group("", first, policy.first, shape);
            field.group("", then, policy.then, shape);
        }
    };

    template <class Space = HostSpace>
    struct Record {
        typename First::template Record<Space> first;
        typename Then::template Record<Space> then;
        template <class Field>
        void fields(Field&& field, const Scheduled& policy, const LayerShape& shape) {
            field.group("", first, policy.first, shape);
            field.group("", then, policy.then, shape);
        }
    };

    template <class Space>
    constexpr void init(const State<Space>& state) const {
        first.init(state.first);
        then.init(state.then);
    }

    template <class Space>
    [[nodiscard]] view<const float, 1, Space> selection_bias(const State<Space>& state, const StepInfo& at) const {
        return active(
            at.step, [&](const auto& part, const auto& own) { return part.selection_bias(own, at); }, state);
    }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        if (at_step < 0)
            return Status::refuse(Code::invalid_argument, "balance", "at_step", "at least 0", std::to_string(at_step));
        if (Status s = first.check(shape); !s) return s;
        return then.check(shape);
    }

    [[nodiscard]] constexpr index_t wire_words(const LayerShape& shape) const {
        return std::max(first.wire_words(shape), then.wire_words(shape));
    }

    template <class Space>
    [[nodiscard]] constexpr bool exchanges(const State<Space>& state, const StepInfo& at) const {
        return active(
            at.step, [&](const auto& part, const auto& own) { return part.exchanges(own, at); }, state);
    }

    template <class Device, class T, class Space>
    void observe(const Device& device, const Observation<T, Space>& seen, const State<>& state, const Record<>& record,
                 std::byte* scratch) const {
        active(
            seen.tokens.step.step,
            [&](const auto& part, const auto& own, const auto& kept) {
                part.observe(device, seen, own, kept, scratch);
            },
            state, record);
    }

    template <class T, class Space>
    void post(const Observation<T, Space>& seen, const State<>& state, const Record<>& record, Wire<>& wire) const {
        active(
            seen.tokens.step.step,
            [&](const auto& part, const auto& own, const auto& kept) { part.post(seen, own, kept, wire); }, state,
            record);
    }

    template <class T, class Space>
    void conclude(const Observation<T, Space>& seen, const State<>& state, const Record<>& record, Wire<>& wire) const {
        active(
            seen.tokens.step.step,
            [&](const auto& part, const auto& own, const auto& kept) { part.conclude(seen, own, kept, wire); }, state,
            record);
    }

    template <class Device, class T, class Space>
    void gradient(const Device& device, const Observation<T, Space>& seen, const Record<>& record,
                  const RoutingGrad<T, Space>& grad, std::byte* scratch) const {
        active(
            seen.tokens.step.step,
            [&](const auto& part, const auto& kept) { part.gradient(device, seen, kept, grad, scratch); }, record);
    }

    template <class Space>
    [[nodiscard]] double loss(const Record<Space>& record, const StepInfo& at) const {
        return active(
            at.step, [&](const auto& part, const auto& kept) { return part.loss(kept, at); }, record);
    }

    [[nodiscard]] constexpr index_t step_words(const LayerShape& shape) const {
        return std::max(first.step_words(shape), then.step_words(shape));
    }

    template <class Space>
    constexpr void collect_step(const State<Space>& state, std::int64_t step, Wire<Space>& wire) const {
        active(
            step, [&](const auto& part, const auto& own) { part.collect_step(own, step, wire); }, state);
    }

    template <class Space>
    constexpr void end_step(const State<Space>& state, std::int64_t step, Wire<Space>& wire) const {
        active(
            step, [&](const auto& part, const auto& own) { part.end_step(own, step, wire); }, state);
    }

    friend bool operator==(const Scheduled&, const Scheduled&) = default;

private:
    /// body(the policy of this step, its half of each argument).
    template <class Body, class... Halves>
    constexpr decltype(auto) active(std::int64_t step, Body&& body, const Halves&... halves) const {
        return step < at_step ? body(first, halves.first...) : body(then, halves.then...);
    }
};

}  // namespace steelyard
