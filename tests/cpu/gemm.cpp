#include "steelyard/cpu/gemm.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/instruction_sets.hpp"
#include "steelyard/core/random.hpp"

using namespace steelyard;
using testing::instruction_sets;

namespace {

enum class Form { nt, nn, tn };
constexpr Form forms[] = {Form::nt, Form::nn, Form::tn};

template <class T>
void product(Form form, view<const T, 2> a, view<const T, 2> b, view<T, 2> c, Write write, std::byte* scratch,
             Isa isa) {
    if (form == Form::nt) cpu::gemm_nt<T>(a, b, c, write, scratch, isa);
    if (form == Form::nn) cpu::gemm_nn<T>(a, b, c, write, scratch, isa);
    if (form == Form::tn) cpu::gemm_tn<T>(a, b, c, write, scratch, isa);
}

/// A matrix with padded rows that starts `shift` elements into its buffer; everything else is NaN.
template <class T>
struct Matrix {
    std::vector<T> buffer;
    view<T, 2> v;

    Matrix(index_t rows, index_t columns, index_t padding = 0, index_t shift = 0)
        : buffer(static_cast<std::size_t>((rows + 1) * (columns + padding) + shift),
                 std::numeric_limits<T>::quiet_NaN()) {
        v.data = buffer.data() + shift;
        v.extents[0] = rows, v.extents[1] = columns;
        v.strides[0] = columns + padding, v.strides[1] = 1;
    }
    Matrix(const Matrix&) = delete;

    template <class F>
    void fill(F&& value) {
        for (index_t i = 0; i < v.extents[0]; ++i)
            for (index_t j = 0; j < v.extents[1]; ++j) v(i, j) = static_cast<T>(value(i * v.extents[1] + j));
    }
    void integers(std::uint64_t seed) {
        const Philox random(seed, Stream::user);
        fill([&](index_t at) { return double(random.below(static_cast<std::uint64_t>(at), 7)) - 3; });
    }
    void normals(std::uint64_t seed) {
        const Philox random(seed, Stream::user);
        fill([&](index_t at) { return random.normal(static_cast<std::uint64_t>(at)); });
    }
    bool padding_is_untouched() const {
        for (index_t i = 0; i < v.extents[0]; ++i)
            for (index_t j = v.extents[1]; j < v.strides[0]; ++j)
                if (!std::isnan(v.data[i * v.strides[0] + j])) return false;
        return true;
    }
};

template <class T>
std::vector<std::byte> scratch() {
    return std::vector<std::byte>(static_cast<std::size_t>(cpu::gemm_scratch_bytes<T>()), std::byte{0xFF});
}

template <class T>
bool same_bits(view<T, 2> x, view<T, 2> y) {
    if (x.size() == 0) return true;
    for (index_t i = 0; i < x.extents[0]; ++i)
        if (std::memcmp(&x(i, 0), &y(i, 0), static_cast<std::size_t>(x.extents[1]) * sizeof(T)) != 0) return false;
    return true;
}

index_t a_rows(Form f, index_t m, index_t k) { return f == Form::tn ? k : m; }
index_t a_columns(Form f, index_t m, index_t k) { return f == Form::tn ? m : k; }
index_t b_rows(Form f, index_t n, index_t k) { return f == Form::nt ? n : k; }
index_t b_columns(Form f, index_t n, index_t k) { return f == Form::nt ? k : n; }

/// Whether the kernels round a product and its addition once: where the instruction set can, and the compiler
/// optimises.
template <class T>
bool fused(Isa isa) {
    Matrix<T> a(1, 2), b(2, 1), c(1, 1);
    const T x = 1 + std::numeric_limits<T>::epsilon(), square = x * x;  // which is rounded
    a.v(0, 0) = -square, b.v(0, 0) = 1, a.v(0, 1) = b.v(1, 0) = x;
    cpu::gemm_nn<T>(a.v, b.v, c.v, Write::assign, scratch<T>().data(), isa);
    return c.v(0, 0) != 0;
}

/// c[i][j] = (c[i][j] or 0), then a[i][p] b[p][j] added by ascending p.
template <class T>
void chains(const Matrix<T>& a, const Matrix<T>& b, Write write, bool once, Matrix<T>& c) {
    for (index_t i = 0; i < c.v.extents[0]; ++i)
        for (index_t j = 0; j < c.v.extents[1]; ++j) {
            T sum = write == Write::add ? c.v(i, j) : T(0);
            if (once)
                for (index_t p = 0; p < a.v.extents[1]; ++p) sum = std::fma(a.v(i, p), b.v(p, j), sum);
            else
                for (index_t p = 0; p < a.v.extents[1]; ++p) {
                    const volatile T product = a.v(i, p) * b.v(p, j);  // no compiler shall fuse it
                    sum += product;
                }
            c.v(i, j) = sum;
        }
}

struct Sizes {
    index_t m, n, k;
};

/// Rows and columns on either side of tiles and panels, and depths on either side of the blocks.
std::vector<Sizes> awkward_sizes() {
    const index_t all_m[] = {0, 1, 2, 3, 4, 5, 11, 12, 13, 25, 64, 257};
    const index_t all_n[] = {0, 1, 3, 15, 16, 17, 31, 33, 48, 65, 130, 513};
    const index_t all_k[] = {0, 1, 2, 31, 96, 257, 520, 1030, 2049, 2600};
    std::vector<Sizes> sizes;
    std::size_t turn = 0;
    for (const index_t m : all_m)
        for (const index_t n : all_n) {
            if (testing::few_sizes && (m > 13 || n > 65)) continue;
            index_t k = all_k[turn++ % 10];
            while (m * n * k > (testing::few_sizes ? 20000 : 400000)) k = all_k[turn++ % 10];
            sizes.push_back({m, n, k});
        }
    for (const index_t k : {512, 513, 2048, 2600}) {
        sizes.push_back({1, 33, k});
        if (!testing::few_sizes) sizes.push_back({13, 130, k});
    }
    return sizes;
}

}  // namespace

