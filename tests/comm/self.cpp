#include <doctest/doctest.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "steelyard/comm/laws.hpp"
#include "steelyard/comm/self.hpp"

using steelyard::SelfComm;

TEST_CASE("SelfComm is an empty type whose rank and size are constants") {
    static_assert(std::is_empty_v<SelfComm>);
    static_assert(std::is_trivially_copyable_v<SelfComm>);
    static_assert(SelfComm{}.rank() == 0);
    static_assert(SelfComm{}.size() == 1);
}

TEST_CASE("SelfComm leaves a sum as it is") {
    const SelfComm comm;
    std::vector<std::int64_t> words{3, -1, 4};
    CHECK(comm.begin_sum(words));
    CHECK(comm.end_sum(words));
    CHECK(words == std::vector<std::int64_t>{3, -1, 4});

    std::vector<double> values{0.5};
    CHECK(comm.begin_sum(values));
    CHECK(comm.end_sum(values));
    CHECK(comm.broadcast(std::span(values), 0));
    CHECK(comm.barrier());
    CHECK(values == std::vector<double>{0.5});
}

TEST_CASE("SelfComm gathers its own words and refuses a root or a size that cannot be") {
    const SelfComm comm;
    const std::vector<float> mine{1, 2};
    std::vector<float> all(2);
    CHECK(comm.all_gather(std::span(mine), std::span(all)));
    CHECK(all == mine);

    all.resize(3);
    CHECK(comm.all_gather(std::span(mine), std::span(all)).message() ==
          "steelyard: SelfComm: all: expected 2 words (1 ranks of 2), came 3");
    CHECK(comm.broadcast(std::span(all), 1).message() ==
          "steelyard: SelfComm: root: expected a rank in [0, 1), came 1");
}

TEST_CASE("SelfComm obeys the comm laws") {
    const auto alone = [](auto body) { return body(SelfComm{}); };
    CHECK(steelyard::check_comm_laws(alone, {.rounds = 3}).message() == "ok");
}
