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
inline Spread spread_of(std::vector<double> numbers) {
    std::sort(numbers.begin(), numbers.end());
    const auto at = [&](double share) {
        return numbers[static_cast<std::size_t>(share * static_cast<double>(numbers.size() - 1))];
    };
    return {at(0.5), at(0.25), at(0.75)};
}

/// Takes the time of one call after the other.
class Stopwatch {
public:
    explicit Stopwatch(CUstream_st* stream) : stream_(stream) {
        check(cudaEventCreate(&begin_)), check(cudaEventCreate(&end_));
    }
    Stopwatch(const Stopwatch&) = delete;
    ~Stopwatch() { cudaEventDestroy(begin_), cudaEventDestroy(end_); }

    template <class Call>
    double operator()(Call&& call) const {
        check(cudaEventRecord(begin_, stream_));
        call();
        check(cudaEventRecord(end_, stream_));
        check(cudaEventSynchronize(end_));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin_, end_));
        return ms;
    }

private:
    CUstream_st* stream_;
    cudaEvent_t begin_, end_;
};

template <class Call>
Spread time_calls(CUstream_st* stream, int repeats, Call&& call) {
    const Stopwatch time(stream);
    std::vector<double> times;
    for (int i = -2; i < repeats; ++i) {
        const double ms = time([&] { call(i + 2); });
        if (i >= 0) times.push_back(ms);
    }
    return spread_of(std::move(times));
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
