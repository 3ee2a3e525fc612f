// Why a group of MPI ranks is refused, told by each rank to every other.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1  // Open MPI: leave out the C++ bindings that MPI itself has dropped
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include "steelyard/comm/call.hpp"

namespace steelyard::detail::comm {

/// What one rank says when it gives up. Plain bytes, below every MPI library's limit for eager messages, so that
/// a send is complete even if its receiver never looks.
struct Notice {
    std::int32_t code = 0;
    std::int32_t came = 0;      // whether the sender had come to the collective `number`
    std::uint64_t number = 0;   // the collective that is refused
    Call call;                  // what the sender called last
    char came_text[160] = {};   // for comm_failure: what went wrong
};

/// The notices that a rank has sent and heard. Each rank sends at most one, to all others; sending and hearing
/// use a communicator of their own, never wait for a rank, and cannot disturb a collective.
class MpiNotices {
public:
    void open(MPI_Comm comm, int rank, int size) {
        comm_ = comm;
        rank_ = rank;
        heard_.assign(static_cast<std::size_t>(size), Notice{});
        has_.assign(static_cast<std::size_t>(size), 0);
    }

    /// Takes what has arrived. Returns whether some rank has given up in the collective `number` or before it.
    /// (One that gives up later has completed this one, so that it will complete here too.)
    bool hear(std::uint64_t number) {
        for (;;) {
            int arrived = 0;
            MPI_Status from;
            if (MPI_Iprobe(MPI_ANY_SOURCE, 0, comm_, &arrived, &from) != MPI_SUCCESS || arrived == 0) break;
            Notice notice;
            if (MPI_Recv(&notice, static_cast<int>(sizeof notice), MPI_BYTE, from.MPI_SOURCE, 0, comm_,
                         MPI_STATUS_IGNORE) != MPI_SUCCESS)
                break;
            keep(from.MPI_SOURCE, notice);
            if (first_ < 0 || notice.number < first().number) first_ = from.MPI_SOURCE;
        }
        return first_ >= 0 && first().number <= number;
    }

    /// The notice of the earliest collective. Only after `hear` returned true.
    [[nodiscard]] const Notice& first() const { return of(first_); }

    /// Sends this rank's notice to every other rank. `this` must live until MPI is finalised.
    void tell(const Notice& notice) {
        keep(rank_, notice);
        for (int r = 0; r < size(); ++r) {
            if (r == rank_) continue;
            MPI_Request request = MPI_REQUEST_NULL;
            const int sent = MPI_Isend(&heard_[static_cast<std::size_t>(rank_)], static_cast<int>(sizeof(Notice)),
                                       MPI_BYTE, r, 0, comm_, &request);
            if (sent == MPI_SUCCESS) MPI_Request_free(&request);
        }
    }

    /// Waits up to `seconds` for the notices of all others. A rank that waits in a collective answers at once.
    void wait_for_answers(double seconds) {
        const auto start = std::chrono::steady_clock::now();
        const auto all = [&] {
            for (const char has : has_)
                if (!has) return false;
            return true;
        };
        for (hear(0); !all(); hear(0)) {
            if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) return;
            std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
    }

    /// "ranks 0, 2, without rank 1"
    [[nodiscard]] std::string who_came() const {
        const auto came = [&](int r) { return has(r) && of(r).came != 0; };
        return ranks_text(size(), came) + ", without " + ranks_text(size(), [&](int r) { return !came(r); });
    }

    /// "ranks 0, 2: a sum of 5 int64; rank 1: a sum of 6 int64"
    [[nodiscard]] std::string who_called_what() const {
        const auto answered = [&](int r) { return has(r); };
        std::string list = calls_text(size(), [&](int r) -> const Call& { return of(r).call; }, answered);
        bool all = true;
        for (int r = 0; r < size(); ++r) all = all && has(r);
        if (!all) list += "; no answer from " + ranks_text(size(), [&](int r) { return !has(r); });
        return list;
    }

private:
    [[nodiscard]] int size() const { return static_cast<int>(has_.size()); }
    [[nodiscard]] bool has(int rank) const { return has_[static_cast<std::size_t>(rank)] != 0; }
    [[nodiscard]] const Notice& of(int rank) const { return heard_[static_cast<std::size_t>(rank)]; }
    void keep(int rank, const Notice& notice) {
        heard_[static_cast<std::size_t>(rank)] = notice;
        has_[static_cast<std::size_t>(rank)] = 1;
    }

    MPI_Comm comm_ = MPI_COMM_NULL;
    int rank_ = 0;
    int first_ = -1;  // whose notice is of the earliest collective
    std::vector<Notice> heard_;  // [R]
    std::vector<char> has_;      // [R]
};

}  // namespace steelyard::detail::comm
