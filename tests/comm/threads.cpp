#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "comm/allocations.hpp"
#include "steelyard/comm/threads.hpp"

namespace {

using steelyard::Code;
using steelyard::run_ranks;
using steelyard::Status;
using steelyard::ThreadComm;
using steelyard::ThreadGroup;
using Words = std::vector<std::int64_t>;

template <class T>
Status sum(const ThreadComm& comm, std::vector<T>& words) {
    if (Status s = comm.begin_sum(words); !s) return s;
    return comm.end_sum(words);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Runs `calls(comm) -> Status` on each rank and returns what each came to.
template <class Calls>
std::vector<Status> outcomes(ThreadGroup& group, Calls calls) {
    std::vector<Status> found(static_cast<std::size_t>(group.size()));
    run_ranks(group, [&](const ThreadComm& comm) { found[static_cast<std::size_t>(comm.rank())] = calls(comm); });
    return found;
}

}  // namespace

TEST_CASE("two thread ranks sum by hand") {
    ThreadGroup group(2);
    std::vector<Words> result(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        Words words = comm.rank() == 0 ? Words{1, 2, -3} : Words{10, 20, 30};
        steelyard::throw_if_refused(sum(comm, words));
        result[static_cast<std::size_t>(comm.rank())] = words;
    });
    CHECK(result[0] == Words{11, 22, 27});
    CHECK(result[1] == Words{11, 22, 27});
}

TEST_CASE("many rounds of sums of changing length are exact for 1, 2, 3 and 8 thread ranks") {
    for (const int ranks : {1, 2, 3, 8}) {
        ThreadGroup group(ranks, {.timeout = 30.0, .reserve = 16});
        const std::vector<Status> found = outcomes(group, [&](const ThreadComm& comm) {
            for (int n = 0; n < 1000; ++n) {
                Words words(static_cast<std::size_t>(n % 41));
                for (std::size_t i = 0; i < words.size(); ++i)
                    words[i] = (std::int64_t{1} << 55) + n + static_cast<std::int64_t>(i) * comm.rank();
                if (Status s = sum(comm, words); !s) return s;
                for (std::size_t i = 0; i < words.size(); ++i) {
                    const std::int64_t expected = ranks * ((std::int64_t{1} << 55) + n) +
                                                  static_cast<std::int64_t>(i) * (ranks * (ranks - 1) / 2);
                    if (words[i] != expected)
                        return Status::refuse(Code::comm_failure, "test", "word", std::to_string(expected),
                                              std::to_string(words[i]));
                }
            }
            return Status();
        });
        for (const Status& status : found) CHECK(status.message() == "ok");
    }
}

TEST_CASE("integers wrap around like a sum modulo 2^64") {
    ThreadGroup group(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        Words words{comm.rank() == 0 ? std::numeric_limits<std::int64_t>::max() : 1};
        steelyard::throw_if_refused(sum(comm, words));
        CHECK(words[0] == std::numeric_limits<std::int64_t>::min());
    });
}

TEST_CASE("float and double sums are taken in rank order") {
    // In rank order (1 + 2^-24) + 2^-24 = 1 in float; any order that adds the small ones first gives more.
    ThreadGroup group(3);
    run_ranks(group, [&](const ThreadComm& comm) {
        std::vector<float> words(5000, comm.rank() == 0 ? 1.0f : 0x1.0p-24f);
        steelyard::throw_if_refused(sum(comm, words));
        bool all_one = true;
        for (const float word : words) all_one = all_one && word == 1.0f;
        CHECK(all_one);

        std::vector<double> doubles{comm.rank() == 2 ? 1.0 : 0x1.0p-53};
        steelyard::throw_if_refused(sum(comm, doubles));
        CHECK(doubles[0] == 1.0 + 0x1.0p-52);
    });
}

TEST_CASE("broadcast, all_gather and barrier move words between thread ranks") {
    ThreadGroup group(3);
    run_ranks(group, [&](const ThreadComm& comm) {
        for (int round = 0; round < 50; ++round) {
            std::vector<double> words(7, comm.rank() + 0.5);
            const int root = round % 3;
            steelyard::throw_if_refused(comm.broadcast(std::span(words), root));
            CHECK(words == std::vector<double>(7, root + 0.5));

            const Words mine{comm.rank(), round};
            Words all(6);
            steelyard::throw_if_refused(comm.all_gather(std::span(mine), std::span(all)));
            CHECK(all == Words{0, round, 1, round, 2, round});
            steelyard::throw_if_refused(comm.barrier());
        }
    });
}

TEST_CASE("begin_sum does not wait for ranks that have not come") {
    ThreadGroup group(2);
    const ThreadComm first = group.comm(0), second = group.comm(1);
    // Both ranks from this one thread: it would hang if begin_sum waited.
    Words a{1}, b{2};
    CHECK(first.begin_sum(a));
    CHECK(second.begin_sum(b));
    CHECK(second.end_sum(b));
    CHECK(second.begin_sum(b));  // runs ahead while the first rank has not read round 0
    CHECK(first.end_sum(a));
    CHECK(a == Words{3});
    CHECK(first.begin_sum(a));
    CHECK(first.end_sum(a));
    CHECK(second.end_sum(b));
    CHECK(a == Words{6});
    CHECK(b == Words{6});
}

