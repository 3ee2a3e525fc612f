// Ranks as threads of one process.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/concept.hpp"

namespace steelyard {

class ThreadComm;

struct ThreadGroupOptions {
    /// Seconds that a rank waits in one collective for the others.
    double timeout = 60.0;
    /// Payloads of up to this many words (8 bytes each) never allocate. Costs 16 bytes a word and rank.
    std::size_t reserve = 4096;
};

/// What the ranks of one process share. Owned by whoever starts the threads, and outlives them.
///
/// A rank copies its payload into a slot of its own and goes on; a collective is complete when the last rank
/// has come, and the last rank also compares the calls of all. So each collective has one outcome, the same
/// for every rank. Slots are double buffered: a rank can write its next payload while others still read this one.
class ThreadGroup {
public:
    /// Throws `Error` when `ranks` is below 1 or the timeout is not positive.
    explicit ThreadGroup(int ranks, ThreadGroupOptions options = {}) : size_(ranks), options_(options) {
        if (ranks < 1)
            throw Error(Status::refuse(Code::invalid_argument, stage, "ranks", "at least 1", std::to_string(ranks)));
        if (!(options.timeout > 0.0))
            throw Error(Status::refuse(Code::invalid_argument, stage, "timeout", "more than 0 s",
                                       std::to_string(options.timeout) + " s"));
        members_ = std::make_unique<Member[]>(static_cast<std::size_t>(ranks));
        for (int r = 0; r < ranks; ++r)
            for (Slot& slot : member(r).slots) slot.payload.resize(options.reserve * sizeof(std::int64_t));
    }
    ThreadGroup(const ThreadGroup&) = delete;
    ThreadGroup& operator=(const ThreadGroup&) = delete;

    [[nodiscard]] int size() const { return size_; }

    /// The handle of one rank, to be used by one thread at a time. Copies share that rank.
    [[nodiscard]] ThreadComm comm(int rank);

    /// Refuses every collective that is not complete yet, now and for ever: for a rank that has to stop.
    /// May be called from any thread.
    void abort(const std::string& reason) {
        {
            const std::lock_guard lock(mutex_);
            refuse(Code::comm_failure, completed_.load(std::memory_order_relaxed), "every rank to take part",
                   "an abort: " + reason);
        }
        changed_.notify_all();
    }

private:
    friend class ThreadComm;
    using Call = detail::comm::Call;
    using Clock = std::chrono::steady_clock;
    static constexpr const char* stage = "ThreadComm";

    struct Slot {
        Call call;
        std::vector<std::byte> payload;
    };

    /// One rank. Written by its own thread; `slots` are read by the others while they stand complete.
    struct alignas(64) Member {
        Slot slots[2];
        std::uint64_t number = 0;  // collectives published; written under the mutex
        detail::comm::Turn turn;
    };

    /// Why the group is refused. Written once, before `refused_` is set.
    struct Refusal {
        Code code = Code::ok;
        std::uint64_t number = 0;
        std::string expected, came;
    };

    Member& member(int rank) const { return members_.get()[rank]; }
    const Slot& latest(int rank, std::uint64_t number) const { return member(rank).slots[(number - 1) % 2]; }

    /// Puts this rank's call and payload before the others, without waiting.
    Status publish(int rank, const Call& call, const void* payload, std::size_t bytes) {
        Member& me = member(rank);
        if (refused_.load(std::memory_order_acquire)) return refusal(rank, me.number);
        Slot& slot = me.slots[me.number % 2];
        slot.call = call;
        if (bytes > slot.payload.size()) slot.payload.resize(bytes);
        if (bytes != 0) std::memcpy(slot.payload.data(), payload, bytes);
        {
            const std::lock_guard lock(mutex_);
            if (refused_.load(std::memory_order_relaxed)) return refusal(rank, me.number);
            ++me.number;
            if (++arrived_ < size_) return {};
            conclude(me.number);
        }
        changed_.notify_all();
        return {};
    }

    /// The last rank has come: the collective is complete, or refused when the calls differ.
    void conclude(std::uint64_t number) {
        const auto call_of = [&](int r) -> const Call& { return latest(r, number).call; };
        bool same = true;
        for (int r = 1; r < size_; ++r) same = same && call_of(r) == call_of(0);
        if (!same) {
            refuse(Code::comm_mismatch, number - 1, "the same call on every rank",
                   detail::comm::calls_text(size_, call_of, [](int) { return true; }));
            return;
        }
        arrived_ = 0;
        completed_.store(number, std::memory_order_release);
    }

