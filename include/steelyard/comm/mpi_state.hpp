// What an MpiComm does with MPI: posting, the verdict on each call, waiting with a time limit, refusals.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/mpi_notices.hpp"

namespace steelyard {

struct MpiCommOptions {
    /// Seconds that a rank waits in one collective for the others.
    double timeout = 60.0;
    /// Words (8 bytes each) of staging memory, allocated once. An int64 sum of up to this many words runs wholly
    /// between `begin_sum` and `end_sum`; longer payloads, and float ones, move through it block by block.
    /// Costs 8 * reserve * (R + 1) bytes. The same on every rank, else the constructor throws.
    std::size_t reserve = std::size_t{1} << 14;
};

namespace detail::comm {

/// What the handles of one rank share: two communicators, staging memory and the refusal.
///
/// **How disagreement is found without undefined behaviour.** MPI forbids ranks to call a collective with
/// different sizes, so the first thing that a collective sends is always the same: an all-reduce of `chunk` words,
/// which begin with a header. For each field h of the header (collective's number, kind, words, ...) it sums h and
/// h*h. By Cauchy and Schwarz R * sum(h*h) >= sum(h)^2, with equality only if all ranks sent the same h, and every
/// rank sees the same sums and so comes to the same verdict. What an int64 sum posts in `begin_sum` beyond the
/// first chunk is more of the same chunks; all else is posted after the verdict, when the sizes are known to agree.
class MpiState {
public:
    static constexpr const char* stage = "MpiComm";

    MpiState(MPI_Comm parent, MpiCommOptions options) : timeout_(options.timeout) {
        int ready = 0, over = 0;
        MPI_Initialized(&ready);
        MPI_Finalized(&over);
        if (!ready || over) throw_invalid("MPI", "MPI_Init before the first MpiComm", over ? "finalised MPI" : "none");
        if (!(options.timeout > 0.0))
            throw_invalid("timeout", "more than 0 s", std::to_string(options.timeout) + " s");
        if (options.reserve > largest_reserve)
            throw_invalid("reserve", "at most " + std::to_string(largest_reserve) + " words",
                          std::to_string(options.reserve));
        for (MPI_Comm* copy : {&work_, &notes_}) {
            if (MPI_Comm_dup(parent, copy) != MPI_SUCCESS)
                throw Error(Status::refuse(Code::comm_failure, stage, "communicator", "a duplicate", "none"));
            MPI_Comm_set_errhandler(*copy, MPI_ERRORS_RETURN);
        }
        MPI_Comm_rank(work_, &rank_);
        MPI_Comm_size(work_, &size_);
        const std::uint64_t reserve = options.reserve;
        std::uint64_t bounds[2] = {reserve, ~reserve};
        MPI_Allreduce(MPI_IN_PLACE, bounds, 2, MPI_UINT64_T, MPI_MAX, work_);
        if (bounds[0] != ~bounds[1]) {
            release();
            throw_invalid("reserve", "the same on every rank",
                          std::to_string(reserve) + " on rank " + std::to_string(rank_));
        }
        const std::size_t chunks = (header + std::max<std::size_t>(options.reserve, 1) + chunk - 1) / chunk;
        staging_.resize(chunks * chunk);
        requests_.assign(chunks, MPI_REQUEST_NULL);
        gathered_.resize(block_bytes() * static_cast<std::size_t>(size_));
        notices_.open(notes_, rank_, size_);
    }
    MpiState(const MpiState&) = delete;
    MpiState& operator=(const MpiState&) = delete;
    ~MpiState() { release(); }

    [[nodiscard]] int rank() const { return rank_; }
    [[nodiscard]] int size() const { return size_; }
    [[nodiscard]] double timeout() const { return timeout_; }

    /// Posts the header of a call and, with it, as much of `payload` as fits. Does not wait.
    Status post(const Call& call, const std::int64_t* payload, std::size_t words) {
        if (Status s = turn_.may_begin(stage, rank_); !s) return s;
        call_ = call;
        if (refused()) return refusal(number_);
        if (has_heard(number_)) return give_up_as_heard(number_, false);
        const std::uint64_t fields[header / 2] = {
            number_ & low, (static_cast<std::uint64_t>(call.kind) << 8) | static_cast<std::uint64_t>(call.element),
            static_cast<std::uint64_t>(call.root), call.words & low, (call.words >> 24) & low};
        for (std::size_t f = 0; f < header / 2; ++f) {
            staging_[2 * f] = fields[f];
            staging_[2 * f + 1] = fields[f] * fields[f];
        }
        ++number_;
        const std::size_t first = std::min(words, first_words());
        if (first != 0) std::memcpy(staging_.data() + header, payload, first * sizeof(std::int64_t));
        posted_ = (header + first + chunk - 1) / chunk;
        std::fill(staging_.begin() + static_cast<std::ptrdiff_t>(header + first),
                  staging_.begin() + static_cast<std::ptrdiff_t>(posted_ * chunk), 0);
        for (std::size_t c = 0; c < posted_; ++c) {
            const int code = MPI_Iallreduce(MPI_IN_PLACE, staging_.data() + c * chunk, static_cast<int>(chunk),
                                            MPI_UINT64_T, MPI_SUM, work_, &requests_[c]);
            if (Status s = check(code, "MPI_Iallreduce"); !s) return s;
        }
        return {};
    }

