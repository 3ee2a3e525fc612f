// Aligned memory that is taken once, before training starts.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "steelyard/core/layout.hpp"

namespace pretrain {

/// A block of zeroed bytes, aligned as the library's bundles want it.
class Bytes {
public:
    Bytes() = default;
    explicit Bytes(steelyard::index_t size)
        : size_(static_cast<std::size_t>(size)), data_(static_cast<std::byte*>(::operator new(size_ + 64, alignment))) {
        clear();
    }

    [[nodiscard]] std::byte* data() const { return data_.get(); }
    [[nodiscard]] steelyard::index_t size() const { return static_cast<steelyard::index_t>(size_); }
    [[nodiscard]] std::span<std::byte> span() const { return {data_.get(), size_}; }
    void clear() { std::memset(data_.get(), 0, size_); }
    /// From `bytes`, as many as there are here.
    void load(std::span<const std::byte> bytes) { std::memcpy(data_.get(), bytes.data(), size_); }
    [[nodiscard]] std::span<const std::byte> contents() const { return span(); }

    /// The same bytes as numbers.
    template <class T>
    [[nodiscard]] std::span<T> as() const {
        return {reinterpret_cast<T*>(data_.get()), size_ / sizeof(T)};
    }

private:
    static constexpr std::align_val_t alignment{static_cast<std::size_t>(steelyard::layout_alignment)};
    struct Free {
        void operator()(std::byte* p) const { ::operator delete(p, alignment); }
    };
    std::size_t size_ = 0;
    std::unique_ptr<std::byte, Free> data_;
};

}  // namespace pretrain
