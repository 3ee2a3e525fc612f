// What an NcclComm does with NCCL and CUDA: enqueuing, the verdict on each call, waiting with a time limit, refusals.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/nccl_parts.hpp"

namespace steelyard {

struct NcclCommOptions {
    /// Seconds that the host waits for a sum, or for the stream that it stands in.
    double timeout = 60.0;
    /// The most words (8 bytes each) that a sum may have; the same on every rank, else the constructor throws. Every
    /// sum moves this many, so that ranks cannot disagree on a size. Costs 24 * reserve bytes of the GPU.
    std::size_t reserve = 4096;
    /// For words that the host writes and reads, in any memory: `begin_sum` waits for what the stream holds already,
    /// and takes the words; `end_sum` waits until the sum stands in them. Costs 8 * reserve bytes of pinned memory.
    bool wait = false;
};

namespace detail::comm {

/// What the handles of one rank share: the staging memory, the order of calls and the refusal.
///
/// **How disagreement is found.** NCCL neither compares the sizes that ranks pass nor survives a difference, so every
/// sum is an all-reduce of the same `2 + reserve` words: [n, n^2, the n words, whatever was left there]. Summed over R
/// ranks, R * sum n^2 = (sum n)^2 only if all n are equal (Cauchy and Schwarz), and every rank comes to the same
/// verdict. A sum that should not wait is judged when the host next waits for the stream. The number of a call does
/// not travel: NCCL joins the k-th all-reduce of every rank, so that it could not differ.
///
/// **Why the head comes out of a table.** A sum can be captured into a graph, and what its copies read must then stay
/// as it is for as long as the graph lives. Rows [n, n^2] that never change need no bookkeeping of graphs.
class NcclState {
public:
    static constexpr const char* stage = "NcclComm";

    NcclState(ncclComm_t comm, cudaStream_t stream, NcclCommOptions options)
        : comm_(comm), stream_(stream), options_(options) {}
    NcclState(const NcclState&) = delete;
    NcclState& operator=(const NcclState&) = delete;
    ~NcclState() {
        const OnCudaDevice on(device_);
        table_.reset(), staging_.reset(), pinned_.reset(), verdicts_ = NcclVerdicts();
    }

    /// What the constructor of `NcclComm` does: checks, allocates, and sums twice over all ranks, so that `reserve` is
    /// known to agree and NCCL has made its connections, for which later calls would wait.
    Status open() {
        if (Status s = check_options(); !s) return s;
        if (Status s = settle(ncclSuccess, "ncclCommInitRank"); !s) return s;
        if (Status s = check(ncclCommUserRank(comm_, &rank_), "ncclCommUserRank"); !s) return s;
        if (Status s = check(ncclCommCount(comm_, &size_), "ncclCommCount"); !s) return s;
        if (Status s = check(ncclCommCuDevice(comm_, &device_), "ncclCommCuDevice"); !s) return s;
        const OnCudaDevice on(device_);
        if (Status s = check_stream(); !s) return s;
        // All of it before the first collective: an allocation can wait for kernels, and these wait for other ranks.
        if (Status s = allocate_all(); !s) return s;
        std::vector<std::int64_t> table(head * (options_.reserve + 1));
        for (std::size_t n = 0; n <= options_.reserve; ++n) {
            table[head * n] = static_cast<std::int64_t>(n);
            table[head * n + 1] = static_cast<std::int64_t>(n * n);
        }
        if (Status s = check(cudaMemcpyAsync(table_.get(), table.data(), table.size() * sizeof(std::int64_t),
                                             cudaMemcpyHostToDevice, stream_),
                             "cudaMemcpyAsync");
            !s)
            return s;
        if (Status s =
                check(cudaMemsetAsync(staging_.get(), 0, staged() * sizeof(std::int64_t), stream_), "cudaMemsetAsync");
            !s)
            return s;
        if (Status s = enqueue({}, options_.reserve, head, verdicts_.place({})); !s) return s;
        if (Status s = wait(stream_, options_.timeout); !s) return s;
        if (verdicts_.differs(0))
            return invalid("reserve", "the same on every rank",
                           std::to_string(options_.reserve) + " on rank " + std::to_string(rank_));
        if (Status s = enqueue({}, 0, staged(), verdicts_.place({})); !s) return s;
        return wait(stream_, options_.timeout);
    }

