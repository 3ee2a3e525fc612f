// The balance axis: what a layer asks of a balance policy, and the names people use for the common ones.
#pragma once

#include <concepts>

#include "steelyard/balance/balance.hpp"
#include "steelyard/balance/compose.hpp"
#include "steelyard/balance/entropy.hpp"
#include "steelyard/balance/load_balancing_loss.hpp"
#include "steelyard/balance/loss_free_bias.hpp"
#include "steelyard/balance/mutual_information.hpp"
#include "steelyard/balance/quantile_bias.hpp"
#include "steelyard/balance/scopes_over_time.hpp"
#include "steelyard/balance/traits.hpp"
#include "steelyard/balance/variation.hpp"
#include "steelyard/balance/z_loss.hpp"

namespace steelyard {

/// A balance policy. `Balance<Scope, Objective>`, `AllOf<...>` and `Scheduled<...>` are policies; most new ideas are a
/// new scope or objective rather than a new policy. Contract:
///
/// 1. A policy is an immutable value. `State` and `Record` are bundles described from (policy, shape).
/// 2. `observe` counts what this call routed; `post` puts that on the wire; `conclude` turns the summed counts into
///    loss and slopes; `gradient` adds to the routing gradient. Between `post` and `conclude` the layer sums the wire
///    over the data group if, and only if, `exchanges` says so. A policy never calls a comm backend. `observe` and
///    `gradient` do nothing but call operations of the device, `post` and `conclude` do arithmetic on the host's memory
///    alone: so that a device may work through them in its own time. `exchanges` and `observe` may then be asked while
///    a `conclude` of an earlier call, on the same state, is under way.
/// 3. `communicates == false` means that no word ever travels in a forward: the layer then contains no such call. A
///    policy that communicates remembers.
/// 4. Observing one (step, micro_step) again changes no state and leads to the same record.
/// 5. Every rank of a data group gives the same answer to `wire_words`, `step_words` and `exchanges`.
/// 6. `end_step` is called once for each optimizer step; calling it again for the same step changes nothing.
///
/// What it may say of itself beside that: `BalanceTraits`.
template <class B>
concept BalancePolicy = requires(const B& policy, const LayerShape& shape, const typename B::template State<>& state,
                                 const typename B::template Record<>& record, const StepInfo& at, Wire<>& wire) {
    { B::has_bias } -> std::convertible_to<bool>;
    { B::has_loss } -> std::convertible_to<bool>;
    { B::communicates } -> std::convertible_to<bool>;
    { B::communicates_at_step_end } -> std::convertible_to<bool>;
    { B::needs_rank_tokens } -> std::convertible_to<bool>;
    { B::remembers } -> std::convertible_to<bool>;
    { policy.check(shape) } -> std::same_as<Status>;
    { policy.wire_words(shape) } -> std::same_as<index_t>;
    { policy.step_words(shape) } -> std::same_as<index_t>;
    { policy.exchanges(state, at) } -> std::same_as<bool>;
    { policy.loss(record, at) } -> std::same_as<double>;
    requires bool(B::remembers) || !bool(B::communicates);
    policy.init(state);
    policy.selection_bias(state, at);
    policy.collect_step(state, at.step, wire);
    policy.end_step(state, at.step, wire);
};

/// The strategies of "Demons in the Detail" (2501.11873) and its neighbours, by the names that users compare.
using MicroBatchLoss = Balance<MicroBatch, LoadBalancingLoss>;
using SequenceLoss = Balance<Sequence, LoadBalancingLoss>;
using SynchronizedLoss = Balance<Synchronized, LoadBalancingLoss>;
using BufferedLoss = Balance<Buffered<Synchronized>, LoadBalancingLoss>;
using ShuffledLoss = Balance<Shuffled, LoadBalancingLoss>;
template <index_t Steps>
using WindowedLoss = Balance<Windowed<Steps>, LoadBalancingLoss>;
using LossFree = Balance<Synchronized, LossFreeBias>;
using QuantileBalance = Balance<Synchronized, QuantileBias>;
using RouterZLoss = Balance<PerToken, ZLoss>;
using ImportanceLoss = Balance<MicroBatch, Importance>;
using SmoothLoadLoss = Balance<MicroBatch, SmoothLoad>;

/// The paper's hybrid, "128+buffer & 8": the buffered, synchronised loss plus a micro-batch loss at 1 % of its weight.
using HybridLoss = AllOf<BufferedLoss, MicroBatchLoss>;

[[nodiscard]] constexpr HybridLoss hybrid_loss(double coefficient = 0.008, double micro_share = 0.01) {
    return HybridLoss(BufferedLoss{{}, {coefficient}}, MicroBatchLoss{{}, {coefficient * micro_share}});
}

static_assert(BalancePolicy<MicroBatchLoss> && BalancePolicy<SequenceLoss> && BalancePolicy<SynchronizedLoss>);
static_assert(BalancePolicy<BufferedLoss> && BalancePolicy<ShuffledLoss> && BalancePolicy<WindowedLoss<8>>);
static_assert(BalancePolicy<LossFree> && BalancePolicy<RouterZLoss> && BalancePolicy<HybridLoss>);
static_assert(BalancePolicy<QuantileBalance> && BalancePolicy<ImportanceLoss> && BalancePolicy<SmoothLoadLoss>);
static_assert(BalancePolicy<MutualInformationLoss<Synchronized>>);
static_assert(BalancePolicy<NoBalance> && BalancePolicy<Scheduled<MicroBatchLoss, SynchronizedLoss>>);

}  // namespace steelyard
