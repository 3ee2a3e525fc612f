// MpiComm on the ranks of mpirun. Every rank runs the same test cases in the same order, each with groups of its own.
#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "steelyard/comm/laws.hpp"
#include "steelyard/comm/mpi.hpp"

namespace {

using steelyard::Code;
using steelyard::MpiComm;
using steelyard::Status;
using Words = std::vector<std::int64_t>;

template <class T>
Status sum(const MpiComm& comm, std::vector<T>& words) {
    if (Status s = comm.begin_sum(words); !s) return s;
    return comm.end_sum(words);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The text of a list of all ranks but `odd`: "ranks 0, 2, 3", or "rank 0".
std::string all_but(int odd, int size) {
    return steelyard::detail::comm::ranks_text(size, [&](int r) { return r != odd; });
}

}  // namespace

TEST_CASE("MPI ranks sum by hand") {
    const MpiComm comm(MPI_COMM_WORLD);
    const std::int64_t ranks = comm.size(), pairs = ranks * (ranks - 1) / 2;
    Words words{1, comm.rank(), -100 * comm.rank()};
    CHECK(sum(comm, words).message() == "ok");
    CHECK(words == Words{ranks, pairs, -100 * pairs});
}

TEST_CASE("many rounds of MPI sums of changing length are exact, below and above the reserve") {
    const MpiComm comm(MPI_COMM_WORLD, {.timeout = 60.0, .reserve = 600});
    const std::int64_t ranks = comm.size();
    for (int n = 0; n < 300; ++n) {
        Words words(static_cast<std::size_t>(n % 7 == 0 ? n * 17 : n % 67));
        for (std::size_t i = 0; i < words.size(); ++i)
            words[i] = (std::int64_t{1} << 55) + n + static_cast<std::int64_t>(i) * comm.rank();
        REQUIRE(sum(comm, words).message() == "ok");
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < words.size(); ++i)
            wrong += words[i] != ranks * ((std::int64_t{1} << 55) + n) +
                                     static_cast<std::int64_t>(i) * (ranks * (ranks - 1) / 2);
        CHECK(wrong == 0);
    }
}

TEST_CASE("an MPI sum takes the words as they were at begin_sum while the rank computes") {
    const MpiComm comm(MPI_COMM_WORLD);
    Words words(3000, 1);
    CHECK(comm.begin_sum(words));
    std::this_thread::sleep_for(std::chrono::milliseconds(5 * comm.rank()));
    CHECK(comm.end_sum(words));
    CHECK(words == Words(3000, comm.size()));
}

TEST_CASE("float and double sums over MPI are taken in rank order, in blocks") {
    const MpiComm comm(MPI_COMM_WORLD, {.timeout = 60.0, .reserve = 100});
    // In rank order (1 + 2^-24) + 2^-24 = 1 in float; any order that adds two small ones first gives more.
    std::vector<float> floats(5000, comm.rank() == 0 ? 1.0f : 0x1.0p-24f);
    CHECK(sum(comm, floats).message() == "ok");
    CHECK(floats == std::vector<float>(5000, 1.0f));
    std::vector<double> doubles(2000);
    for (std::size_t i = 0; i < doubles.size(); ++i) doubles[i] = static_cast<double>(i) * (comm.rank() + 1);
    CHECK(sum(comm, doubles).message() == "ok");
    const double weights = comm.size() * (comm.size() + 1) / 2.0;
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < doubles.size(); ++i) wrong += doubles[i] != static_cast<double>(i) * weights;
    CHECK(wrong == 0);
}

TEST_CASE("broadcast, all_gather and barrier move words between MPI ranks") {
    const MpiComm comm(MPI_COMM_WORLD, {.timeout = 60.0, .reserve = 100});
    for (int round = 0; round < 2 * comm.size(); ++round) {
        const int root = round % comm.size();
        std::vector<double> words(1500, comm.rank() + 0.5);
        CHECK(comm.broadcast(std::span(words), root).message() == "ok");
        CHECK(words == std::vector<double>(1500, root + 0.5));

        const Words mine(1500, comm.rank());
        Words all(mine.size() * static_cast<std::size_t>(comm.size()), -1), expected;
        for (int r = 0; r < comm.size(); ++r) expected.insert(expected.end(), mine.size(), r);
        CHECK(comm.all_gather(std::span(mine), std::span(all)).message() == "ok");
        CHECK(all == expected);
        CHECK(comm.barrier().message() == "ok");
    }
}

