// The Device axis: where memory lives, and whose kernels run.
#pragma once

#include <concepts>

#include "steelyard/core/status.hpp"
#include "steelyard/ops/balance_ops.hpp"
#include "steelyard/ops/expert_ops.hpp"
#include "steelyard/ops/plan_ops.hpp"
#include "steelyard/ops/router_ops.hpp"

namespace steelyard {

/// A device: an immutable value that names its memory and carries what its kernels need to start. Contract:
///
/// 1. `space` is the memory space of every view that its operations take.
/// 2. `check()` refuses a value that cannot work, in one sentence.
/// 3. `router_ops`, `plan_ops`, `expert_ops` and `balance_ops` are specialised for it (see ops/), in headers of its own
///    folder, which are included before a layer on it is used.
/// 4. Every operation gives the same bits from run to run, and agrees with plain double-precision arithmetic within the
///    rounding of its element type: no atomics on floating-point numbers, sums in a fixed order.
/// 5. Operations allocate nothing; what they need is `scratch`, sized by a pure function.
///
/// `check_device_laws` (ops/laws.hpp) tests a device whose memory the host can reach against 3 and 4.
template <class D>
concept Device = std::copyable<D> && requires(const D& device, const LayerShape& shape) {
    typename D::space;
    { device.check() } -> std::same_as<Status>;
    { router_ops<D>::template scratch_bytes<float>(device, shape) } -> std::same_as<index_t>;
    { plan_ops<D>::scratch_bytes(device, shape, int{}) } -> std::same_as<index_t>;
    { expert_ops<D>::template scratch_bytes<float>(device, index_t{}, index_t{}, index_t{}) } -> std::same_as<index_t>;
    { balance_ops<D>::scratch_bytes(device, shape) } -> std::same_as<index_t>;
};

}  // namespace steelyard
