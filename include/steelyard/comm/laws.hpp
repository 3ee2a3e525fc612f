// The contract of a CommBackend as a test that anyone can run on their own backend.
#pragma once

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "steelyard/comm/concept.hpp"

namespace steelyard {

struct CommLawOptions {
    /// Seconds within which every refusal must come; more than the time limit set in the groups under test.
    double refused_within = 10.0;
    /// Collectives in the long run of law 2.
    int rounds = 200;
};

namespace detail::comm_laws {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

inline void sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

inline Status broken(const char* law, int rank, std::string expected, std::string came) {
    return Status::refuse(Code::comm_failure, "check_comm_laws", std::string(law) + ", rank " + std::to_string(rank),
                          std::move(expected), std::move(came));
}

/// A refusal where the law expects none.
inline Status unexpected(const char* law, int rank, const Status& status) {
    return broken(law, rank, "an accepted call", status.message());
}

template <class C, class T>
Status sum(const C& comm, std::span<T> words) {
    if (Status s = comm.begin_sum(words); !s) return s;
    return comm.end_sum(words);
}

/// Rank r's word i in round n: spread over all 64 bits, so that a sum by way of double or int32 is caught.
inline std::int64_t word(int rank, int round, std::size_t i) {
    std::uint64_t h = static_cast<std::uint64_t>(rank + 1) * 0x9E3779B97F4A7C15u;
    h ^= (static_cast<std::uint64_t>(round) << 32) + i;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    return static_cast<std::int64_t>(h ^ (h >> 31));
}

inline std::int64_t total(int ranks, int round, std::size_t i) {
    std::uint64_t sum = 0;
    for (int r = 0; r < ranks; ++r) sum += static_cast<std::uint64_t>(word(r, round, i));
    return static_cast<std::int64_t>(sum);
}

/// One exact sum, with `work` seconds of computing between begin and end.
template <class C>
Status exact_sum(const C& comm, int round, std::size_t length, double work, const char* law) {
    const int rank = comm.rank();
    std::vector<std::int64_t> words(length);
    for (std::size_t i = 0; i < length; ++i) words[i] = word(rank, round, i);
    const std::span<std::int64_t> span(words);
    if (Status s = comm.begin_sum(span); !s) return unexpected(law, rank, s);
    if (work > 0.0) sleep(work);
    if (Status s = comm.end_sum(span); !s) return unexpected(law, rank, s);
    for (std::size_t i = 0; i < length; ++i)
        if (const auto expected = total(comm.size(), round, i); words[i] != expected)
            return broken(law, rank, std::to_string(expected) + " in word " + std::to_string(i) + " of " +
                                         std::to_string(length) + " in round " + std::to_string(round),
                          std::to_string(words[i]));
    return {};
}

template <class C>
Status ranks_are_distinct(const C& comm) {
    const char* law = "law 1 (rank and size)";
    const int rank = comm.rank(), size = comm.size();
    if (size < 1 || rank < 0 || rank >= size)
        return broken(law, rank, "0 <= rank < size", "size " + std::to_string(size));
    std::vector<std::int64_t> present(static_cast<std::size_t>(size), 0);
    present[static_cast<std::size_t>(rank)] = 1;
    if (Status s = sum(comm, std::span<std::int64_t>(present)); !s) return unexpected(law, rank, s);
    for (const std::int64_t count : present)
        if (count != 1) return broken(law, rank, "each rank once", std::to_string(count) + " times");
    if (comm.rank() != rank || comm.size() != size) return broken(law, rank, "the same rank and size", "others");
    return {};
}

template <class C>
Status sums_are_exact(const C& comm, int rounds) {
    const char* law = "law 2 (sums of any length, round after round)";
    for (const std::size_t length : {0u, 1u, 7u, 255u, 512u, 513u, 4099u, 20011u})
        if (Status s = exact_sum(comm, 0, length, 0.0, law); !s) return s;
    for (int n = 1; n <= rounds; ++n) {
        // Ranks are late in turns, before or inside a sum, so that they run ahead of each other.
        const bool late = n % 16 == 0 && (n / 16) % comm.size() == comm.rank();
        if (late) sleep(1e-3);
        if (Status s = exact_sum(comm, n, static_cast<std::size_t>(n % 67), late ? 1e-3 : 0.0, law); !s) return s;
    }
    return {};
}

/// The last rank comes late; the others' begin_sum must not wait for it. The best of three, as machines stall.
template <class C>
Status begin_does_not_wait(const C& comm) {
    const char* law = "law 2 (begin_sum does not wait)";
    constexpr double delay = 0.2;
    double shortest = 1e9;
    for (int attempt = 0; attempt < 3; ++attempt) {
        if (Status s = exact_sum(comm, attempt, 1, 0.0, law); !s) return s;
        if (comm.size() > 1 && comm.rank() == comm.size() - 1) sleep(delay);
        std::int64_t one = 1;
        const std::span<std::int64_t> words(&one, 1);
        const auto start = Clock::now();
        if (Status s = comm.begin_sum(words); !s) return unexpected(law, comm.rank(), s);
        shortest = std::min(shortest, seconds_since(start));
        if (Status s = comm.end_sum(words); !s) return unexpected(law, comm.rank(), s);
    }
    if (shortest > delay / 2)
        return broken(law, comm.rank(), "begin_sum to return at once", std::to_string(shortest) + " s");
    return {};
}

/// Values whose float sum depends on the order: the same bits on every rank and in every round.
template <class T, class C>
Status same_bits(const C& comm) {
    const char* law = "law 3 (the same bits on every rank and each time)";
    constexpr std::size_t length = 3001;
    std::vector<T> first;
    for (int round = 0; round < 5; ++round) {
        std::vector<T> words(length);
        for (std::size_t i = 0; i < length; ++i) {
            const std::int64_t h = word(comm.rank(), 0, i);
            words[i] = static_cast<T>(static_cast<double>(h) * ((h & 1) ? 0x1.0p-40 : 0x1.0p-63));
        }
        if (round > 0 && comm.rank() == round % comm.size()) sleep(2e-3);  // another order of coming
        if (Status s = sum(comm, std::span<T>(words)); !s) return unexpected(law, comm.rank(), s);
        if (round == 0) first = words;
        std::uint64_t bits = 0;
        for (std::size_t i = 0; i < length; ++i) {
            if (!(words[i] == first[i])) return broken(law, comm.rank(), "the sum of the first time", "another");
            bits = (bits ^ std::bit_cast<std::uint64_t>(static_cast<double>(words[i]))) * 0x100000001B3u;
        }
        // All ranks hold the same h exactly if R * sum(h*h) = sum(h)^2.
        const auto h = static_cast<std::int64_t>((bits ^ (bits >> 32)) & 0xFFFFFF);
        std::int64_t sums[2] = {h, h * h};
        if (Status s = sum(comm, std::span<std::int64_t>(sums)); !s) return unexpected(law, comm.rank(), s);
        if (sums[0] != comm.size() * h || sums[1] != comm.size() * h * h)
            return broken(law, comm.rank(), "the same sum on every rank", "another one here");
    }
    return {};
}

/// Runs `calls()`, in which some call must be refused in time, and then asks for another sum, which must be too.
template <class C, class Calls>
Status must_be_refused(const C& comm, const char* law, double within, Calls calls) {
    const auto start = Clock::now();
    const Status refused = calls();
    const double seconds = seconds_since(start);
    if (refused) return broken(law, comm.rank(), "a refused status", "ok");
    if (seconds > within)
        return broken(law, comm.rank(), "a refusal within " + std::to_string(within) + " s",
                      "one after " + std::to_string(seconds) + " s");
    std::int64_t one = 1;
    const auto again = Clock::now();
    if (sum(comm, std::span<std::int64_t>(&one, 1)))
        return broken(law, comm.rank(), "the group to stay refused",
                      "an accepted sum after \"" + refused.message() + "\"");
    if (seconds_since(again) > within) return broken(law, comm.rank(), "a second refusal in time", "a later one");
    return {};
}

template <class C>
Status sum_of_length(const C& comm, std::size_t length) {
    std::vector<std::int64_t> words(length, 1);
    return sum(comm, std::span<std::int64_t>(words));
}

}  // namespace detail::comm_laws

/// Checks the numbered contract of `CommBackend` (comm/concept.hpp). Ok, or the first broken law, its rank, what
/// was expected and what came. Depends on no test framework.
///
/// `with_group(body)` must make a fresh group of ranks (the same number each time; at least 2 to see laws 3 and
/// 4), call `Status body(comm)` once on every rank at the same time, and return ok or the first refusal that a
/// body returned:
///
///     auto with_group = [](auto body) {
///         steelyard::ThreadGroup group(3, {.timeout = 1.0});
///         std::vector<steelyard::Status> found(3);
///         steelyard::run_ranks(group, [&](auto comm) { found[comm.rank()] = body(comm); });
///         for (auto& status : found) if (!status) return status;
///         return steelyard::Status();
///     };
///     steelyard::Status status = steelyard::check_comm_laws(with_group, {.refused_within = 3.0});
///
/// Ranks that are processes call `check_comm_laws` in each of them. A backend that hangs where it should refuse
/// hangs here too: run this under a time limit.
template <class WithGroup>
Status check_comm_laws(WithGroup&& with_group, CommLawOptions options = {}) {
    namespace laws = detail::comm_laws;
    const double within = options.refused_within;

    // Laws 1 to 3 and 5: one group in which all goes well.
    Status status = with_group([&](const auto& comm) -> Status {
        static_assert(CommBackend<std::remove_cvref_t<decltype(comm)>>,
                      "steelyard: check_comm_laws needs a CommBackend: rank(), size(), begin_sum and end_sum over "
                      "std::span<std::int64_t> that return a Status: see comm/concept.hpp");
        if (Status s = laws::ranks_are_distinct(comm); !s) return s;
        if (Status s = laws::sums_are_exact(comm, options.rounds); !s) return s;
        if (Status s = laws::begin_does_not_wait(comm); !s) return s;
        if constexpr (CollectiveComm<std::remove_cvref_t<decltype(comm)>>) {
            if (Status s = laws::same_bits<float>(comm); !s) return s;
            if (Status s = laws::same_bits<double>(comm); !s) return s;
        }
        return {};
    });
    if (!status) return status;

    // Law 4: each disagreement in a group of its own. A group of one rank has nobody to disagree with.
    const auto disagree = [&](const char* law, auto calls) {
        return with_group([&](const auto& comm) -> Status {
            if (comm.size() == 1) return {};
            const bool odd = comm.rank() == comm.size() - 1;
            return laws::must_be_refused(comm, law, within, [&] { return calls(comm, odd); });
        });
    };
    for (const std::size_t longer : {std::size_t{6}, std::size_t{5000}}) {
        status = disagree("law 4 (another number of words)", [&](const auto& comm, bool odd) -> Status {
            if (Status s = laws::sum_of_length(comm, 5); !s) return s;
            return laws::sum_of_length(comm, odd ? longer : 5);
        });
        if (!status) return status;
    }
    status = disagree("law 4 (another order of calls)", [&](const auto& comm, bool odd) -> Status {
        if (Status s = laws::sum_of_length(comm, odd ? 3 : 1000); !s) return s;
        return laws::sum_of_length(comm, odd ? 1000 : 3);
    });
    if (!status) return status;

    const auto desert = [&](const char* law, int done) {
        return with_group([&](const auto& comm) -> Status {
            for (int n = 0; n < done; ++n)
                if (Status s = laws::sum_of_length(comm, 4); !s) return laws::unexpected(law, comm.rank(), s);
            if (comm.rank() == comm.size() - 1) return {};
            return laws::must_be_refused(comm, law, within, [&] { return laws::sum_of_length(comm, 4); });
        });
    };
    if (status = desert("law 4 (a rank that never comes)", 0); !status) return status;
    return desert("law 4 (a rank that stops after three sums)", 3);
}

}  // namespace steelyard
