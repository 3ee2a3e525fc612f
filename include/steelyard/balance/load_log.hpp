// What balance remembers of a step: the load of each micro-step, under its key.
#pragma once

#include <atomic>
#include <cstdint>

#include "steelyard/core/shape.hpp"
#include "steelyard/core/step.hpp"

namespace steelyard {

/// The loads of the micro-steps of one optimizer step, each kept under (step, micro_step).
///
/// Entering a micro-step twice changes nothing, so an activation recompute counts nothing twice and sees the
/// load that the first pass saw. A new step needs no reset: slots of other steps do not match the key.
template <class Space = HostSpace>
struct LoadLog {
    view<std::int64_t, 1, Space> step;  // [A]         the step that slot m belongs to, -1: none
    view<std::int64_t, 2, Space> load;  // [A, W]      W = E + 1: choices of each expert, then tokens

    template <class Field>
    void fields(Field&& field, const LayerShape& shape, index_t words) {
        field("log_step", step, shape.micro_steps);
        field("log_load", load, shape.micro_steps, words);
    }

    constexpr void clear() const {
        for (index_t m = 0; m < step.extents[0]; ++m) step[m] = -1;
        for (index_t w = 0; w < load.size(); ++w) load.data[w] = 0;
    }

    /// May be asked while another call's load is entered.
    [[nodiscard]] constexpr bool holds(const StepInfo& at) const {
        return key(at).load(std::memory_order_relaxed) == at.step;
    }

    /// Keeps `words` [W] as the load of this micro-step.
    constexpr void enter(const StepInfo& at, view<const std::int64_t, 1, Space> words) const {
        key(at).store(at.step, std::memory_order_relaxed);
        const auto slot = load[at.micro_step];
        for (index_t w = 0; w < slot.extents[0]; ++w) slot[w] = words[w];
    }

    /// words (=) sum of the loads of micro-steps [0, end) of this step.
    constexpr void sum(std::int64_t at_step, index_t end, view<std::int64_t, 1, Space> words) const {
        for (index_t w = 0; w < words.extents[0]; ++w) words[w] = 0;
        for (index_t m = 0; m < end; ++m) {
            if (step[m] != at_step) continue;
            for (index_t w = 0; w < words.extents[0]; ++w) words[w] += load(m, w);
        }
    }

private:
    [[nodiscard]] std::atomic_ref<std::int64_t> key(const StepInfo& at) const {
        return std::atomic_ref<std::int64_t>(step[at.micro_step]);
    }
};

}  // namespace steelyard
