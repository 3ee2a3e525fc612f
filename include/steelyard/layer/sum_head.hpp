// The words in front of the counts of a sum: who sums what, so that ranks out of step are found out.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "steelyard/core/random.hpp"
#include "steelyard/core/status.hpp"
#include "steelyard/core/step.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard {

/// Four integers that travel with a layer's counts: [1, key, key^2, refused].
///
/// Summed over R ranks they are [R, sum k, sum k^2, how many refused], and R * sum k^2 = (sum k)^2 only if all keys are
/// equal (Cauchy and Schwarz). So ranks that are at another step, micro-step or layer get an error instead of each
/// other's counts. A rank that refuses its call still takes part and says so: all ranks then refuse at once, with
/// their state as it was, instead of waiting for it.
struct SumHead {
    static constexpr index_t words = 4;

    /// 24 bits of what is being summed. `at_step_end` tells the sums of a step's end from those of its forwards.
    static std::int64_t key(const StepInfo& at, std::uint32_t layer, bool at_step_end) {
        const Philox hash(0x5d1, Stream::user, static_cast<std::uint64_t>(at.step), layer);
        const auto index = 2 * static_cast<std::uint64_t>(at.micro_step) + (at_step_end ? 1 : 0);
        return static_cast<std::int64_t>(hash.words(index)[0] >> 8);
    }

    static void write(view<std::int64_t, 1> wire, std::int64_t key, bool refused) {
        wire[0] = 1, wire[1] = key, wire[2] = key * key, wire[3] = refused ? 1 : 0;
    }

    /// What the summed head says.
    static Status check(std::string_view stage, view<const std::int64_t, 1> wire) {
        if (wire[0] * wire[2] != wire[1] * wire[1])
            return Status::refuse(Code::comm_mismatch, stage, "comm",
                                  "all ranks at the same step, micro-step and layer", "ranks that are not");
        if (wire[3] > 0)
            return Status::refuse(Code::rank_refused, stage, "comm", "no rank that refuses its call",
                                  std::to_string(wire[3]) + " of " + std::to_string(wire[0]) + " that did");
        return {};
    }
};

}  // namespace steelyard
