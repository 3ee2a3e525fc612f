// One sum for the layers of a model whose device works in its own time.
#pragma once

#include <cstdint>
#include <span>

#include "steelyard/comm/concept.hpp"
#include "steelyard/layer/block.hpp"
#include "steelyard/layer/stack.hpp"

namespace steelyard {

/// `Stack` (layer/stack.hpp) for layers on a QueuedDevice, with the same calls in the same order.
///
/// Rows are written, summed and read on the line beside the device's own, each when that has come so far. So nobody
/// waits for a comm backend that sums in the order of the device's work: `begin` and `end` enqueue, and a refusal is
/// told by the layers' `summed`. With any other, `begin` waits for what the layers have posted.
///
/// Lives, with its memory, until the device has come so far.
template <class DeviceT>
class QueuedStack {
    using Memory = memory_ops<DeviceT>;

public:
    /// `memory` is pinned, and holds at least layers * words integers; `words` is the largest of the layers'. Throws
    /// `Error` when the memory is too small. Nothing is at work on it.
    QueuedStack(std::span<std::int64_t> memory, index_t layers, index_t words, const DeviceT& device)
        : stack_(memory, layers, words), device_(device) {}
    QueuedStack(const QueuedStack&) = delete;
    QueuedStack& operator=(const QueuedStack&) = delete;

    [[nodiscard]] const Stack& rows() const { return stack_; }
    [[nodiscard]] index_t layers() const { return stack_.layers(); }
    [[nodiscard]] index_t words() const { return stack_.words(); }
    [[nodiscard]] view<std::int64_t, 1> row(index_t layer) const { return stack_.row(layer); }
    [[nodiscard]] bool summed() const { return stack_.summed(); }

    /// A layer will have put counts into its row.
    void post() { stack_.post(); }

    template <CommBackend Comm>
    Status begin(const Comm& comm) {
        if constexpr (!StreamOrderedComm<Comm>)
            if (stack_.posted_ > 0) Memory::wait(Memory::beside(device_));
        return stack_.begin(comm);
    }
    /// The rows then hold the sum until `clear`, once the device has come so far.
    template <CommBackend Comm>
    Status end(const Comm& comm) {
        return stack_.end(comm);
    }

    /// Zeroes all rows for the next round, when what was enqueued until now has read them.
    void clear() {
        stack_.forget();
        const auto zero = [](void* stack) { static_cast<const Stack*>(stack)->zero(); };
        Memory::run_on_host(Memory::beside(device_), static_cast<void (*)(void*)>(zero), &stack_);
    }

private:
    Stack stack_;
    DeviceT device_;
};

}  // namespace steelyard
