// A GPU as a model's device, for a plain C++ compiler: its memory, its stream, and a place in its work to wait for.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "steelyard/cuda/resources.hpp"

namespace pretrain {

using steelyard::index_t;
using steelyard::Status;
using steelyard::view;

/// A block of zeroed bytes of the GPU.
class GpuBytes {
public:
    GpuBytes() = default;
    explicit GpuBytes(index_t size) : bytes_(size) { bytes_.fill(0); }

    [[nodiscard]] std::byte* data() const { return bytes_.data(); }
    [[nodiscard]] index_t size() const { return bytes_.size(); }
    [[nodiscard]] std::span<std::byte> span() const { return bytes_.span(); }
    /// From `bytes` of the host, as many as there are here. Waits.
    void load(std::span<const std::byte> bytes) { bytes_.upload(bytes.data(), size()); }
    /// A copy for the host, of what the GPU has done already.
    [[nodiscard]] std::vector<std::byte> contents() const {
        std::vector<std::byte> copy(static_cast<std::size_t>(size()));
        bytes_.download(copy.data(), size());
        return copy;
    }

private:
    steelyard::CudaBytes bytes_;
};

/// A block of zeroed bytes of the host that the GPU reaches too.
class PinnedBytes {
public:
    PinnedBytes() = default;
    explicit PinnedBytes(index_t size) : bytes_(size, steelyard::CudaBytes::Where::pinned) {
        if (size > 0) std::memset(bytes_.data(), 0, static_cast<std::size_t>(size));
    }

    [[nodiscard]] std::byte* data() const { return bytes_.data(); }
    [[nodiscard]] index_t size() const { return bytes_.size(); }
    [[nodiscard]] std::span<std::byte> span() const { return bytes_.span(); }
    template <class T>
    [[nodiscard]] std::span<T> as() const {
        return {reinterpret_cast<T*>(bytes_.data()), static_cast<std::size_t>(size()) / sizeof(T)};
    }

private:
    steelyard::CudaBytes bytes_;
};

/// One rank's access to the GPU: a stream of its own, on which its work is done in order. Copies share it.
class Gpu {
public:
    using space = steelyard::CudaSpace;
    using Memory = GpuBytes;         ///< what kernels compute in
    using HostMemory = PinnedBytes;  ///< what both kernels and the program reach

    Gpu();

    [[nodiscard]] const steelyard::Cuda& cuda() const { return cuda_; }
    [[nodiscard]] CUevent_st* mark() const { return mark_.get(); }
    /// Waits, and tells what went wrong on the GPU.
    [[nodiscard]] Status finish() const { return resources_->synchronize(); }

private:
    std::shared_ptr<steelyard::CudaResources> resources_;
    steelyard::Cuda cuda_;
    std::shared_ptr<CUevent_st> mark_;
};

}  // namespace pretrain
