// Tensors on the GPU, with what a test needs of them: contents of a host tensor, poison everywhere else.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "steelyard/core/bf16.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/resources.hpp"

namespace gpu {

using steelyard::bf16;
using steelyard::CudaBytes;
using steelyard::CudaSpace;
using steelyard::index_t;
using steelyard::view;

/// The GPU of all tests.
inline steelyard::CudaResources& resources() {
    static steelyard::CudaResources all;
    return all;
}
inline steelyard::Cuda device() { return resources().device(); }
/// Waits; nothing went wrong.
inline void finish() {
    const steelyard::Status status = resources().synchronize();
    INFO(status.message());
    REQUIRE(status.ok());
}

template <class T>
double number(T value) {
    if constexpr (std::is_same_v<T, bf16>)
        return static_cast<double>(static_cast<float>(value));
    else
        return static_cast<double>(value);
}

/// A matrix of the host, dense. `data` has one element more, so that an empty one has an address.
template <class T>
struct Host {
    index_t rows = 0, columns = 0;
    std::vector<T> data;

    Host(index_t r, index_t c, T value = T{}) : rows(r), columns(c), data(static_cast<std::size_t>(r * c + 1), value) {}
    T& operator()(index_t r, index_t c) { return data[static_cast<std::size_t>(r * columns + c)]; }
    const T& operator()(index_t r, index_t c) const { return data[static_cast<std::size_t>(r * columns + c)]; }
    view<T, 2> get() { return {data.data(), rows, columns}; }
    view<const T, 2> get() const { return {data.data(), rows, columns}; }
    view<T, 1> line() { return {data.data(), columns}; }
    [[nodiscard]] bool same(const Host& other) const {
        return rows == other.rows && columns == other.columns &&
               std::memcmp(data.data(), other.data.data(), static_cast<std::size_t>(rows * columns) * sizeof(T)) == 0;
    }
    template <class U>
    [[nodiscard]] Host<U> as() const {
        Host<U> to(rows, columns);
        for (std::size_t i = 0; i < data.size(); ++i) {
            if constexpr (std::is_same_v<U, bf16>)
                to.data[i] = bf16(static_cast<float>(number(data[i])));
            else
                to.data[i] = static_cast<U>(number(data[i]));
        }
        return to;
    }
};

/// Random numbers that T holds exactly.
template <class T>
Host<T> random(index_t rows, index_t columns, unsigned seed, double spread = 1.0) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0.0, spread);
    Host<double> numbers(rows, columns);
    for (double& value : numbers.data) value = normal(generator);
    return numbers.as<T>();
}

/// A matrix of the GPU, whose rows lie `padding` elements apart. Bytes that nobody wrote are 0x7f or 0xff: a NaN, and
/// no index.
template <class T>
class Tensor {
public:
    Tensor(index_t rows, index_t columns, index_t padding = 0)
        : rows_(rows),
          columns_(columns),
          stride_(columns + padding),
          bytes_((rows * stride_ + 1) * static_cast<index_t>(sizeof(T))) {
        bytes_.fill(poison);
    }
    explicit Tensor(const Host<T>& host, index_t padding = 0) : Tensor(host.rows, host.columns, padding) {
        std::vector<std::byte> raw(static_cast<std::size_t>(bytes_.size()), std::byte{poison});
        for (index_t r = 0; r < rows_ && columns_ > 0; ++r)
            std::memcpy(raw.data() + static_cast<std::size_t>(r * stride_) * sizeof(T), &host(r, 0),
                        static_cast<std::size_t>(columns_) * sizeof(T));
        bytes_.upload(raw.data(), bytes_.size());
    }

    [[nodiscard]] view<T, 2, CudaSpace> get() const {
        view<T, 2, CudaSpace> v(reinterpret_cast<T*>(bytes_.data()), rows_, columns_);
        v.strides[0] = stride_;
        return v;
    }
    [[nodiscard]] view<T, 1, CudaSpace> line() const { return {reinterpret_cast<T*>(bytes_.data()), columns_}; }

    /// What it holds. Nothing was written between its rows or behind them.
    [[nodiscard]] Host<T> host() const {
        std::vector<std::byte> raw(static_cast<std::size_t>(bytes_.size()));
        bytes_.download(raw.data(), bytes_.size());
        Host<T> out(rows_, columns_);
        for (index_t r = 0; r < rows_ && columns_ > 0; ++r)
            std::memcpy(&out(r, 0), raw.data() + static_cast<std::size_t>(r * stride_) * sizeof(T),
                        static_cast<std::size_t>(columns_) * sizeof(T));
        bool clean = true;
        for (index_t r = 0; r <= rows_; ++r) {
            const index_t begin = r == rows_ ? rows_ * stride_ : r * stride_ + columns_;
            const index_t end = r == rows_ ? begin + 1 : (r + 1) * stride_;
            for (index_t i = begin * static_cast<index_t>(sizeof(T)); i < end * static_cast<index_t>(sizeof(T)); ++i)
                clean = clean && raw[static_cast<std::size_t>(i)] == std::byte{poison};
        }
        REQUIRE(clean);
        return out;
    }

    static constexpr unsigned char poison = std::is_integral_v<T> ? 0x7f : 0xff;

private:
    index_t rows_, columns_, stride_;
    CudaBytes bytes_;
};

/// Numbers in pinned memory.
template <class T>
class Pinned {
public:
    Pinned(index_t rows, index_t columns)
        : rows_(rows),
          columns_(columns),
          bytes_((rows * columns + 1) * static_cast<index_t>(sizeof(T)), CudaBytes::Where::pinned) {
        bytes_.fill(0xff);
    }
    [[nodiscard]] view<T, 2> get() const { return {reinterpret_cast<T*>(bytes_.data()), rows_, columns_}; }
    [[nodiscard]] view<T, 1> line() const { return {reinterpret_cast<T*>(bytes_.data()), columns_}; }
    [[nodiscard]] Host<T> host() const {
        Host<T> out(rows_, columns_);
        std::memcpy(out.data.data(), bytes_.data(), static_cast<std::size_t>(rows_ * columns_) * sizeof(T));
        return out;
    }

private:
    index_t rows_, columns_;
    CudaBytes bytes_;
};

/// Scratch full of NaNs.
inline CudaBytes scratch(index_t bytes) {
    CudaBytes room(bytes + 1);
    room.fill(0xff);
    return room;
}

/// Every element within `relative` of the largest of `want`, or of what is known to have gone into the sums, which may
/// cancel.
template <class T, class U>
void require_close(const Host<T>& got, const Host<U>& want, double relative, double largest = 0.0) {
    REQUIRE(got.rows == want.rows);
    REQUIRE(got.columns == want.columns);
    for (index_t r = 0; r < got.rows; ++r)
        for (index_t c = 0; c < got.columns; ++c) largest = std::max(largest, std::abs(number(want(r, c))));
    for (index_t r = 0; r < got.rows; ++r) {
        for (index_t c = 0; c < got.columns; ++c) {
            const double a = number(got(r, c)), b = number(want(r, c));
            if (std::abs(a - b) <= relative * largest) continue;
            CAPTURE(r);
            CAPTURE(c);
            CAPTURE(a);
            CAPTURE(b);
            REQUIRE(std::abs(a - b) <= relative * largest);
        }
    }
}

}  // namespace gpu
