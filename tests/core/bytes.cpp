#include <doctest/doctest.h>

#include <cstddef>
#include <span>
#include <utility>

#include "steelyard/core/bytes.hpp"

using namespace steelyard;

TEST_CASE("an owned block is aligned, zeroed and of the size asked for") {
    for (const index_t size : {1, 64, 1000}) {
        const Bytes bytes(size);
        CHECK(bytes.size() == size);
        CHECK(is_aligned(bytes.data()));
        bool zero = true;
        for (const std::byte b : bytes.span()) zero = zero && b == std::byte{0};
        CHECK(zero);
        CHECK(check_block("layer", "context", bytes.span(), size).ok());
    }
}

TEST_CASE("an owned block of nothing is empty") {
    CHECK(Bytes().size() == 0);
    CHECK(Bytes().span().empty());
    CHECK(Bytes(0).span().empty());
}

TEST_CASE("a moved block keeps its memory") {
    Bytes bytes(16);
    std::byte* const data = bytes.data();
    data[3] = std::byte{7};
    const Bytes moved = std::move(bytes);
    CHECK(moved.data() == data);
    CHECK(moved.size() == 16);
    CHECK(moved.span()[3] == std::byte{7});
}
