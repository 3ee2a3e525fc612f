// One reduction for the statistics of all layers, instead of one for each.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "steelyard/comm/concept.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard {

/// The wires of all layers of a model, [layers, words], summed over the data group at once.
///
/// Forward of layer l with `ForwardArgs::stack` set posts its counts to row l instead of summing them. After the last
/// layer: `begin(comm)`, then whatever can be computed without the balance loss, `end(comm)`, and each layer's
/// `conclude` before its backward. The same object serves the reductions at the end of a step.
class Stack {
public:
    /// `memory` holds at least layers * words integers and outlives the stack; `words` is the largest of the layers'.
    /// Throws `Error` when the memory is too small.
    Stack(std::span<std::int64_t> memory, index_t layers, index_t words) : rows_(memory.data(), layers, words) {
        if (static_cast<index_t>(memory.size()) < layers * words)
            throw Error(Status::refuse(Code::invalid_argument, "stack", "memory",
                                       "at least " + std::to_string(layers * words) + " integers",
                                       std::to_string(memory.size())));
        memory_ = memory.first(static_cast<std::size_t>(layers * words));
        clear();
    }

    [[nodiscard]] index_t layers() const { return rows_.extents[0]; }
    [[nodiscard]] index_t words() const { return rows_.extents[1]; }
    [[nodiscard]] view<std::int64_t, 1> row(index_t layer) const { return rows_[layer]; }

    /// A layer has put counts into its row.
    void post() {
        ++posted_;
        summed_ = false;
    }

    /// Whether the rows hold the sums of what was posted: from `end` to the next `post` or `clear`.
    [[nodiscard]] bool summed() const { return summed_; }

    /// Starts the sum, if any layer posted: replays and rank-local policies have nothing to sum.
    template <CommBackend Comm>
    Status begin(const Comm& comm) {
        return posted_ == 0 ? Status{} : comm.begin_sum(memory_);
    }

    /// Waits for the sum. The rows then hold it until `clear`.
    template <CommBackend Comm>
    Status end(const Comm& comm) {
        if (posted_ == 0) return {};
        Status status = comm.end_sum(memory_);
        summed_ = status.ok();
        return status;
    }

    /// Zeroes all rows for the next round.
    void clear() {
        forget();
        zero();
    }

private:
    template <class>
    friend class QueuedStack;

    void forget() {
        posted_ = 0;
        summed_ = false;
    }
    void zero() const {
        for (auto& word : memory_) word = 0;
    }

    view<std::int64_t, 2> rows_;  // [layers, words]
    std::span<std::int64_t> memory_;
    int posted_ = 0;
    bool summed_ = false;
};

}  // namespace steelyard