    /// Waits until the collective that this rank published last is complete.
    Status wait(int rank) {
        const std::uint64_t number = member(rank).number;
        const auto complete = [&] { return completed_.load(std::memory_order_acquire) >= number; };
        const auto settled = [&] { return complete() || refused_.load(std::memory_order_acquire); };
        // Ranks mostly come within microseconds of each other; yielding lets them come on a busy machine.
        for (int spin = 0; spin < 64 && !settled(); ++spin) std::this_thread::yield();
        if (!settled()) {
            const auto patience = std::chrono::duration<double>(std::min(options_.timeout, 1e9));
            const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(patience);
            std::unique_lock lock(mutex_);
            if (!changed_.wait_until(lock, deadline, settled)) {
                const auto missing = [&](int r) { return member(r).number < number; };
                refuse(Code::comm_timeout, number - 1,
                       "all " + std::to_string(size_) + " ranks within " + detail::comm::seconds_text(options_.timeout),
                       detail::comm::ranks_text(size_, [&](int r) { return !missing(r); }) + ", without " +
                           detail::comm::ranks_text(size_, missing));
                lock.unlock();
                changed_.notify_all();
            }
        }
        return complete() ? Status() : refusal(rank, number - 1);
    }

    /// Under the mutex. The first reason stays.
    void refuse(Code code, std::uint64_t number, std::string expected, std::string came) {
        if (refused_.load(std::memory_order_relaxed)) return;
        why_ = {code, number, std::move(expected), std::move(came)};
        refused_.store(true, std::memory_order_release);
    }

    Status refusal(int rank, std::uint64_t number) const {
        std::string came = why_.came;
        if (number != why_.number)
            came += " (in collective " + std::to_string(why_.number) + "; the group stays refused)";
        return Status::refuse(why_.code, stage, detail::comm::place_text(number, rank), why_.expected, came);
    }

    int size_;
    ThreadGroupOptions options_;
    std::unique_ptr<Member[]> members_;
    std::mutex mutex_;
    std::condition_variable changed_;
    int arrived_ = 0;  // ranks that published the collective under way; under the mutex
    std::atomic<std::uint64_t> completed_{0};
    std::atomic<bool> refused_{false};
    Refusal why_;
};

/// One rank of a `ThreadGroup`.
///
/// Each sum adds the ranks' payloads in rank order, so float and double sums too are bit-identical on every
/// rank and from run to run. Every call on the happy path allocates nothing while the payload is within the
/// group's reserve. A refused call leaves the caller's words as they were. Refusals: `comm_mismatch` and
/// `comm_timeout` name the collective (counted from 0), the ranks and their calls; `comm_failure` follows
/// `abort`. Calls out of turn on one rank (`end_sum` without its `begin_sum`) are `invalid_argument`.
class ThreadComm {
public:
    [[nodiscard]] int rank() const { return rank_; }
    [[nodiscard]] int size() const { return group_->size_; }

    Status begin_sum(std::span<std::int64_t> words) const { return begin(words); }
    Status begin_sum(std::span<float> words) const { return begin(words); }
    Status begin_sum(std::span<double> words) const { return begin(words); }

    Status end_sum(std::span<std::int64_t> words) const { return end(words); }
    Status end_sum(std::span<float> words) const { return end(words); }
    Status end_sum(std::span<double> words) const { return end(words); }

    /// Leaves the words of rank `root` in `words` (=) on every rank.
    template <CommElement T>
    Status broadcast(std::span<T> words, int root) const {
        if (Status s = detail::comm::check_root(ThreadGroup::stage, root, size()); !s) return s;
        const Call call{detail::comm::Kind::broadcast, detail::comm::element_of<T>(), root, words.size()};
        if (Status s = together(call, words.data(), rank_ == root ? words.size_bytes() : 0); !s) return s;
        if (rank_ != root) copy(root, words.data(), words.size_bytes());
        return {};
    }

    /// Leaves the words of rank r in `all[r * mine.size() ...]` (=) on every rank. // [R, n]
    template <CommElement T>
    Status all_gather(std::span<const T> mine, std::span<T> all) const {
        if (Status s = detail::comm::check_gather(ThreadGroup::stage, mine.size(), all.size(), size()); !s) return s;
        const Call call{detail::comm::Kind::all_gather, detail::comm::element_of<T>(), 0, mine.size()};
        if (Status s = together(call, mine.data(), mine.size_bytes()); !s) return s;
        for (int r = 0; r < size(); ++r)
            copy(r, all.data() + static_cast<std::size_t>(r) * mine.size(), mine.size_bytes());
        return {};
    }

