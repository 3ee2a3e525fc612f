// Memory in large pages, where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <span>
#include <utility>

namespace steelyard_bench {

/// Owned bytes, zeroed and aligned to a page. All contenders and the limits use them, so that nobody pays for small
/// pages where the weights are gigabytes. Nothing is touched before it is used.
class HugeMemory {
public:
    HugeMemory() = default;
    explicit HugeMemory(std::size_t bytes) : size_(bytes) {
        if (bytes == 0) return;
        data_ = ::mmap(nullptr, mapped(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data_ == MAP_FAILED) throw std::bad_alloc();
        ::madvise(data_, mapped(), MADV_HUGEPAGE);  // a wish: no matter if it is refused
    }
    HugeMemory(HugeMemory&& other) noexcept
        : size_(std::exchange(other.size_, 0)), data_(std::exchange(other.data_, nullptr)) {}
    HugeMemory& operator=(HugeMemory&& other) noexcept {
        std::swap(size_, other.size_), std::swap(data_, other.data_);
        return *this;
    }
    ~HugeMemory() {
        if (data_ != nullptr) ::munmap(data_, mapped());
    }

    template <class T>
    [[nodiscard]] T* as() const {
        return static_cast<T*>(data_);
    }
    [[nodiscard]] std::size_t size() const { return size_; }
    [[nodiscard]] std::span<std::byte> span() const { return {as<std::byte>(), size_}; }

private:
    static constexpr std::size_t page = std::size_t{2} << 20;
    [[nodiscard]] std::size_t mapped() const { return (size_ + page - 1) / page * page; }

    std::size_t size_ = 0;
    void* data_ = nullptr;
};

}  // namespace steelyard_bench