TEST_CASE_TEMPLATE("an element of a product is one chain of multiply-adds, to the bit, on every instruction set", T,
                   float, double) {
    auto work = scratch<T>();
    for (const Sizes& size : awkward_sizes())
        for (const Write write : {Write::assign, Write::add}) {
            const index_t m = size.m, n = size.n, k = size.k;
            Matrix<T> a(m, k), b(k, n), start(m, n);
            a.normals(1), b.normals(2), start.normals(3);
            std::optional<Matrix<T>> expected[2];
            for (const Isa isa : instruction_sets()) {
                const bool once = fused<T>(isa);
                auto& wanted = expected[once];
                if (!wanted) {
                    wanted.emplace(m, n);
                    wanted->normals(3);
                    chains(a, b, write, once, *wanted);
                }
                for (const Form form : forms) {
                    CAPTURE(name_of(isa));
                    CAPTURE(static_cast<int>(form));
                    CAPTURE(static_cast<int>(write));
                    CAPTURE(m);
                    CAPTURE(n);
                    CAPTURE(k);
                    Matrix<T> left(a_rows(form, m, k), a_columns(form, m, k), 3, 1);
                    Matrix<T> right(b_rows(form, n, k), b_columns(form, n, k), 5, 3);
                    Matrix<T> c(m, n, 2, 5);
                    for (index_t p = 0; p < k; ++p) {
                        for (index_t i = 0; i < m; ++i) (form == Form::tn ? left.v(p, i) : left.v(i, p)) = a.v(i, p);
                        for (index_t j = 0; j < n; ++j) (form == Form::nt ? right.v(j, p) : right.v(p, j)) = b.v(p, j);
                    }
                    if (write == Write::add) c.normals(3);
                    product<T>(form, left.v, right.v, c.v, write, work.data(), isa);
                    REQUIRE(same_bits(c.v, wanted->v));
                    REQUIRE(c.padding_is_untouched());
                }
            }
        }
}

TEST_CASE_TEMPLATE("the alignment of operands and scratch does not change a bit", T, float, double) {
    const index_t m = 45, n = 101, k = 530;
    std::vector<std::byte> work(static_cast<std::size_t>(cpu::gemm_scratch_bytes<T>()) + 8);
    for (const Isa isa : instruction_sets())
        for (const Form form : forms) {
            CAPTURE(name_of(isa));
            Matrix<T> reference(m, n);
            for (const index_t shift : {0, 1, 3, 5}) {
                Matrix<T> a(a_rows(form, m, k), a_columns(form, m, k), shift, shift);
                Matrix<T> b(b_rows(form, n, k), b_columns(form, n, k), 2 * shift, shift + 1);
                Matrix<T> c(m, n, shift, shift);
                a.normals(1), b.normals(2);
                product<T>(form, a.v, b.v, shift == 0 ? reference.v : c.v, Write::assign, work.data() + shift, isa);
                if (shift != 0) CHECK(same_bits(c.v, reference.v));
            }
        }
}

TEST_CASE_TEMPLATE("an element does not depend on the rows and columns computed beside it", T, float, double) {
    const index_t m = 61, n = 211, k = 700;
    auto work = scratch<T>();
    const auto part = [](view<T, 2> from, index_t row, index_t rows, index_t column, index_t columns) {
        view<T, 2> sub = from.slice(row, row + rows);
        sub.data += column, sub.extents[1] = columns;
        return sub;
    };
    for (const Isa isa : instruction_sets())
        for (const Form form : forms) {
            CAPTURE(name_of(isa));
            CAPTURE(static_cast<int>(form));
            Matrix<T> a(a_rows(form, m, k), a_columns(form, m, k)), b(b_rows(form, n, k), b_columns(form, n, k));
            Matrix<T> whole(m, n);
            a.normals(1), b.normals(2);
            product<T>(form, a.v, b.v, whole.v, Write::assign, work.data(), isa);
            for (const index_t rows : {1, 2, 8, 13})
                for (const index_t columns : {1, 3, 16, 40, 64}) {
                    CAPTURE(rows);
                    CAPTURE(columns);
                    const index_t i = 29, j = 97;
                    Matrix<T> c(rows, columns);
                    product<T>(form, form == Form::tn ? part(a.v, 0, k, i, rows) : part(a.v, i, rows, 0, k),
                               form == Form::nt ? part(b.v, j, columns, 0, k) : part(b.v, 0, k, j, columns), c.v,
                               Write::assign, work.data(), isa);
                    CHECK(same_bits(c.v, part(whole.v, i, rows, j, columns)));
                }
        }
}

TEST_CASE("an infinity or a NaN stays in its own row and column") {
    const index_t m = 9, n = 50, k = 5;
    auto work = scratch<float>();
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        Matrix<float> a(m, k), b(k, n), c(m, n);
        a.integers(1), b.integers(2);
        a.v(8, 0) = std::numeric_limits<float>::infinity();
        b.v(1, 49) = std::numeric_limits<float>::quiet_NaN();
        cpu::gemm_nn<float>(a.v, b.v, c.v, Write::assign, work.data(), isa);
        for (index_t i = 0; i < m - 1; ++i)
            for (index_t j = 0; j < n - 1; ++j) CHECK(c.v(i, j) - c.v(i, j) == 0.0f);
        CHECK(c.v(0, 49) != c.v(0, 49));
    }
}