    [[nodiscard]] int rank() const { return rank_; }
    [[nodiscard]] int size() const { return size_; }
    [[nodiscard]] cudaStream_t stream() const { return stream_; }
    [[nodiscard]] double timeout() const { return options_.timeout; }
    [[nodiscard]] bool refused() const { return code_ != Code::ok; }

    Status begin(std::span<std::int64_t> words) {
        if (Status s = turn_.may_begin(stage, rank_); !s) return s;
        if (refused()) return refusal(number_);
        if (words.size() > options_.reserve)
            return invalid("the words of " + place_text(number_, rank_),
                           "at most NcclCommOptions::reserve, " + std::to_string(options_.reserve),
                           std::to_string(words.size()));
        const OnCudaDevice on(device_);
        if (Status s = check_capture(stream_, !options_.wait); !s) return s;
        if (Status s = check_words(words); !s) return s;
        if (Status s = healthy(); !s) return s;
        std::span<std::int64_t> moved = words;
        if (options_.wait) {
            if (Status s = wait(stream_, options_.timeout); !s) return s;
            if (!words.empty()) std::memcpy(pinned_.get(), words.data(), words.size_bytes());
            moved = {pinned_.get(), words.size()};
        }
        std::int64_t* const verdict = verdicts_.place({number_, words.size()});
        ++number_;
        if (Status s = enqueue(moved, words.size(), staged(), verdict); !s) return s;
        turn_ = {words.data(), sum_of(words), true};
        return {};
    }

    Status end(std::span<std::int64_t> words) {
        if (!turn_.under_way && refused()) return refusal(number_);
        if (Status s = turn_.may_end(stage, rank_, words.data(), sum_of(words)); !s) return s;
        turn_.under_way = false;
        if (refused()) return refusal(last());
        if (!options_.wait) return healthy();
        const OnCudaDevice on(device_);
        if (Status s = wait(stream_, options_.timeout); !s) return s;
        if (Status s = judge(); !s) return s;
        if (!words.empty()) std::memcpy(words.data(), pinned_.get(), words.size_bytes());
        return {};
    }

    /// Waits until `stream` has done what it holds, and judges the sums.
    Status synchronize(cudaStream_t stream, double timeout) {
        if (refused()) return refusal(last());
        if (!(timeout > 0.0)) return invalid("timeout", "more than 0 s", std::to_string(timeout) + " s");
        const OnCudaDevice on(device_);
        if (Status s = check_capture(stream, false); !s) return s;
        // Verdicts that the stream of the sums still writes are not to be read.
        if (stream != stream_)
            if (Status s = check_capture(stream_, false); !s) return s;
        if (Status s = wait(stream, timeout); !s) return s;
        if (stream != stream_)
            if (Status s = wait(stream_, timeout); !s) return s;
        if (Status s = healthy(); !s) return s;
        return judge();
    }

    void abort(const std::string& reason) {
        if (refused()) return;
        const OnCudaDevice on(device_);
        (void)give_up(Code::comm_failure, last(), "every rank to take part",
                      "an abort: rank " + std::to_string(rank_) + ": " + reason);
    }

    /// Whether the GPU may still read or write this object's memory.
    [[nodiscard]] bool is_in_use() const {
        if (refused()) return in_use_;
        if (number_ == 0) return false;
        const OnCudaDevice on(device_);
        return is_capturing(stream_) || query(stream_) == cudaErrorNotReady;
    }

private:
    static constexpr std::size_t head = NcclVerdicts::head;
    static constexpr std::size_t largest_reserve = std::size_t{1} << 20;  // so that sums of n^2 are exact
    static constexpr double ending_time = 1.0;                            // seconds for an abort to take effect

    [[nodiscard]] std::size_t staged() const { return head + options_.reserve; }
    /// The collective that this rank posted last, or will post first.
    [[nodiscard]] std::uint64_t last() const { return number_ == 0 ? 0 : number_ - 1; }

    // ---- Checks: the caller's slips, which leave the group as it is -----------------------------------

    static Status invalid(std::string_view what, std::string expected, std::string came) {
        return Status::refuse(Code::invalid_argument, stage, what, std::move(expected), std::move(came));
    }

    [[nodiscard]] Status check_options() const {
        if (!(options_.timeout > 0.0))
            return invalid("timeout", "more than 0 s", std::to_string(options_.timeout) + " s");
        if (options_.reserve < 1 || options_.reserve > largest_reserve)
            return invalid("reserve", "1 to " + std::to_string(largest_reserve) + " words",
                           std::to_string(options_.reserve));
        if (comm_ == nullptr) return invalid("communicator", "an ncclComm_t", "a null pointer");
        return {};
    }