TEST_CASE("two MPI groups do not meet") {
    const MpiComm data(MPI_COMM_WORLD), experts(MPI_COMM_WORLD);
    Words a{1}, b{100, 100};
    // Begun in one order and ended in another, and on each rank in an order of its own.
    CHECK((data.rank() % 2 == 0 ? data.begin_sum(a) : experts.begin_sum(b)));
    CHECK((data.rank() % 2 == 0 ? experts.begin_sum(b) : data.begin_sum(a)));
    CHECK(experts.end_sum(b));
    CHECK(data.end_sum(a));
    CHECK(a == Words{data.size()});
    CHECK(b == Words(2, 100 * data.size()));
}

TEST_CASE("MPI ranks that sum another number of words are told which ranks disagree with what") {
    for (const std::size_t longer : {std::size_t{6}, std::size_t{5000}}) {
        const MpiComm comm(MPI_COMM_WORLD, {.timeout = 30.0});
        const int odd = comm.size() - 1;
        if (odd == 0) return;
        const auto start = std::chrono::steady_clock::now();
        Words words(5, 1);
        REQUIRE(sum(comm, words).message() == "ok");
        const Words before(comm.rank() == odd ? longer : 5, 7);
        words = before;
        const Status refused = sum(comm, words);
        CHECK(words == before);
        CHECK(refused.code() == Code::comm_mismatch);
        CHECK(refused.message() == "steelyard: MpiComm: collective 1 on rank " + std::to_string(comm.rank()) +
                                       ": expected the same call on every rank, came " + all_but(odd, comm.size()) +
                                       ": a sum of 5 int64; rank " + std::to_string(odd) + ": a sum of " +
                                       std::to_string(longer) + " int64");
        CHECK(comm.begin_sum(words).code() == Code::comm_mismatch);
        CHECK(comm.end_sum(words).message().find("the group stays refused") != std::string::npos);
        CHECK(comm.barrier().code() == Code::comm_mismatch);
        CHECK(seconds_since(start) < 20.0);
    }
}

TEST_CASE("MPI ranks that differ in element type, kind or root are refused") {
    const auto calls = [](int which, const MpiComm& comm) -> Status {
        Words words(4);
        std::vector<float> floats(4);
        switch (which) {
            case 0: return sum(comm, words);
            case 1: return sum(comm, floats);
            case 2: return comm.barrier();
            case 3: return comm.broadcast(std::span(words), 0);
            case 4: return comm.broadcast(std::span(words), 1);
            default: return comm.all_gather(std::span<const float>(floats).first(1), std::span(floats));
        }
    };
    for (const auto& [odd, even] : {std::pair{0, 1}, {1, 0}, {2, 0}, {3, 4}, {5, 0}}) {
        const MpiComm comm(MPI_COMM_WORLD, {.timeout = 30.0});
        if (comm.size() != 4) return;
        const Status refused = calls(comm.rank() == 2 ? odd : even, comm);
        CHECK(refused.code() == Code::comm_mismatch);
    }
}

TEST_CASE("an MPI rank that makes fewer collectives ends the others by time") {
    auto comm = std::make_unique<MpiComm>(MPI_COMM_WORLD, steelyard::MpiCommOptions{.timeout = 1.0});
    const int rank = comm->rank(), size = comm->size(), odd = size - 1;
    if (size == 1) return;
    const auto start = std::chrono::steady_clock::now();
    for (int n = 0; n < 3; ++n) {
        Words words{n};
        REQUIRE(sum(*comm, words).message() == "ok");
    }
    if (rank != odd) {
        Words words{1};
        const Status refused = sum(*comm, words);
        CHECK(refused.code() == Code::comm_timeout);
        CHECK(refused.message() == "steelyard: MpiComm: collective 3 on rank " + std::to_string(rank) +
                                       ": expected all " + std::to_string(size) + " ranks within 1 s, came " +
                                       all_but(odd, size) + ", without rank " + std::to_string(odd));
        CHECK(words == Words{1});
    }
    comm.reset();  // must not wait, neither on the ranks that were refused nor on the one that never came
    CHECK(seconds_since(start) < 10.0);
}

