// Ranks as MPI processes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/concept.hpp"
#include "steelyard/comm/mpi_state.hpp"

namespace steelyard {

/// One rank of a group of MPI processes: a handle; copies share the rank and its order of calls.
///
/// int64 sums are non-blocking all-reduces, posted in `begin_sum`, exact. How far they run while the caller computes
/// is up to the MPI library (Open MPI moves data inside MPI calls, so small sums finish in `end_sum`).
/// float and double sums post a header in `begin_sum`; `end_sum` gathers block by block and adds in rank order,
/// because MPI promises no order: bit-identical on every rank and from run to run.
/// On the happy path no call of this class allocates; what the MPI library does inside is its own affair.
///
/// Refusals: `comm_mismatch` and `comm_timeout` name the collective (counted from 0), the ranks and their calls; a rank
/// that neither came nor answers within 0.25 s counts as missing. `comm_failure` carries the MPI library's own
/// text or the reason of an `abort`. Calls out of turn are `invalid_argument`. The time limit holds for each
/// block of a payload. A collective that is refused by its header leaves the caller's words as they were; one that
/// breaks off later, in a payload beyond `reserve`, may have written the blocks before.
///
/// Handles of one group belong to one thread at a time; two groups used from two threads need
/// MPI_THREAD_MULTIPLE. After a refusal, and when a sum was begun but never ended, the destructor waits for
/// nothing: MPI cannot cancel a collective, so the duplicates and the staging memory stay until the process ends.
class MpiComm {
public:
    /// Duplicates `parent`: a collective call, which waits for every rank of it without a time limit.
    /// Throws `Error` when MPI is not initialised or the options cannot work.
    explicit MpiComm(MPI_Comm parent, MpiCommOptions options = {})
        : state_(new State(parent, options), detail::comm::ReleaseMpiState{}) {}

    [[nodiscard]] int rank() const { return state_->rank(); }
    [[nodiscard]] int size() const { return state_->size(); }

    Status begin_sum(std::span<std::int64_t> words) const {
        return state_->begin(detail::comm::sum_of(words), words.data(), words.data(), words.size());
    }
    Status begin_sum(std::span<float> words) const {
        return state_->begin(detail::comm::sum_of(words), words.data(), nullptr, 0);
    }
    Status begin_sum(std::span<double> words) const {
        return state_->begin(detail::comm::sum_of(words), words.data(), nullptr, 0);
    }

    Status end_sum(std::span<std::int64_t> words) const {
        if (Status s = state_->end(detail::comm::sum_of(words), words.data()); !s) return s;
        const std::size_t first = std::min(words.size(), state_->first_words());
        if (first != 0) std::memcpy(words.data(), state_->first_payload(), first * sizeof(std::int64_t));
        return blocks(words.subspan(first), [&](std::span<std::int64_t> block) -> Status {
            std::memcpy(state_->staging(), block.data(), block.size_bytes());
            if (Status s = state_->reduce_block(block.size()); !s) return s;
            std::memcpy(block.data(), state_->staging(), block.size_bytes());
            return {};
        });
    }
    Status end_sum(std::span<float> words) const { return end_in_rank_order(words); }
    Status end_sum(std::span<double> words) const { return end_in_rank_order(words); }

    /// Leaves the words of rank `root` in `words` (=) on every rank.
    template <CommElement T>
    Status broadcast(std::span<T> words, int root) const {
        if (Status s = detail::comm::check_root(State::stage, root, size()); !s) return s;
        const Call call{detail::comm::Kind::broadcast, detail::comm::element_of<T>(), root, words.size()};
        if (Status s = state_->together(call); !s) return s;
        return blocks(words, [&](std::span<T> block) -> Status {
            if (rank() == root) std::memcpy(state_->staging(), block.data(), block.size_bytes());
            if (Status s = state_->broadcast_block(block.size_bytes(), root); !s) return s;
            if (rank() != root) std::memcpy(block.data(), state_->staging(), block.size_bytes());
            return {};
        });
    }

    /// Leaves the words of rank r in `all[r * mine.size() ...]` (=) on every rank. // [R, n]
    template <CommElement T>
    Status all_gather(std::span<const T> mine, std::span<T> all) const {
        if (Status s = detail::comm::check_gather(State::stage, mine.size(), all.size(), size()); !s) return s;
        const Call call{detail::comm::Kind::all_gather, detail::comm::element_of<T>(), 0, mine.size()};
        if (Status s = state_->together(call); !s) return s;
        return blocks(mine, [&](std::span<const T> block) -> Status {
            if (Status s = gather(block); !s) return s;
            const auto begin = static_cast<std::size_t>(block.data() - mine.data());
            for (int r = 0; r < size(); ++r)
                std::memcpy(all.data() + static_cast<std::size_t>(r) * mine.size() + begin,
                            state_->gathered(r, block.size_bytes()), block.size_bytes());
            return {};
        });
    }

    /// Returns once every rank has come.
    Status barrier() const { return state_->together(Call{}); }

    /// Refuses the group at once, so that no rank waits for this one.
    void abort(const std::string& reason) const { state_->abort(reason); }

private:
    using State = detail::comm::MpiState;
    using Call = detail::comm::Call;

    /// Calls `move(block)` on one part after the other, each as long as the staging memory.
    template <class T, class Move>
    Status blocks(std::span<T> words, Move move) const {
        const std::size_t longest = state_->block_bytes() / sizeof(T);
        for (std::size_t begin = 0; begin < words.size(); begin += longest)
            if (Status s = move(words.subspan(begin, std::min(longest, words.size() - begin))); !s) return s;
        return {};
    }

    template <class T>
    Status gather(std::span<T> block) const {
        std::memcpy(state_->staging(), block.data(), block.size_bytes());
        return state_->gather_block(block.size_bytes());
    }

    template <class T>
    Status end_in_rank_order(std::span<T> words) const {
        if (Status s = state_->end(detail::comm::sum_of(words), words.data()); !s) return s;
        return blocks(words, [&](std::span<T> block) -> Status {
            if (Status s = gather(block); !s) return s;
            std::memcpy(block.data(), state_->gathered(0, block.size_bytes()), block.size_bytes());
            for (int r = 1; r < size(); ++r)
                detail::comm::accumulate(
                    block.data(), static_cast<const T*>(state_->gathered(r, block.size_bytes())), block.size());
            return {};
        });
    }

    std::shared_ptr<State> state_;
};

static_assert(CommBackend<MpiComm>, "steelyard: MpiComm has left the contract of comm/concept.hpp");
static_assert(CollectiveComm<MpiComm>, "steelyard: MpiComm has left the contract of comm/concept.hpp");

}  // namespace steelyard
