// Ranks as GPUs that NCCL connects.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "steelyard/comm/concept.hpp"
#include "steelyard/comm/nccl_state.hpp"

namespace steelyard {

/// One rank of a group of GPUs, on the caller's communicator and stream: a handle; copies share the rank and its order
/// of calls. One for each group: a data group and an expert group are two communicators and two handles.
///
/// **Sums stand in the stream.** `begin_sum` enqueues a copy, an all-reduce and a copy back, `end_sum` looks for
/// errors, and neither waits: the sum stands in `words` once the stream has come so far, so point 2 of the contract in
/// comm/concept.hpp holds for what is ordered behind it. Words lie in pinned memory, or in the GPU's, and may be
/// written by earlier work of the stream. Both calls may be captured into a graph. A refusal therefore comes late: the
/// host asks for it with `synchronize`, which it should do at least every 256 sums, and before it trusts one. Meanwhile
/// a rank that lost step yields wrong words, or a stream that stands still, and never a host that does.
///
/// **With `NcclCommOptions::wait`** it is a backend for words that the host writes and reads, anywhere in memory, which
/// holds the contract to the letter, with any device; and no sum can be captured.
///
/// A sum costs one all-reduce of `reserve + 2` words, whatever its size, and three small copies. On the happy path no
/// call of this class allocates; what NCCL does inside is its own affair.
///
/// The communicator should do nothing else (ncclCommSplit makes another): collectives of one communicator must
/// come in the same order on every rank, also where they are enqueued on several streams. Gradients are summed
/// with the caller's own ncclAllReduce, beside this class: NCCL promises no order of summation, so that a sum of floats
/// here could not keep point 6, and `NcclComm` is no `CollectiveComm`.
///
/// Refusals: `comm_mismatch` (other numbers of words), `comm_timeout` and `comm_failure` (the text of NCCL or CUDA, or
/// the reason of an `abort`) name the collective, counted from 0, and the rank. They come within the time limit and a
/// second more. **They abort the communicator** (ncclCommAbort), since nothing else ends a kernel that waits for a
/// rank: it must not be used nor destroyed any more, see `aborted`; graphs that hold its sums should be destroyed soon.
/// The others learn of it by their own time limits. Calls out of turn, more words than `reserve`, pageable words and
/// the like are `invalid_argument`, and leave the group as it is.
///
/// The communicator, the stream, and graphs with sums in them, are the caller's: the first two outlive the last handle,
/// the graphs do not. Handles of one group belong to one thread at a time. Not between ncclGroupStart and ncclGroupEnd.
/// The destructor waits for no other rank: where a sum may still be under way, its memory stays.
class NcclComm {
public:
    /// Sums are there in the order of a stream, not when `end_sum` returns.
    static constexpr bool stream_ordered = true;

    /// A collective call: sums over all ranks, so that NCCL has made its connections before the first sum of a layer.
    /// With a communicator that blocks, NCCL may wait there without a time limit. The stream is of the communicator's
    /// device. Throws `Error`; unless its code is `invalid_argument`, the communicator is aborted.
    NcclComm(ncclComm_t comm, cudaStream_t stream, NcclCommOptions options = {})
        : state_(new State(comm, stream, options), detail::comm::ReleaseNcclState{}) {
        throw_if_refused(state_->open());
    }

    [[nodiscard]] int rank() const { return state_->rank(); }
    [[nodiscard]] int size() const { return state_->size(); }
    [[nodiscard]] cudaStream_t stream() const { return state_->stream(); }

    Status begin_sum(std::span<std::int64_t> words) const { return state_->begin(words); }
    Status end_sum(std::span<std::int64_t> words) const { return state_->end(words); }

    /// Waits until the stream has done what it holds, and tells what went wrong. Not while it is being captured.
    Status synchronize() const { return synchronize(state_->timeout()); }
    Status synchronize(double timeout) const { return synchronize(stream(), timeout); }

    /// The same after `also` too: a stream on which graphs that hold sums were launched.
    Status synchronize(cudaStream_t also, double timeout) const { return state_->synchronize(also, timeout); }

    /// Refuses this rank at once. The others find out by their own time limits.
    void abort(const std::string& reason) const { state_->abort(reason); }

    /// Whether the group is refused, and the communicator therefore gone: ncclCommDestroy only if not.
    [[nodiscard]] bool aborted() const { return state_->refused(); }

private:
    using State = detail::comm::NcclState;
    std::shared_ptr<State> state_;
};

static_assert(CommBackend<NcclComm>, "steelyard: NcclComm has left the contract of comm/concept.hpp");

}  // namespace steelyard