    /// Waits for the header and reads the verdict, then waits for the rest of what was posted.
    Status wait_posted() {
        if (Status s = wait(requests_[0]); !s) return s;
        const auto ranks = static_cast<std::uint64_t>(size_);
        for (std::size_t f = 0; f < header / 2; ++f) {
            const std::uint64_t sum = staging_[2 * f], squares = staging_[2 * f + 1], mean = sum / ranks;
            if (sum % ranks != 0 || squares != ranks * mean * mean)
                return give_up(Code::comm_mismatch, number_ - 1, true, "");
        }
        for (std::size_t c = 1; c < posted_; ++c)
            if (Status s = wait(requests_[c]); !s) return s;
        return {};
    }

    Status begin(const Call& call, const void* words, const std::int64_t* payload, std::size_t count) {
        if (Status s = post(call, payload, count); !s) return s;
        turn_ = {words, call, true};
        return {};
    }

    Status end(const Call& call, const void* words) {
        if (!turn_.under_way && refused()) return refusal(number_);
        if (Status s = turn_.may_end(stage, rank_, words, call); !s) return s;
        turn_.under_way = false;
        return refused() ? refusal(number_ - 1) : wait_posted();
    }

    Status together(const Call& call) {
        if (Status s = post(call, nullptr, 0); !s) return s;
        return wait_posted();
    }

    /// Words of an int64 sum that travel with the header.
    [[nodiscard]] std::size_t first_words() const { return staging_.size() - header; }
    [[nodiscard]] std::size_t block_bytes() const { return staging_.size() * sizeof(std::uint64_t); }
    [[nodiscard]] void* staging() { return staging_.data(); }
    [[nodiscard]] const void* first_payload() const { return staging_.data() + header; }
    [[nodiscard]] const void* gathered(int rank, std::size_t bytes) const {
        return gathered_.data() + static_cast<std::size_t>(rank) * bytes;
    }

    // Exact sizes from here on: the verdict has shown that all ranks agree.

    Status reduce_block(std::size_t words) {
        return finish(MPI_Iallreduce(MPI_IN_PLACE, staging_.data(), static_cast<int>(words), MPI_UINT64_T, MPI_SUM,
                                     work_, &requests_[0]),
                      "MPI_Iallreduce");
    }
    Status gather_block(std::size_t bytes) {
        const int n = static_cast<int>(bytes);
        return finish(MPI_Iallgather(staging_.data(), n, MPI_BYTE, gathered_.data(), n, MPI_BYTE, work_, &requests_[0]),
                      "MPI_Iallgather");
    }
    Status broadcast_block(std::size_t bytes, int root) {
        return finish(MPI_Ibcast(staging_.data(), static_cast<int>(bytes), MPI_BYTE, root, work_, &requests_[0]),
                      "MPI_Ibcast");
    }

    void abort(const std::string& reason) {
        if (!refused())
            (void)give_up(Code::comm_failure, number_ - (turn_.under_way ? 1 : 0), turn_.under_way,
                          "an abort: rank " + std::to_string(rank_) + ": " + reason);
    }

    /// Whether MPI may still read or write this object's memory.
    [[nodiscard]] bool is_in_use() const {
        return refused() || std::any_of(requests_.begin(), requests_.end(),
                                        [](MPI_Request r) { return r != MPI_REQUEST_NULL; });
    }

private:
    static constexpr std::size_t chunk = 512;                        // words in each all-reduce of `post`
    static constexpr std::size_t header = 10;                        // words: h and h*h of five fields
    static constexpr std::uint64_t low = (std::uint64_t{1} << 24) - 1;  // h < 2^24, so sums of h*h are exact
    static constexpr std::size_t largest_reserve = std::size_t{1} << 27;  // MPI counts bytes in an int
    static constexpr double answer_time = 0.25;                      // seconds for ranks to say what they called

    [[noreturn]] static void throw_invalid(const char* what, std::string expected, std::string came) {
        throw Error(Status::refuse(Code::invalid_argument, stage, what, std::move(expected), std::move(came)));
    }

