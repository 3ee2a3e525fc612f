// Time on the GPU, and what it can do at most.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "steelyard/core/bf16.hpp"
#include "steelyard/cuda/resources.hpp"

namespace bench {

inline void check(cudaError_t result) {
    if (result != cudaSuccess) throw std::runtime_error(cudaGetErrorString(result));
}

/// Milliseconds of one call each, between two events on the stream: quartiles of several, after two that do not count.
struct Spread {
    double median = 0, low = 0, high = 0;
};
template <class Call>
Spread time_calls(CUstream_st* stream, int repeats, Call&& call) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = -2; i < repeats; ++i) {
        check(cudaEventRecord(begin, stream));
        call(i + 2);
        check(cudaEventRecord(end, stream));
        check(cudaEventSynchronize(end));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) times.push_back(ms);
    }
    check(cudaEventDestroy(begin)), check(cudaEventDestroy(end));
    std::sort(times.begin(), times.end());
    const auto at = [&](double share) {
        return static_cast<double>(times[static_cast<std::size_t>(share * (times.size() - 1))]);
    };
    return {at(0.5), at(0.25), at(0.75)};
}

/// Random bf16 numbers, normal, a megabyte of them again and again: never zeros, on which a GPU draws less power and
/// runs faster.
inline void fill_random(const steelyard::CudaBytes& bytes, float spread, unsigned seed) {
    const std::size_t size = static_cast<std::size_t>(bytes.size()), block = std::min<std::size_t>(size, 2 << 20);
    std::vector<steelyard::bf16> numbers(block / 2);
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, spread);
    for (auto& number : numbers) number = steelyard::bf16(normal(generator));
    check(cudaMemcpy(bytes.data(), numbers.data(), block, cudaMemcpyHostToDevice));
    for (std::size_t i = block; i < size; i += block)
        check(cudaMemcpyAsync(bytes.data() + i, bytes.data(), std::min(block, size - i), cudaMemcpyDeviceToDevice));
    check(cudaDeviceSynchronize());
}

/// FLOP/s of a dense bf16 product, 8192 cubed, by cuBLAS.
inline double dense_rate(const steelyard::Cuda& device) {
    constexpr int n = 8192;
    const steelyard::index_t bytes = steelyard::index_t{n} * n * 2;
    const steelyard::CudaBytes a(bytes), b(bytes), c(bytes);
    fill_random(a, 1.0f, 1), fill_random(b, 1.0f, 2);
    const float one = 1, zero = 0;
    const Spread ms = time_calls(device.stream, 15, [&](int) {
        cublasGemmEx(device.blas, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, b.data(), CUDA_R_16BF, n, a.data(),
                     CUDA_R_16BF, n, &zero, c.data(), CUDA_R_16BF, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    });
    return 2.0 * n * n * n / ms.median * 1e3;
}

/// Bytes a second, read and written, of a copy from one gigabyte to another.
inline double copy_rate(const steelyard::Cuda& device) {
    constexpr steelyard::index_t bytes = steelyard::index_t{1} << 30;
    const steelyard::CudaBytes from(bytes), to(bytes);
    fill_random(from, 1.0f, 3);
    const Spread ms = time_calls(device.stream, 15, [&](int) {
        check(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                              device.stream));
    });
    return 2.0 * static_cast<double>(bytes) / ms.median * 1e3;
}

}  // namespace bench
