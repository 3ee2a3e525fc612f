// The communication axis: what a layer asks of the ranks it shares a batch with.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include "steelyard/core/status.hpp"

namespace steelyard {

/// A communication backend: a cheap handle on a group of ranks. Contract:
///
/// 1. `rank()` is in `[0, size())`, `size() >= 1`; both never change, and no two ranks share a number.
/// 2. `begin_sum(words)` posts a sum over all ranks and returns without waiting for them; `words` must
///    stay untouched until `end_sum(words)`, which waits and leaves the sum in `words` on every rank.
///    Between the two the caller computes. At most one sum is under way on a handle.
/// 3. The result is bit-identical on every rank and from run to run. Integers are summed exactly, modulo 2^64.
/// 4. Ranks that disagree (another number of words, another order of calls) or that do not come within
///    the backend's set time end in a refused status on every rank that came, never in a hang. After a
///    refusal the group stays refused.
/// 5. Different handles of one group may be used from different threads at the same time.
///
/// `check_comm_laws` (comm/laws.hpp) checks all five on a backend of your own.
template <class C>
concept CommBackend = requires(const C& comm, std::span<std::int64_t> words) {
    { comm.rank() } -> std::same_as<int>;
    { comm.size() } -> std::same_as<int>;
    { comm.begin_sum(words) } -> std::same_as<Status>;
    { comm.end_sum(words) } -> std::same_as<Status>;
};

/// What a training loop asks beyond that. `SelfComm`, `ThreadComm` and `MpiComm` have it; no layer needs it.
///
/// 6. `begin_sum` and `end_sum` also take float and double, summed in rank order.
/// 7. `broadcast(words, root)` leaves root's words on every rank; `all_gather(mine, all)` leaves the words of
///    rank r in `all[r * mine.size() ...]`; `barrier()` returns once every rank has come. Each waits, and each
///    is checked and timed as in point 4.
template <class C>
concept CollectiveComm =
    CommBackend<C> && requires(const C& comm, std::span<std::int64_t> words, std::span<const std::int64_t> mine,
                               std::span<float> floats, std::span<double> doubles) {
        { comm.begin_sum(floats) } -> std::same_as<Status>;
        { comm.end_sum(floats) } -> std::same_as<Status>;
        { comm.begin_sum(doubles) } -> std::same_as<Status>;
        { comm.end_sum(doubles) } -> std::same_as<Status>;
        { comm.broadcast(words, 0) } -> std::same_as<Status>;
        { comm.broadcast(floats, 0) } -> std::same_as<Status>;
        { comm.broadcast(doubles, 0) } -> std::same_as<Status>;
        { comm.all_gather(mine, words) } -> std::same_as<Status>;
        { comm.barrier() } -> std::same_as<Status>;
    };

}  // namespace steelyard
