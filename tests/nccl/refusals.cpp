// What NcclComm refuses before it asks for a GPU.
#include <doctest/doctest.h>

#include <type_traits>

#include "steelyard/comm/nccl.hpp"

using steelyard::NcclComm;
using steelyard::NcclCommOptions;

TEST_CASE("NcclComm is a comm backend whose sums stand in a stream, and sums no floats") {
    static_assert(steelyard::CommBackend<NcclComm>);
    static_assert(!steelyard::CollectiveComm<NcclComm>);
    static_assert(NcclComm::stream_ordered);
    static_assert(std::is_nothrow_copy_constructible_v<NcclComm>);
}

TEST_CASE("the NCCL that runs is of the major version that was compiled against") {
    int version = 0;
    CHECK(ncclGetVersion(&version) == ncclSuccess);
    CHECK(version / 10000 == NCCL_MAJOR);
}

TEST_CASE("NcclComm refuses options that cannot work, and a null communicator") {
    const auto make = [](NcclCommOptions options) { (void)NcclComm(nullptr, nullptr, options); };
    CHECK_THROWS_WITH(make({.timeout = -1.0}),
                      "steelyard: NcclComm: timeout: expected more than 0 s, came -1.000000 s");
    CHECK_THROWS_WITH(make({.reserve = 0}), "steelyard: NcclComm: reserve: expected 1 to 1048576 words, came 0");
    CHECK_THROWS_WITH(make({.reserve = (1u << 20) + 1}),
                      "steelyard: NcclComm: reserve: expected 1 to 1048576 words, came 1048577");
    CHECK_THROWS_WITH(make({}), "steelyard: NcclComm: communicator: expected an ncclComm_t, came a null pointer");
    try {
        make({});
    } catch (const steelyard::Error& error) {
        CHECK(error.status().code() == steelyard::Code::invalid_argument);
    }
}