    [[nodiscard]] bool refused() const { return code_ != Code::ok; }

    Status check(int code, const char* call) {
        if (code == MPI_SUCCESS) return {};
        char text[MPI_MAX_ERROR_STRING] = {};
        int length = 0;
        MPI_Error_string(code, text, &length);
        return give_up(Code::comm_failure, number_ - 1, true,
                       std::string(call) + " on rank " + std::to_string(rank_) + ": " + text);
    }

    Status finish(int code, const char* call) {
        if (Status s = check(code, call); !s) return s;
        return wait(requests_[0]);
    }

    /// Polls, because MPI has no wait with a time limit. Yields first and sleeps later: ranks may share a core.
    Status wait(MPI_Request& request) {
        const auto start = std::chrono::steady_clock::now();
        for (int poll = 0;; ++poll) {
            int done = 0;
            if (Status s = check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Test"); !s) return s;
            // A collective can be complete here although others gave it up before this rank came; they have told so.
            if (done ? has_heard(number_ - 1) : notices_.hear(number_ - 1)) return give_up_as_heard(number_ - 1, !done);
            if (done) return {};
            if (poll < 1000) {
                std::this_thread::yield();
                continue;
            }
            std::this_thread::sleep_for(std::chrono::microseconds(50));
            if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > timeout_)
                return give_up(Code::comm_timeout, number_ - 1, true, "");
        }
    }

    /// Asks twice, because the first time may only set the library in motion.
    bool has_heard(std::uint64_t number) { return notices_.hear(number) || notices_.hear(number); }

    /// Another rank has given up: so does this one, in the collective `number`. `in_time`: it came to that before.
    Status give_up_as_heard(std::uint64_t number, bool in_time) {
        const Notice first = notices_.first();
        (void)give_up(static_cast<Code>(first.code), first.number, in_time || number > first.number, first.came_text);
        return refusal(number);
    }

    /// Refuses this rank for ever, tells the others, hears what they say, and writes the reason.
    Status give_up(Code code, std::uint64_t number, bool came, const std::string& failure) {
        code_ = code;
        refused_number_ = number;
        Notice mine{static_cast<std::int32_t>(code), came ? 1 : 0, number, call_, {}};
        failure.copy(mine.came_text, sizeof mine.came_text - 1);
        notices_.tell(mine);
        if (code == Code::comm_failure) {
            expected_ = "every rank to take part";
            came_ = failure;
        } else {
            notices_.wait_for_answers(answer_time);
            const bool late = code == Code::comm_timeout;
            expected_ = late ? "all " + std::to_string(size_) + " ranks within " + seconds_text(timeout_)
                             : "the same call on every rank";
            came_ = late ? notices_.who_came() : notices_.who_called_what();
        }
        return refusal(number);
    }

    [[nodiscard]] Status refusal(std::uint64_t number) const {
        std::string came = came_;
        if (number != refused_number_)
            came += " (in collective " + std::to_string(refused_number_) + "; the group stays refused)";
        return Status::refuse(code_, stage, place_text(number, rank_), expected_, came);
    }

    void release() {
        int over = 0;
        MPI_Finalized(&over);
        if (over) return;
        for (MPI_Comm* copy : {&work_, &notes_})
            if (*copy != MPI_COMM_NULL) MPI_Comm_free(copy);
    }

    MPI_Comm work_ = MPI_COMM_NULL;
    MPI_Comm notes_ = MPI_COMM_NULL;
    int rank_ = 0;
    int size_ = 1;
    double timeout_;
    std::uint64_t number_ = 0;  // collectives that this rank has posted
    std::size_t posted_ = 0;    // chunks of the last one
    Call call_;
    Turn turn_;
    std::vector<std::uint64_t> staging_;  // [chunks * chunk]
    std::vector<std::byte> gathered_;     // [R, block_bytes]
    std::vector<MPI_Request> requests_;   // [chunks]
    MpiNotices notices_;
    Code code_ = Code::ok;
    std::uint64_t refused_number_ = 0;
    std::string expected_, came_;
};

/// Deletes a state, or keeps it until the process ends where MPI may still use its memory: a collective that
/// other ranks never joined cannot be cancelled, and its communicator cannot be freed.
struct ReleaseMpiState {
    void operator()(MpiState* state) const {
        if (!state->is_in_use()) {
            delete state;
            return;
        }
        static std::mutex mutex;
        static auto* kept = new std::vector<MpiState*>;
        const std::lock_guard lock(mutex);
        kept->push_back(state);
    }
};

}  // namespace detail::comm

}  // namespace steelyard