TEST_CASE("ranks that sum another number of words are told which ranks disagree with what") {
    ThreadGroup group(3, {.timeout = 30.0});
    const auto found = outcomes(group, [](const ThreadComm& comm) {
        Words words(5, 1);
        if (Status s = sum(comm, words); !s) return s;
        const Words before(comm.rank() == 1 ? 6 : 5, 7);
        words = before;
        const Status refused = sum(comm, words);
        CHECK(words == before);
        return refused;
    });
    for (std::size_t r = 0; r < 3; ++r) {
        CHECK(found[r].code() == Code::comm_mismatch);
        CHECK(found[r].message() == "steelyard: ThreadComm: collective 1 on rank " + std::to_string(r) +
                                        ": expected the same call on every rank, came ranks 0, 2: a sum of 5 int64; "
                                        "rank 1: a sum of 6 int64");
    }
}

TEST_CASE("ranks that differ in element type, kind or root are refused") {
    const auto refused = [](auto odd, auto even) {
        ThreadGroup group(2, {.timeout = 30.0});
        const auto found = outcomes(group, [&](const ThreadComm& comm) {
            return comm.rank() == 1 ? odd(comm) : even(comm);
        });
        CHECK(found[0].code() == Code::comm_mismatch);
        CHECK(found[1].code() == Code::comm_mismatch);
        return found[0].came();
    };
    const auto integers = [](const ThreadComm& comm) {
        Words words(4);
        return sum(comm, words);
    };
    const auto floats = [](const ThreadComm& comm) {
        std::vector<float> words(4);
        return sum(comm, words);
    };
    const auto barrier = [](const ThreadComm& comm) { return comm.barrier(); };
    const auto from = [](int root) {
        return [root](const ThreadComm& comm) {
            Words words(4);
            return comm.broadcast(std::span(words), root);
        };
    };
    CHECK(refused(integers, floats) == "rank 0: a sum of 4 float; rank 1: a sum of 4 int64");
    CHECK(refused(barrier, integers) == "rank 0: a sum of 4 int64; rank 1: a barrier");
    CHECK(refused(from(0), from(1)) ==
          "rank 0: a broadcast of 4 int64 from rank 1; rank 1: a broadcast of 4 int64 from rank 0");
}

TEST_CASE("a rank that makes fewer collectives ends the others by time, and the group stays refused") {
    ThreadGroup group(3, {.timeout = 1.0});
    const auto start = std::chrono::steady_clock::now();
    const auto found = outcomes(group, [](const ThreadComm& comm) {
        for (int n = 0; n < 4; ++n) {
            if (n == 3 && comm.rank() == 1) return Status();
            Words words{1};
            if (Status s = sum(comm, words); !s) return s;
        }
        return Status();
    });
    CHECK(seconds_since(start) < 10.0);
    CHECK(found[1].ok());
    CHECK(found[0].code() == Code::comm_timeout);
    CHECK(found[0].message() ==
          "steelyard: ThreadComm: collective 3 on rank 0: expected all 3 ranks within 1 s, came ranks 0, 2, without "
          "rank 1");
    CHECK(found[2].code() == Code::comm_timeout);

    // Whoever comes later is refused at once, the late rank too.
    const auto later = std::chrono::steady_clock::now();
    Words words{1};
    CHECK(group.comm(1).begin_sum(words).message() ==
          "steelyard: ThreadComm: collective 3 on rank 1: expected all 3 ranks within 1 s, came ranks 0, 2, without "
          "rank 1");
    CHECK(group.comm(0).begin_sum(words).message() ==
          "steelyard: ThreadComm: collective 4 on rank 0: expected all 3 ranks within 1 s, came ranks 0, 2, without "
          "rank 1 (in collective 3; the group stays refused)");
    CHECK(group.comm(0).end_sum(words).code() == Code::comm_timeout);
    CHECK(group.comm(2).barrier().code() == Code::comm_timeout);
    CHECK(seconds_since(later) < 1.0);
}

TEST_CASE("a rank that throws ends the others at once, and its exception comes out of run_ranks") {
    ThreadGroup group(4, {.timeout = 60.0});
    std::vector<Status> found(4);
    const auto start = std::chrono::steady_clock::now();
    const auto run = [&] {
        run_ranks(group, [&](const ThreadComm& comm) {
            Words words{1};
            steelyard::throw_if_refused(sum(comm, words));
            if (comm.rank() == 2) throw std::runtime_error("the disk is full");
            found[static_cast<std::size_t>(comm.rank())] = sum(comm, words);
        });
    };
    CHECK_THROWS_WITH_AS(run(), "the disk is full", std::runtime_error);
    CHECK(seconds_since(start) < 30.0);
    for (const std::size_t r : {0u, 1u, 3u}) {
        CHECK(found[r].code() == Code::comm_failure);
        CHECK(found[r].message() == "steelyard: ThreadComm: collective 1 on rank " + std::to_string(r) +
                                        ": expected every rank to take part, came an abort: rank 2: the disk is full");
    }
}

