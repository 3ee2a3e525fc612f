// The communication axis: what a layer asks of the ranks it shares a batch with.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include "steelyard/core/status.hpp"

namespace steelyard {

/// A communication backend: a cheap handle on a group of ranks. Contract:
///
/// 1. `rank()` is in `[0, size())`, `size() >= 1`; both never change.
/// 2. `begin_sum(words)` posts a sum over all ranks and returns without waiting for them; `words` must
///    stay untouched until `end_sum(words)`, which waits and leaves the sum in `words` on every rank.
///    Between the two the caller computes. At most one sum is under way on a handle.
/// 3. The result is bit-identical on every rank and from run to run. Integers are summed exactly.
/// 4. Ranks that disagree (another number of words, another order of calls) or that do not come within
///    the backend's set time end in a refused status on every rank that came, never in a hang. After a
///    refusal the group stays refused.
/// 5. Different handles of one group may be used from different threads at the same time.
template <class C>
concept CommBackend = requires(const C& comm, std::span<std::int64_t> words) {
    { comm.rank() } -> std::same_as<int>;
    { comm.size() } -> std::same_as<int>;
    { comm.begin_sum(words) } -> std::same_as<Status>;
    { comm.end_sum(words) } -> std::same_as<Status>;
};

}  // namespace steelyard
