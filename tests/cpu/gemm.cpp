#include "steelyard/cpu/gemm.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "steelyard/core/random.hpp"

using namespace steelyard;

namespace {

enum class Form { nt, nn, tn };

template <class T>
void product(Form form, view<const T, 2> a, view<const T, 2> b, view<T, 2> c, Write write, std::byte* scratch) {
    if (form == Form::nt) cpu::gemm_nt<T>(a, b, c, write, scratch);
    if (form == Form::nn) cpu::gemm_nn<T>(a, b, c, write, scratch);
    if (form == Form::tn) cpu::gemm_tn<T>(a, b, c, write, scratch);
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

}  // namespace

TEST_CASE_TEMPLATE("a product of small integers equals the plain loop bit for bit", T, float, double) {
    auto work = scratch<T>();
    for (const Form form : {Form::nt, Form::nn, Form::tn})
        for (const Write write : {Write::assign, Write::add})
            for (const index_t m : {0, 1, 8, 9, 33})
                for (const index_t n : {0, 1, 17, 49, 193})
                    for (const index_t k : {0, 1, 31, 600}) {
                        CAPTURE(static_cast<int>(form));
                        CAPTURE(m);
                        CAPTURE(n);
                        CAPTURE(k);
                        Matrix<T> a(a_rows(form, m, k), a_columns(form, m, k), 3),
                            b(b_rows(form, n, k), b_columns(form, n, k), 5);
                        Matrix<T> c(m, n, 2);
                        a.integers(1), b.integers(2);
                        if (write == Write::add) c.integers(3);
                        Matrix<T> expected(m, n);
                        expected.fill([&](index_t at) {
                            const index_t i = at / n, j = at % n;
                            double sum = write == Write::add ? double(c.v(i, j)) : 0.0;
                            for (index_t p = 0; p < k; ++p)
                                sum += double(form == Form::tn ? a.v(p, i) : a.v(i, p)) *
                                       double(form == Form::nt ? b.v(j, p) : b.v(p, j));
                            return sum;
                        });
                        product<T>(form, a.v, b.v, c.v, write, work.data());
                        REQUIRE(same_bits(c.v, expected.v));
                        bool padding_is_untouched = true;
                        for (index_t i = 0; i < m; ++i)
                            for (index_t j = n; j < n + 2; ++j)
                                padding_is_untouched = padding_is_untouched && std::isnan(c.v.data[i * (n + 2) + j]);
                        REQUIRE(padding_is_untouched);
                    }
}

TEST_CASE_TEMPLATE("the alignment of operands and scratch does not change a bit", T, float, double) {
    const index_t m = 45, n = 101, k = 530;
    std::vector<std::byte> work(static_cast<std::size_t>(cpu::gemm_scratch_bytes<T>()) + 8);
    for (const Form form : {Form::nt, Form::nn, Form::tn}) {
        Matrix<T> reference(m, n);
        for (const index_t shift : {0, 1, 3, 5}) {
            Matrix<T> a(a_rows(form, m, k), a_columns(form, m, k), shift, shift);
            Matrix<T> b(b_rows(form, n, k), b_columns(form, n, k), 2 * shift, shift + 1);
            Matrix<T> c(m, n, shift, shift);
            a.normals(1), b.normals(2);
            product<T>(form, a.v, b.v, shift == 0 ? reference.v : c.v, Write::assign, work.data() + shift);
            if (shift != 0) CHECK(same_bits(c.v, reference.v));
        }
    }
}

TEST_CASE_TEMPLATE("an element does not depend on the rows and columns computed beside it", T, float, double) {
    const index_t m = 61, n = 211, k = 700;
    auto work = scratch<T>();
    for (const Form form : {Form::nt, Form::nn, Form::tn}) {
        CAPTURE(static_cast<int>(form));
        Matrix<T> a(a_rows(form, m, k), a_columns(form, m, k)), b(b_rows(form, n, k), b_columns(form, n, k));
        Matrix<T> whole(m, n);
        a.normals(1), b.normals(2);
        product<T>(form, a.v, b.v, whole.v, Write::assign, work.data());
        const auto part = [](view<T, 2> from, index_t row, index_t rows, index_t column, index_t columns) {
            view<T, 2> sub = from.slice(row, row + rows);
            sub.data += column, sub.extents[1] = columns;
            return sub;
        };
        for (const index_t rows : {1, 2, 8, 13})
            for (const index_t columns : {1, 3, 16, 40, 64}) {
                CAPTURE(rows);
                CAPTURE(columns);
                const index_t i = 29, j = 97;
                Matrix<T> c(rows, columns);
                product<T>(form, form == Form::tn ? part(a.v, 0, k, i, rows) : part(a.v, i, rows, 0, k),
                           form == Form::nt ? part(b.v, j, columns, 0, k) : part(b.v, 0, k, j, columns), c.v,
                           Write::assign, work.data());
                CHECK(same_bits(c.v, part(whole.v, i, rows, j, columns)));
            }
    }
}

TEST_CASE("an infinity or a NaN stays in its own row and column") {
    const index_t m = 9, n = 50, k = 5;
    auto work = scratch<float>();
    Matrix<float> a(m, k), b(k, n), c(m, n);
    a.integers(1), b.integers(2);
    a.v(8, 0) = std::numeric_limits<float>::infinity();
    b.v(1, 49) = std::numeric_limits<float>::quiet_NaN();
    cpu::gemm_nn<float>(a.v, b.v, c.v, Write::assign, work.data());
    for (index_t i = 0; i < m - 1; ++i)
        for (index_t j = 0; j < n - 1; ++j) CHECK(c.v(i, j) - c.v(i, j) == 0.0f);
    CHECK(c.v(0, 49) != c.v(0, 49));
}
