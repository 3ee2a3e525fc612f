// Memory of the CUDA device: fills and copies, and the order of what its two streams and the host do.
#pragma once

#include <algorithm>
#include <cstdint>

#include "steelyard/cuda/call.cuh"
#include "steelyard/cuda/memory.hpp"

namespace steelyard {

namespace cuda {

template <class Word>
__global__ void fill_words(std::byte* to, index_t words_of_row, index_t pitch, index_t words, Word value) {
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < words) reinterpret_cast<Word*>(to + at / words_of_row * pitch)[at % words_of_row] = value;
}

void fill_rows(const Cuda& device, const ByteRows& to, std::uint64_t value, int size) {
    const std::uint64_t low = value & 0xff, mask = size == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * size)) - 1;
    if (((low * 0x0101010101010101u) & mask) == value) {  // zeros, for one: the copy engine's work
        const auto pitch = static_cast<std::size_t>(to.rows == 1 ? to.bytes : to.pitch);
        check_call(cudaMemset2DAsync(to.data, pitch, static_cast<int>(low), static_cast<std::size_t>(to.bytes),
                                     static_cast<std::size_t>(to.rows), device.stream),
                   "cudaMemset2DAsync");
        return;
    }
    const auto launch = [&](auto word) {
        const index_t of_row = to.bytes / static_cast<index_t>(sizeof word), words = of_row * to.rows;
        const auto blocks = static_cast<unsigned>((words + 255) / 256);
        fill_words<<<blocks, 256, 0, device.stream>>>(to.data, of_row, to.pitch, words, word);
        check_call(cudaGetLastError(), "fill_words");
    };
    switch (size) {
        case 2:
            return launch(static_cast<std::uint16_t>(value));
        case 4:
            return launch(static_cast<std::uint32_t>(value));
        default:
            return launch(value);
    }
}

void copy_rows(const Cuda& device, const ByteRows& from, const ByteRows& to) {
    const index_t rows = std::max(from.rows, to.rows);
    if (rows == 1) {
        check_call(
            cudaMemcpyAsync(to.data, from.data, static_cast<std::size_t>(to.bytes), cudaMemcpyDefault, device.stream),
            "cudaMemcpyAsync");
        return;
    }
    // What is dense is one row to itself, and as many as the other here.
    const index_t bytes = from.rows > 1 ? from.bytes : to.bytes;
    const auto pitch = [&](const ByteRows& of) { return static_cast<std::size_t>(of.rows > 1 ? of.pitch : bytes); };
    check_call(cudaMemcpy2DAsync(to.data, pitch(to), from.data, pitch(from), static_cast<std::size_t>(bytes),
                                 static_cast<std::size_t>(rows), cudaMemcpyDefault, device.stream),
               "cudaMemcpy2DAsync");
}

void run_on_host(const Cuda& device, void (*function)(void*), void* argument) {
    check_call(cudaLaunchHostFunc(device.stream, function, argument), "cudaLaunchHostFunc");
}

}  // namespace cuda

Cuda memory_ops<Cuda>::fork(const Cuda& device) {
    cuda::check_call(cudaEventRecord(device.forked, device.stream), "cudaEventRecord");
    cuda::check_call(cudaStreamWaitEvent(device.side, device.forked, 0), "cudaStreamWaitEvent");
    return beside(device);
}

void memory_ops<Cuda>::join(const Cuda& device) {
    cuda::check_call(cudaEventRecord(device.joined, device.side), "cudaEventRecord");
    cuda::check_call(cudaStreamWaitEvent(device.stream, device.joined, 0), "cudaStreamWaitEvent");
}

void memory_ops<Cuda>::wait(const Cuda& device) {
    cuda::check_call(cudaStreamSynchronize(device.stream), "cudaStreamSynchronize");
}

}  // namespace steelyard