TEST_CASE("calls out of turn on one rank are refused and leave the sum under way whole") {
    ThreadGroup group(2);
    const ThreadComm comm = group.comm(0), other = group.comm(1);
    Words words{1, 2}, wrong{3, 4}, theirs{10, 20};
    CHECK(comm.end_sum(words).message() ==
          "steelyard: ThreadComm: end_sum on rank 0: expected a begin_sum before it, came end_sum alone");
    CHECK(comm.begin_sum(words));
    CHECK(comm.begin_sum(wrong).message() ==
          "steelyard: ThreadComm: the next call on rank 0: expected end_sum first, came another call while a sum of 2 "
          "int64 is under way");
    CHECK(comm.barrier().code() == Code::invalid_argument);
    CHECK(comm.end_sum(wrong).code() == Code::invalid_argument);
    CHECK(comm.end_sum(std::span(words).first(1)).code() == Code::invalid_argument);
    CHECK(other.begin_sum(theirs));
    CHECK(comm.end_sum(words));
    CHECK(other.end_sum(theirs));
    CHECK(words == Words{11, 22});
    CHECK(theirs == Words{11, 22});
}

TEST_CASE("two thread groups at the same time do not meet") {
    ThreadGroup data(2), experts(3);
    const auto work = [](ThreadGroup& group, std::int64_t value) {
        return outcomes(group, [&](const ThreadComm& comm) {
            for (int n = 0; n < 500; ++n) {
                Words words(9, value);
                if (Status s = sum(comm, words); !s) return s;
                if (words != Words(9, value * comm.size()))
                    return Status::refuse(Code::comm_failure, "test", "words", "this group's sum", "another");
            }
            return Status();
        });
    };
    std::vector<Status> first, second;
    {
        std::jthread one([&] { first = work(data, 3); });
        second = work(experts, 1000);
    }
    for (const Status& status : first) CHECK(status.message() == "ok");
    for (const Status& status : second) CHECK(status.message() == "ok");
}

TEST_CASE("sums, broadcasts and barriers within the reserve allocate nothing") {
    ThreadGroup group(3, {.timeout = 30.0, .reserve = 64});
    std::size_t before = 0, after = 0;
    run_ranks(group, [&](const ThreadComm& comm) {
        Words words(64, 1), all(64 * 3);
        std::vector<double> doubles(64, 1.0);
        bool fine = comm.barrier().ok();
        if (comm.rank() == 0) before = allocations();
        fine = fine && comm.barrier().ok();
        for (int n = 0; n < 100; ++n) {
            fine = fine && comm.begin_sum(words).ok() && comm.end_sum(words).ok();
            fine = fine && comm.begin_sum(doubles).ok() && comm.end_sum(doubles).ok();
            fine = fine && comm.broadcast(std::span(words), 1).ok();
            fine = fine && comm.all_gather(std::span<const std::int64_t>(words), std::span(all)).ok();
        }
        fine = fine && comm.barrier().ok();
        if (comm.rank() == 0) after = allocations();
        fine = fine && comm.barrier().ok();
        CHECK(fine);
    });
    CHECK(before != 0);
    CHECK(after == before);
}

TEST_CASE("a payload beyond the reserve is summed all the same") {
    ThreadGroup group(2, {.timeout = 30.0, .reserve = 0});
    run_ranks(group, [&](const ThreadComm& comm) {
        Words words(10000, comm.rank() + 1);
        CHECK(sum(comm, words));
        CHECK(words == Words(10000, 3));
    });
}

TEST_CASE("a group that cannot be is refused in one sentence") {
    CHECK_THROWS_WITH(ThreadGroup(0), "steelyard: ThreadComm: ranks: expected at least 1, came 0");
    CHECK_THROWS_WITH(ThreadGroup(2, {.timeout = 0.0}),
                      "steelyard: ThreadComm: timeout: expected more than 0 s, came 0.000000 s");
    ThreadGroup group(2);
    CHECK_THROWS_WITH((void)group.comm(2), "steelyard: ThreadComm: rank: expected in [0, 2), came 2");
    const std::vector<float> mine(2);
    std::vector<float> all(5);
    CHECK(group.comm(0).all_gather(std::span(mine), std::span(all)).message() ==
          "steelyard: ThreadComm: all: expected 4 words (2 ranks of 2), came 5");
    CHECK(group.comm(0).broadcast(std::span(all), -1).message() ==
          "steelyard: ThreadComm: root: expected a rank in [0, 2), came -1");
}
