#include <doctest/doctest.h>

#include <numeric>
#include <type_traits>
#include <vector>

#include "steelyard/core/view.hpp"

using namespace steelyard;

namespace {

std::vector<int> counting(int n) {
    std::vector<int> memory(static_cast<std::size_t>(n));
    std::iota(memory.begin(), memory.end(), 0);
    return memory;
}

/// Two rows of three in memory of four a row: a padded matrix.
view<int, 2> padded(int* memory) {
    view<int, 2> v(memory, 2, 3);
    v.strides[0] = 4;
    return v;
}

}  // namespace

TEST_CASE("a view is trivially copyable, as large as what it holds, and absent until given memory") {
    static_assert(std::is_trivially_copyable_v<view<float, 3>>);
    static_assert(sizeof(view<float, 2>) == sizeof(float*) + 4 * sizeof(index_t));
    const view<float, 2> v;
    CHECK_FALSE(v.present());
    CHECK(v.size() == 0);
}

TEST_CASE("a view made of extents is dense and row-major") {
    auto memory = counting(24);
    const view<int, 3> v(memory.data(), 2, 3, 4);
    CHECK(v.present());
    CHECK(v.dense());
    CHECK(v.contiguous_rows());
    CHECK(v.size() == 24);
    CHECK(v.strides[0] == 12);
    CHECK(v.strides[1] == 4);
    CHECK(v.strides[2] == 1);
    CHECK(v(0, 0, 0) == 0);
    CHECK(v(1, 2, 3) == 23);
    CHECK(v(1, 0, 2) == 14);
}

TEST_CASE("an element is the caller's own memory") {
    auto memory = counting(6);
    const view<int, 2> v(memory.data(), 2, 3);
    v(1, 1) = 40;
    CHECK(memory[4] == 40);
    v[1](2) = 50;
    CHECK(memory[5] == 50);
}

TEST_CASE("a padded view reads past the padding and is not dense") {
    auto memory = counting(8);
    const auto v = padded(memory.data());
    CHECK(v(0, 2) == 2);
    CHECK(v(1, 0) == 4);
    CHECK(v.size() == 6);
    CHECK_FALSE(v.dense());
    CHECK(v.contiguous_rows());
}

TEST_CASE("a row keeps the strides of its matrix") {
    auto memory = counting(24);
    view<int, 3> v(memory.data(), 2, 2, 3);
    v.strides[0] = 12;
    v.strides[1] = 4;
    const view<int, 2> second = v[1];
    CHECK(second(0, 0) == 12);
    CHECK(second(1, 2) == 18);
    CHECK(second.extents[0] == 2);
    CHECK(second.extents[1] == 3);
    CHECK(second.strides[0] == 4);
    CHECK(second[1][2] == 18);
}

TEST_CASE("a slice is the rows from begin to end, and may be empty") {
    auto memory = counting(8);
    const auto v = padded(memory.data());
    const auto last = v.slice(1, 2);
    CHECK(last.extents[0] == 1);
    CHECK(last.extents[1] == 3);
    CHECK(last(0, 0) == 4);
    CHECK(v.slice(1, 1).size() == 0);
    CHECK(v.slice(0, 2)(1, 2) == v(1, 2));
}

TEST_CASE("rows are contiguous unless the last stride is more than one and there is more than one column") {
    auto memory = counting(8);
    view<int, 2> transposed(memory.data(), 3, 2);
    transposed.strides[0] = 1;
    transposed.strides[1] = 3;
    CHECK_FALSE(transposed.contiguous_rows());
    CHECK_FALSE(transposed.dense());
    view<int, 2> column(memory.data(), 3, 1);
    column.strides[1] = 100;
    CHECK(column.contiguous_rows());
    CHECK(column.dense());
}

TEST_CASE("a mutable view becomes its read-only twin, never the other way, and never of another space or rank") {
    auto memory = counting(8);
    const view<const int, 2> twin = padded(memory.data());
    CHECK(twin.data == memory.data());
    CHECK(twin.strides[0] == 4);
    CHECK(twin(1, 2) == 6);

    static_assert(std::is_convertible_v<view<int, 2>, view<const int, 2>>);
    static_assert(!std::is_convertible_v<view<const int, 2>, view<int, 2>>);
    static_assert(!std::is_convertible_v<view<int, 2>, view<const int, 1>>);
    static_assert(!std::is_convertible_v<view<int, 2, CudaSpace>, view<int, 2>>);
    static_assert(!std::is_convertible_v<view<int, 2, CudaSpace>, view<const int, 2, HostSpace>>);
    static_assert(!std::is_convertible_v<view<float, 1>, view<double, 1>>);
}

TEST_CASE("a view takes as many extents and indices as it has dimensions") {
    static_assert(std::is_constructible_v<view<int, 2>, int*, int, index_t>);
    static_assert(!std::is_constructible_v<view<int, 2>, int*, int>);
    static_assert(!std::is_constructible_v<view<int, 2>, int*, int, int, int>);
    static_assert(std::is_invocable_v<view<int, 2>, int, int>);
    static_assert(!std::is_invocable_v<view<int, 2>, int>);
}

TEST_CASE("a view works in a constant expression") {
    constexpr int sum = [] {
        int memory[4] = {1, 2, 3, 4};
        const view<int, 2> v(memory, 2, 2);
        return v(0, 1) + v[1](0);
    }();
    CHECK(sum == 5);
}