    /// Returns once every rank has come.
    Status barrier() const { return together(Call{}, nullptr, 0); }

    /// Refuses the group at once, so that no rank waits for this one.
    void abort(const std::string& reason) const {
        group_->abort("rank " + std::to_string(rank_) + ": " + reason);
    }

private:
    friend class ThreadGroup;
    using Call = detail::comm::Call;
    ThreadComm(ThreadGroup* group, int rank) : group_(group), rank_(rank) {}

    ThreadGroup::Member& me() const { return group_->member(rank_); }

    template <class T>
    Status begin(std::span<T> words) const {
        if (Status s = me().turn.may_begin(ThreadGroup::stage, rank_); !s) return s;
        const Call call = detail::comm::sum_of(words);
        if (Status s = group_->publish(rank_, call, words.data(), words.size_bytes()); !s) return s;
        me().turn = {words.data(), call, true};
        return {};
    }

    template <class T>
    Status end(std::span<T> words) const {
        if (!me().turn.under_way && group_->refused_.load(std::memory_order_acquire))
            return group_->refusal(rank_, me().number);
        if (Status s = me().turn.may_end(ThreadGroup::stage, rank_, words.data(), detail::comm::sum_of(words)); !s)
            return s;
        me().turn.under_way = false;
        if (Status s = group_->wait(rank_); !s) return s;
        add(words);
        return {};
    }

    Status together(const Call& call, const void* payload, std::size_t bytes) const {
        if (Status s = me().turn.may_begin(ThreadGroup::stage, rank_); !s) return s;
        if (Status s = group_->publish(rank_, call, payload, bytes); !s) return s;
        return group_->wait(rank_);
    }

    const std::byte* payload_of(int rank) const { return group_->latest(rank, me().number).payload.data(); }

    void copy(int from, void* to, std::size_t bytes) const {
        if (bytes != 0) std::memcpy(to, payload_of(from), bytes);
    }

    /// words = sum over ranks, in rank order, block by block so that `words` stays in the first-level cache.
    template <class T>
    void add(std::span<T> words) const {
        constexpr std::size_t block = 2048;
        for (std::size_t begin = 0; begin < words.size(); begin += block) {
            const std::size_t count = std::min(block, words.size() - begin);
            std::memcpy(words.data() + begin, payload_of(0) + begin * sizeof(T), count * sizeof(T));
            for (int r = 1; r < size(); ++r)
                detail::comm::accumulate(words.data() + begin,
                                         reinterpret_cast<const T*>(payload_of(r)) + begin, count);
        }
    }

    ThreadGroup* group_;
    int rank_;
};

inline ThreadComm ThreadGroup::comm(int rank) {
    if (rank < 0 || rank >= size_)
        throw Error(Status::refuse(Code::invalid_argument, stage, "rank", "in [0, " + std::to_string(size_) + ")",
                                   std::to_string(rank)));
    return ThreadComm(this, rank);
}

/// Runs `body(group.comm(r))` on one thread for each rank and waits for all.
///
/// When a body throws, the group is aborted, so that the others get a refused status at once; the exception
/// that came first is thrown again here.
template <class Body>
void run_ranks(ThreadGroup& group, Body&& body) {
    std::mutex mutex;
    std::exception_ptr first;
    {
        std::vector<std::jthread> threads;
        threads.reserve(static_cast<std::size_t>(group.size()));
        for (int r = 0; r < group.size(); ++r)
            threads.emplace_back([&, r] {
                std::string reason = "an exception";
                try {
                    body(group.comm(r));
                    return;
                } catch (const std::exception& error) {
                    reason = error.what();
                    const std::lock_guard lock(mutex);
                    if (!first) first = std::current_exception();
                } catch (...) {
                    const std::lock_guard lock(mutex);
                    if (!first) first = std::current_exception();
                }
                group.comm(r).abort(reason);
            });
    }
    if (first) std::rethrow_exception(first);
}

static_assert(CommBackend<ThreadComm>, "steelyard: ThreadComm has left the contract of comm/concept.hpp");
static_assert(CollectiveComm<ThreadComm>, "steelyard: ThreadComm has left the contract of comm/concept.hpp");

}  // namespace steelyard