TEST_CASE("an MPI rank that comes too late is refused at once") {
    const MpiComm comm(MPI_COMM_WORLD, {.timeout = 0.5});
    const int odd = 0;
    if (comm.size() == 1) return;
    Words words(2000, 1);
    if (comm.rank() == odd) std::this_thread::sleep_for(std::chrono::milliseconds(3000));
    const auto start = std::chrono::steady_clock::now();
    const Status refused = sum(comm, words);
    CHECK(refused.code() == Code::comm_timeout);
    CHECK(refused.came().find("without rank 0") != std::string::npos);
    if (comm.rank() == odd) CHECK(seconds_since(start) < 2.0);
}

TEST_CASE("an MPI rank that aborts ends the others at once with its reason") {
    const MpiComm comm(MPI_COMM_WORLD, {.timeout = 60.0});
    if (comm.size() == 1) return;
    const auto start = std::chrono::steady_clock::now();
    Words words{1};
    if (comm.rank() == 1) {
        comm.abort("the disk is full");
        CHECK(comm.begin_sum(words).code() == Code::comm_failure);
    } else {
        Status refused = sum(comm, words);
        CHECK(refused.code() == Code::comm_failure);
        CHECK(refused.message() == "steelyard: MpiComm: collective 0 on rank " + std::to_string(comm.rank()) +
                                       ": expected every rank to take part, came an abort: rank 1: the disk is full");
    }
    CHECK(seconds_since(start) < 30.0);
}

TEST_CASE("calls out of turn on one MPI rank are refused and leave the sum under way whole") {
    const MpiComm comm(MPI_COMM_WORLD);
    Words words{1, 2}, wrong{3, 4};
    CHECK(comm.end_sum(words).code() == Code::invalid_argument);
    CHECK(comm.begin_sum(words));
    CHECK(comm.begin_sum(wrong).code() == Code::invalid_argument);
    CHECK(comm.barrier().code() == Code::invalid_argument);
    CHECK(comm.end_sum(wrong).code() == Code::invalid_argument);
    CHECK(comm.end_sum(words));
    CHECK(words == Words{comm.size(), 2 * comm.size()});
}

TEST_CASE("a sum that is begun and never ended does not hold up the destructor") {
    const auto start = std::chrono::steady_clock::now();
    {
        const MpiComm comm(MPI_COMM_WORLD);
        Words words(3000, 1);
        if (comm.rank() == 0) CHECK(comm.begin_sum(words));
    }
    CHECK(seconds_since(start) < 10.0);
}

TEST_CASE("MpiComm obeys the comm laws") {
    const auto with_group = [](auto body) { return body(MpiComm(MPI_COMM_WORLD, {.timeout = 2.0, .reserve = 1000})); };
    CHECK(steelyard::check_comm_laws(with_group, {.refused_within = 15.0, .rounds = 100}).message() == "ok");
}

TEST_CASE("an MPI group that cannot be is refused in one sentence") {
    CHECK_THROWS_WITH((void)MpiComm(MPI_COMM_WORLD, {.timeout = -1.0}),
                      "steelyard: MpiComm: timeout: expected more than 0 s, came -1.000000 s");
    int rank = 0, size = 1;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size == 1) return;
    const std::size_t reserve = rank == 0 ? 10 : 20;
    CHECK_THROWS_WITH((void)MpiComm(MPI_COMM_WORLD, {.timeout = 1.0, .reserve = reserve}),
                      ("steelyard: MpiComm: reserve: expected the same on every rank, came " + std::to_string(reserve) +
                       " on rank " + std::to_string(rank)).c_str());
}
