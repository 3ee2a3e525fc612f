// Owners of what a Cuda value points to: streams, events, cuBLAS, memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "steelyard/core/status.hpp"
#include "steelyard/cuda/device.hpp"

namespace steelyard {

/// Everything behind a `Cuda` value of the calling thread's GPU: two streams and their events, cuBLAS with a workspace
/// of its own, and the words that kernels report faults in. Defined in cuda/resources.cuh.
class CudaResources {
public:
    /// With a stream of its own. Throws Error.
    CudaResources();
    /// On a stream of the caller's, which may be null: the default stream.
    explicit CudaResources(CUstream_st* stream);
    ~CudaResources();
    CudaResources(const CudaResources&) = delete;
    CudaResources& operator=(const CudaResources&) = delete;

    /// Lives no longer than this does.
    [[nodiscard]] Cuda device(CudaExperts experts = CudaExperts::automatic) const {
        Cuda value = device_;
        value.experts = experts;
        return value;
    }

    /// Waits for both streams. Refuses what went wrong on the GPU, then what kernels reported since the last call.
    Status synchronize();

    /// Ok where the library finds a GPU, or why not.
    static Status available();

private:
    void make(CUstream_st* stream);
    void release();

    Cuda device_;
    void* workspace_ = nullptr;
    bool owns_stream_ = false;
};

/// Waits for the device's streams, and refuses what went wrong on the GPU since: for those who made the value
/// themselves. A launch that could not begin has thrown at once.
Status check_cuda(const Cuda& device);

/// An owned block of memory, of the GPU or pinned on the host: the host and kernels reach it under one address.
class CudaBytes {
public:
    enum class Where { gpu, pinned };

    CudaBytes() = default;
    explicit CudaBytes(index_t bytes, Where where = Where::gpu);
    ~CudaBytes();
    CudaBytes(CudaBytes&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)), where_(other.where_) {}
    CudaBytes& operator=(CudaBytes&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(where_, other.where_);
        return *this;
    }

    [[nodiscard]] std::byte* data() const { return data_; }
    [[nodiscard]] index_t size() const { return size_; }
    [[nodiscard]] std::span<std::byte> span() const { return {data_, static_cast<std::size_t>(size_)}; }

    /// Copies `bytes` from or to host memory, and waits.
    void upload(const void* from, index_t bytes) const;
    void download(void* to, index_t bytes) const;
    /// Every byte (=) value.
    void fill(unsigned char value) const;

private:
    std::byte* data_ = nullptr;
    index_t size_ = 0;
    Where where_ = Where::gpu;
};

}  // namespace steelyard
