// Memory of the CUDA device: fills and copies, and the order of what its two streams and the host do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "steelyard/cuda/device.hpp"

namespace steelyard {

template <class Device>
struct memory_ops;

namespace cuda {

/// `rows` rows of `bytes` bytes, `pitch` bytes from one to the next.
struct ByteRows {
    std::byte* data = nullptr;
    index_t rows = 0, bytes = 0, pitch = 0;
};
/// A tensor as rows: dense but for its first dimension.
template <class T, int R, class Space>
ByteRows rows_of(const view<T, R, Space>& of) {
    constexpr index_t size = static_cast<index_t>(sizeof(T));
    auto* const data = reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<T>*>(of.data));
    if (of.dense()) return {data, 1, of.size() * size, of.size() * size};
    const index_t columns = of.extents[0] == 0 ? 0 : of.size() / of.extents[0];
    if constexpr (R == 1)
        return {data, of.extents[0], size, of.strides[0] * size};
    else
        return {data, of.extents[0], columns * size, of.strides[0] * size};
}

void fill_rows(const Cuda& device, const ByteRows& to, std::uint64_t value, int size);
void copy_rows(const Cuda& device, const ByteRows& from, const ByteRows& to);
void run_on_host(const Cuda& device, void (*function)(void*), void* argument);

}  // namespace cuda

/// Everything here is enqueued, and done in the order of the stream; `wait` alone waits.
///
/// Copies go between any two of the GPU's memory, pinned memory and, where the host may wait, memory of the program.
template <>
struct memory_ops<Cuda> {
    static constexpr bool asynchronous = true;

    /// to (=) value, of 1, 2, 4 or 8 bytes.
    template <class T, int R>
    static void fill(const Cuda& device, view<T, R, CudaSpace> to, std::type_identity_t<T> value) {
        static_assert(sizeof(T) <= 8, "steelyard: memory is filled with values of at most 8 bytes");
        std::uint64_t bits = 0;
        std::memcpy(&bits, &value, sizeof(T));
        if (to.size() != 0) cuda::fill_rows(device, cuda::rows_of(to), bits, static_cast<int>(sizeof(T)));
    }
    template <class From, class T, int R, class FromSpace, class ToSpace>
        requires std::is_same_v<std::remove_const_t<From>, T>
    static void copy(const Cuda& device, view<From, R, FromSpace> from, view<T, R, ToSpace> to) {
        if (to.size() != 0) cuda::copy_rows(device, cuda::rows_of(from), cuda::rows_of(to));
    }
    /// From pinned memory, which keeps its contents until the stream has come so far.
    template <class From, class T, int R>
    static void upload(const Cuda& device, view<From, R> from, view<T, R, CudaSpace> to) {
        copy(device, from, to);
    }

    /// The same GPU on its side stream. It has no cuBLAS: that belongs to `stream`.
    [[nodiscard]] static Cuda beside(const Cuda& device) {
        Cuda side = device;
        side.stream = device.side;
        side.blas = nullptr;
        return side;
    }
    /// The same, after all that was enqueued until now.
    [[nodiscard]] static Cuda fork(const Cuda& device);
    /// What comes next waits for what was enqueued on the fork.
    static void join(const Cuda& device);

    /// Calls function(argument) on a thread of CUDA's once the stream has come so far. It must not call CUDA, and what
    /// it is given lives until then.
    static void run_on_host(const Cuda& device, void (*function)(void*), void* argument) {
        cuda::run_on_host(device, function, argument);
    }
    /// The same with a callable that is copied.
    template <class Function>
        requires std::is_invocable_v<Function&>
    static void run_on_host(const Cuda& device, Function function) {
        auto owned = std::make_unique<Function>(std::move(function));
        cuda::run_on_host(
            device, [](void* argument) { (*std::unique_ptr<Function>(static_cast<Function*>(argument)))(); },
            owned.get());
        (void)owned.release();
    }

    /// Until everything that was enqueued on the stream is done. Throws what the GPU answered with.
    static void wait(const Cuda& device);
};

}  // namespace steelyard
