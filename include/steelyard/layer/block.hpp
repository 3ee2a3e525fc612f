// The blocks of memory that a layer is given: one, or the host's and the device's.
#pragma once

#include <cstddef>
#include <span>

#include "steelyard/layer/stack.hpp"
#include "steelyard/ops/memory_ops.hpp"

namespace steelyard {

/// A device whose calls are worked through in order, in its own time.
template <class D>
concept QueuedDevice = requires {
    requires bool(memory_ops<D>::asynchronous);
};

/// A comm backend that sums in the order of the device's work: `stream_ordered = true`. It returns at once, and its
/// words are pinned memory. The host waits for the device before it calls any other.
template <class C>
concept StreamOrderedComm = requires {
    requires bool(C::stream_ordered);
};

/// A block of memory in two parts: the host's, pinned so that the device reaches it too, and the device's.
struct QueuedBlock {
    std::span<std::byte> host, device;
};
struct QueuedBytes {
    index_t host = 0, device = 0;
};

template <class DeviceT>
class QueuedStack;

/// What contexts, workspaces and stacks are on a device.
template <class DeviceT>
struct LayerMemory {
    using Block = std::span<std::byte>;
    using Stack = steelyard::Stack;
};
template <QueuedDevice DeviceT>
struct LayerMemory<DeviceT> {
    using Block = QueuedBlock;
    using Stack = QueuedStack<DeviceT>;
};

}  // namespace steelyard
