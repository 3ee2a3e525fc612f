// What a Cuda device value points to, owned: streams, events, cuBLAS, memory.
#pragma once

#include <cstddef>
#include <utility>

#include "steelyard/core/status.hpp"
#include "steelyard/cuda/device.hpp"

namespace steelyard {

/// An owned block of a GPU's memory, zeroed. Pinned: of the host's, where kernels reach it too, under the same address.
template <bool pinned>
class CudaMemory {
public:
    CudaMemory() = default;
    /// On the calling thread's GPU. Throws Error.
    explicit CudaMemory(index_t size);
    ~CudaMemory();
    CudaMemory(CudaMemory&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    CudaMemory& operator=(CudaMemory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }

    [[nodiscard]] std::byte* data() const { return data_; }
    [[nodiscard]] index_t size() const { return size_; }

private:
    std::byte* data_ = nullptr;
    index_t size_ = 0;
};
using CudaBytes = CudaMemory<false>;
using PinnedBytes = CudaMemory<true>;

/// Everything behind a `Cuda` value, for one GPU: two streams and their events, cuBLAS with a workspace of its own, and
/// the words that kernels report faults in.
///
/// The constructor makes its GPU the calling thread's own (cudaSetDevice); other threads that use the device do so
/// themselves. Values outlive no resources. The destructor waits for the streams.
class CudaResources {
public:
    static constexpr index_t workspace_bytes = index_t{32} << 20;  ///< of cuBLAS

    /// With a stream of its own. Throws Error, which names the CUDA call that failed and says why.
    explicit CudaResources(int ordinal = 0);
    /// On a stream of the caller's (which may be null, the default stream), of the calling thread's GPU.
    static CudaResources on(CUstream_st* stream);
    ~CudaResources() { release(); }
    CudaResources(CudaResources&& other) noexcept { take(other); }
    CudaResources& operator=(CudaResources&& other) noexcept {
        if (this != &other) {
            release();
            take(other);
        }
        return *this;
    }

    [[nodiscard]] Cuda device(CudaExperts experts = CudaExperts::automatic) const {
        Cuda value = device_;
        value.experts = experts;
        return value;
    }

    /// The first token whose logits were not all finite since `clear_faults`, or -1. To be asked once the stream has
    /// come so far.
    [[nodiscard]] std::int64_t bad_logits() const { return device_.faults[CudaFaults::bad_logits]; }
    void clear_faults() const;

    /// Why this machine has no GPU of that number which the library can run on; or ok. Throws nothing.
    static Status available(int ordinal = 0);

private:
    CudaResources() = default;
    void open();
    void release() noexcept;
    void take(CudaResources& other) noexcept {
        device_ = std::exchange(other.device_, {});
        owns_stream_ = std::exchange(other.owns_stream_, false);
        workspace_ = std::move(other.workspace_);
        faults_ = std::move(other.faults_);
    }

    Cuda device_;
    bool owns_stream_ = false;
    CudaBytes workspace_;
    PinnedBytes faults_;
};

/// Waits for the device's streams, and says what went wrong on the GPU since: ok, or the error of CUDA. Launches that
/// could not even begin throw at once.
Status check_cuda(const Cuda& device);

}  // namespace steelyard
