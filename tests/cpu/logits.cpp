// Dot products of rows with rows: the router's logits.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/instruction_sets.hpp"
#include "router/routing_case.hpp"

using namespace steelyard;
using reference::Matrix;
using testing::instruction_sets;
using ops = router_ops<Cpu>;

namespace {

constexpr index_t tokens = 65;

/// Tokens and experts with NaN between their rows.
template <class T>
struct Rows {
    Matrix<T> x, weight;

    Rows(index_t width, index_t experts)
        : x(tokens, width, std::numeric_limits<T>::quiet_NaN(), 3),
          weight(experts, width, std::numeric_limits<T>::quiet_NaN(), 5) {
        std::mt19937 random(static_cast<unsigned>(width * 131 + experts));
        std::normal_distribution<double> normal;
        for (Matrix<T>* m : {&x, &weight})
            for (index_t i = 0; i < m->rows; ++i)
                for (index_t j = 0; j < width; ++j) (*m)(i, j) = static_cast<T>(normal(random));
    }
    [[nodiscard]] Matrix<T> logits(index_t begin, index_t end, Cpu device) const {
        Matrix<T> out(end - begin, weight.rows, T(-99), 2);
        const Bytes scratch(
            ops::scratch_bytes<T>(device, {.tokens = end - begin, .width = x.columns, .experts = weight.rows}));
        ops::logits<T>(device, x.get().slice(begin, end), weight.get(), RouterNoise{}, out.mutable_view(),
                       scratch.data());
        CHECK(out.padding_is(T(-99)));
        CHECK(out.data.back() == T(-99));
        return out;
    }
};

template <class T>
bool same_rows(const Matrix<T>& some, const Matrix<T>& all, index_t begin) {
    for (index_t t = 0; t < some.rows; ++t)
        if (std::memcmp(&some(t, 0), &all(begin + t, 0), static_cast<std::size_t>(all.columns) * sizeof(T)) != 0)
            return false;
    return true;
}

}  // namespace

TEST_CASE_TEMPLATE("Logits agree with sums in double, and their bits are those of two rows alone", T, float, double) {
    for (const index_t width : {1, 3, 15, 16, 17, 33, 513, 2049})
        for (const index_t experts : {1, 3, 8, 17, 64, 65}) {
            if (testing::few_sizes && width * experts > 20000) continue;
            const Rows<T> rows(width, experts);
            Matrix<double> want(tokens, experts, 0.0), size(tokens, experts, 0.0);
            for (index_t t = 0; t < tokens; ++t)
                for (index_t e = 0; e < experts; ++e)
                    for (index_t j = 0; j < width; ++j) {
                        const double term = static_cast<double>(rows.x(t, j)) * static_cast<double>(rows.weight(e, j));
                        want(t, e) += term;
                        size(t, e) += std::abs(term);
                    }
            for (const Isa isa : instruction_sets()) {
                CAPTURE(name_of(isa));
                CAPTURE(width);
                CAPTURE(experts);
                const Matrix<T> all = rows.logits(0, tokens, {1, isa});
                // Of float a lane adds one term in four at least; of double the reference errs as well.
                const double unit = static_cast<double>(std::numeric_limits<T>::epsilon()) *
                                    (sizeof(T) == 4 ? 4.0 + std::sqrt(static_cast<double>(width)) : 4.0 + width);
                for (index_t t = 0; t < tokens; ++t)
                    for (index_t e = 0; e < experts; ++e)
                        REQUIRE(std::abs(static_cast<double>(all(t, e)) - want(t, e)) <= unit * size(t, e));
                for (const index_t count : {0, 1, 2, 5, 16, 17}) {
                    CAPTURE(count);
                    REQUIRE(same_rows(rows.logits(0, count, {1, isa}), all, 0));
                    REQUIRE(same_rows(rows.logits(tokens - count, tokens, {1, isa}), all, tokens - count));
                    REQUIRE(same_rows(rows.logits(7, 7 + count, {3, isa}), all, 7));
                }
                for (const int threads : {2, 3, 7}) REQUIRE(same_rows(rows.logits(0, tokens, {threads, isa}), all, 0));
            }
        }
}

TEST_CASE_TEMPLATE("An expert's logits do not depend on the others", T, float, double) {
    const Rows<T> rows(2049, 67);
    for (const Isa isa : instruction_sets()) {
        const Matrix<T> all = rows.logits(0, tokens, {1, isa});
        for (const index_t first : {0, 1, 4, 30, 66})
            for (const index_t count : {1, 2, 7}) {
                Rows<T> some(2049, std::min<index_t>(count, 67 - first));
                some.x = rows.x;
                for (index_t e = 0; e < some.weight.rows; ++e)
                    std::memcpy(&some.weight(e, 0), &rows.weight(first + e, 0), 2049 * sizeof(T));
                for (const index_t end : {index_t{1}, tokens}) {
                    const Matrix<T> got = some.logits(0, end, {1, isa});
                    for (index_t t = 0; t < end; ++t)
                        REQUIRE(std::memcmp(&got(t, 0), &all(t, first),
                                            static_cast<std::size_t>(some.weight.rows) * sizeof(T)) == 0);
                }
            }
    }
}

TEST_CASE("Logits of no inputs are zeros") {
    for (const Isa isa : instruction_sets()) {
        const Matrix<float> out = Rows<float>(0, 9).logits(0, tokens, {2, isa});
        for (index_t t = 0; t < tokens; ++t)
            for (index_t e = 0; e < 9; ++e) REQUIRE(out(t, e) == 0.0f);
    }
}