    /// An event can be recorded in the streams of its own device alone.
    Status check_stream() {
        if (Status s = check_capture(stream_, false); !s) return s;
        cudaEvent_t event = nullptr;
        if (Status s = check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate"); !s) return s;
        const cudaError_t recorded = cudaEventRecord(event, stream_);
        (void)cudaEventDestroy(event);
        if (recorded == cudaErrorInvalidResourceHandle || recorded == cudaErrorInvalidValue) {
            (void)cudaGetLastError();
            return invalid("stream", "a stream of the communicator's device " + std::to_string(device_),
                           std::string("one that is not: ") + cudaGetErrorString(recorded));
        }
        return check(recorded, "cudaEventRecord");
    }

    Status check_capture(cudaStream_t stream, bool may_capture) {
        auto status = cudaStreamCaptureStatusNone;
        const cudaError_t asked = cudaStreamIsCapturing(stream, &status);
        if (asked == cudaErrorStreamCaptureImplicit) {
            (void)cudaGetLastError();
            return invalid("stream", "another than the default stream during a capture", "the default stream");
        }
        if (Status s = check(asked, "cudaStreamIsCapturing"); !s) return s;
        if (status == cudaStreamCaptureStatusNone || (status == cudaStreamCaptureStatusActive && may_capture))
            return {};
        return invalid("stream", may_capture ? "a capture that holds" : "a stream that is not being captured",
                       may_capture ? "an invalidated one" : "one that is: the host cannot wait for it");
    }

    /// A copy to or from pageable memory would make the host wait without a time limit.
    Status check_words(std::span<const std::int64_t> words) {
        if (options_.wait || words.empty()) return {};
        cudaPointerAttributes found{};
        const bool known = cudaPointerGetAttributes(&found, words.data()) == cudaSuccess;
        if (!known) (void)cudaGetLastError();
        if (known && found.type != cudaMemoryTypeUnregistered) return {};
        return invalid("the words of " + place_text(number_, rank_),
                       "pinned memory, or memory of the GPU, without NcclCommOptions::wait", "pageable memory");
    }

    // ---- Enqueuing ------------------------------------------------------------------------------------

    Status allocate_all() {
        if (Status s = check(allocate(table_, head * (options_.reserve + 1)), "cudaMalloc"); !s) return s;
        if (Status s = check(allocate(staging_, staged()), "cudaMalloc"); !s) return s;
        if (Status s = check(verdicts_.open(size_), "cudaMallocHost"); !s) return s;
        return options_.wait ? check(allocate(pinned_, options_.reserve), "cudaMallocHost") : Status();
    }

    /// words = the sum over ranks, where `reduced` words of the staging memory are summed under the head of `n`.
    Status enqueue(std::span<std::int64_t> words, std::size_t n, std::size_t reduced, std::int64_t* verdict) {
        const auto copy = [&](std::int64_t* to, const std::int64_t* from, std::size_t count) -> Status {
            if (count == 0) return {};
            return check(cudaMemcpyAsync(to, from, count * sizeof(std::int64_t), cudaMemcpyDefault, stream_),
                         "cudaMemcpyAsync");
        };
        std::int64_t* const staging = staging_.get();
        if (Status s = copy(staging, table_.get() + head * n, head); !s) return s;
        if (Status s = copy(staging + head, words.data(), words.size()); !s) return s;
        // Unsigned: sums are modulo 2^64, and in two's complement those of int64 are the same bits.
        const ncclResult_t posted = ncclAllReduce(staging, staging, reduced, ncclUint64, ncclSum, comm_, stream_);
        if (Status s = settle(posted, "ncclAllReduce"); !s) return s;
        if (Status s = copy(words.data(), staging + head, words.size()); !s) return s;
        return copy(verdict, staging, head);
    }

    /// Refuses the group when some sum among the last ones was a mismatch. Only after their stream was waited for.
    Status judge() {
        const std::size_t slot = verdicts_.mismatch();
        if (slot == NcclVerdicts::slots) return {};
        return give_up(Code::comm_mismatch, verdicts_.posted(slot).number, "the same call on every rank",
                       "a sum of " + std::to_string(verdicts_.posted(slot).words) +
                           " int64 here, and of other sizes elsewhere (" + std::to_string(verdicts_.total(slot)) +
                           " words on all " + std::to_string(size_) + " ranks)");
    }

    // ---- Waiting --------------------------------------------------------------------------------------

    /// Polls, because CUDA has no wait with a time limit.
    Status wait(cudaStream_t stream, double timeout) {
        for (Polling polling;; polling.pause()) {
            const cudaError_t state = query(stream);
            if (state != cudaErrorNotReady) return check(state, "cudaStreamQuery");
            if (Status s = healthy(); !s) return s;
            if (polling.is_over(timeout)) return late(timeout);
        }
    }

    /// The result of an NCCL call; with a communicator that does not block, what comes of it in time.
    Status settle(ncclResult_t result, const char* call) {
        if (result == ncclSuccess) result = asynchronous();
        for (Polling polling; result == ncclInProgress; polling.pause()) {
            if (polling.is_over(options_.timeout)) return late(options_.timeout);
            result = asynchronous();
        }
        return check(result, call);
    }

    [[nodiscard]] ncclResult_t asynchronous() const {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
        return asked == ncclSuccess ? state : asked;
    }

    /// What NCCL's own threads found wrong since the last call. Waits for nothing.
    Status healthy() {
        const ncclResult_t state = asynchronous();
        return check(state == ncclInProgress ? ncclSuccess : state, "ncclCommGetAsyncError");
    }

    // ---- Refusals -------------------------------------------------------------------------------------

    Status check(ncclResult_t result, const char* call) {
        if (result == ncclSuccess) return {};
        const char* detail = ncclGetLastError(comm_);
        std::string text = ncclGetErrorString(result);
        if (detail != nullptr && *detail != '\0') text += std::string(": ") + detail;
        return failure(call, text);
    }
    Status check(cudaError_t result, const char* call) {
        if (result == cudaSuccess) return {};
        (void)cudaGetLastError();  // told here, and not to be found again by whoever asks next
        return failure(call, std::string(cudaGetErrorName(result)) + ": " + cudaGetErrorString(result));
    }
    Status failure(const char* call, const std::string& text) {
        return give_up(Code::comm_failure, last(), "every rank to take part",
                       std::string(call) + " on rank " + std::to_string(rank_) + ": " + text);
    }

    /// A stream that stands still writes no verdicts: a mismatch among those before is the reason, if there is one.
    Status late(double timeout) {
        if (verdicts_.present())
            if (Status s = judge(); !s) return s;
        return give_up(Code::comm_timeout, last(),
                       "all " + std::to_string(size_) + " ranks within " + seconds_text(timeout),
                       "a stream still busy: a rank did not come, or work before the sum does not end");
    }

    /// Refuses this rank for ever. The communicator is aborted: nothing else ends a kernel that waits for a rank.
    Status give_up(Code code, std::uint64_t number, std::string expected, std::string came) {
        code_ = code;
        refused_number_ = number;
        expected_ = std::move(expected);
        came_ = std::move(came);
        in_use_ = !abort_communicator(std::exchange(comm_, nullptr), stream_, ending_time);
        return refusal(number);
    }

    [[nodiscard]] Status refusal(std::uint64_t number) const {
        std::string came = came_;
        if (number != refused_number_)
            came += " (in collective " + std::to_string(refused_number_) + "; the group stays refused)";
        return Status::refuse(code_, stage, place_text(number, rank_), expected_, came);
    }

    ncclComm_t comm_;
    cudaStream_t stream_;
    NcclCommOptions options_;
    int rank_ = 0;
    int size_ = 1;
    int device_ = -1;
    std::uint64_t number_ = 0;  // collectives that this rank has posted
    Turn turn_;
    DeviceWords table_;    // [reserve + 1, 2]
    DeviceWords staging_;  // [2 + reserve]
    PinnedWords pinned_;   // [reserve], with `wait`
    NcclVerdicts verdicts_;
    Code code_ = Code::ok;
    bool in_use_ = false;  // once refused
    std::uint64_t refused_number_ = 0;
    std::string expected_, came_;
};

/// Deletes a state, or keeps it until the process ends where the GPU may still use its memory.
struct ReleaseNcclState {
    void operator()(NcclState* state) const {
        if (!state->is_in_use()) {
            delete state;
            return;
        }
        static std::mutex mutex;
        static auto* kept = new std::vector<NcclState*>;
        const std::lock_guard lock(mutex);
        kept->push_back(state);
    }
};

}  // namespace detail::comm

}  // namespace steelyard
