#include <doctest/doctest.h>

#include <array>
#include <vector>

#include "steelyard/concepts.hpp"
#include "steelyard/interop/eigen.hpp"
#include "steelyard/interop/mdspan.hpp"
#include "steelyard/interop/span.hpp"

using namespace steelyard;

namespace {

/// As much of an mdspan as an adapter may ask for: three columns of four-wide rows.
struct Padded {
    using element_type = double;
    double* first;
    static constexpr std::size_t rank() { return 2; }
    [[nodiscard]] std::size_t extent(std::size_t r) const { return r == 0 ? 2 : 3; }
    [[nodiscard]] std::size_t stride(std::size_t r) const { return r == 0 ? 4 : 1; }
    [[nodiscard]] double* data_handle() const { return first; }
};

}  // namespace

TEST_CASE("a span becomes a dense view, and a wrong size is refused") {
    std::vector<float> memory{0, 1, 2, 3, 4, 5};
    const auto x = as_view(std::span(memory), 2, 3);  // [2, 3]
    CHECK(x(1, 2) == 5.0f);
    x(0, 1) = 7.0f;
    CHECK(memory[1] == 7.0f);
    CHECK_THROWS_WITH_AS(static_cast<void>(as_view(std::span(memory), 2, 2)),
                         "steelyard: as_view: span: expected 4 elements, came 6", Error);
}

TEST_CASE("an mdspan-like tensor keeps its strides") {
    std::array<double, 8> memory{0, 1, 2, -1, 4, 5, 6, -1};
    const auto x = as_view(Padded{memory.data()});  // [2, 3]
    CHECK(x(1, 0) == 4.0);
    CHECK(x.contiguous_rows());
    CHECK_FALSE(x.dense());
}

TEST_CASE("Eigen matrices and views share their elements both ways") {
    Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> m(2, 3);
    m << 0, 1, 2, 3, 4, 5;
    const auto x = as_view(m);  // [2, 3]
    x(1, 1) = 9;
    CHECK(m(1, 1) == 9);
    const auto& fixed = m;
    static_assert(std::is_const_v<std::remove_reference_t<decltype(as_view(fixed)(0, 0))>>);
    const auto block = as_view(Eigen::Ref<const decltype(m), 0, Eigen::OuterStride<>>(m.rightCols(2)));  // [2, 2]
    CHECK(block(1, 0) == 9);
    CHECK(block.strides[0] == 3);
    CHECK(as_eigen(x.slice(1, 2)).sum() == doctest::Approx(3 + 9 + 5));
}
