#include <doctest/doctest.h>

#include <cstdint>
#include <span>

#include "steelyard/comm/concept.hpp"
#include "support/untouchable_comm.hpp"

namespace {

using steelyard::Status;
using Words = std::span<std::int64_t>;

struct Least {
    int rank() const { return 0; }
    int size() const { return 1; }
    Status begin_sum(Words) const { return {}; }
    Status end_sum(Words) const { return {}; }
};
struct WithoutRank {
    int size() const { return 1; }
    Status begin_sum(Words) const { return {}; }
    Status end_sum(Words) const { return {}; }
};
struct UnsignedSize : Least {
    unsigned size() const { return 1; }
};
struct SilentBegin : Least {
    void begin_sum(Words) const {}
};
struct NotConst : Least {
    Status end_sum(Words) { return {}; }
};
struct Int32Words : Least {
    Status begin_sum(std::span<std::int32_t>) const { return {}; }
};

}  // namespace

TEST_CASE("the four functions, and nothing else, make a CommBackend") {
    static_assert(steelyard::CommBackend<Least>);
    static_assert(!steelyard::CollectiveComm<Least>);
    static_assert(!steelyard::CommBackend<WithoutRank>);
    static_assert(!steelyard::CommBackend<UnsignedSize>);
    static_assert(!steelyard::CommBackend<SilentBegin>);
    static_assert(!steelyard::CommBackend<NotConst>);
    static_assert(!steelyard::CommBackend<Int32Words>);
    static_assert(!steelyard::CommBackend<int>);
}

TEST_CASE("a backend that does not link can be handed around as long as no sum is asked of it") {
    static_assert(steelyard::CommBackend<steelyard::testing::UntouchableComm>);
    const steelyard::testing::UntouchableComm comm;
    CHECK(comm.rank() == 0);
    CHECK(comm.size() == 2);
}
