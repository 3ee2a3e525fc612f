// Owners of what a Cuda value points to: how it is made and released.
#pragma once

#include <cublas_v2.h>

#include <string>

#include "steelyard/cuda/call.cuh"
#include "steelyard/cuda/product.cuh"
#include "steelyard/cuda/resources.hpp"

namespace steelyard {

CudaResources::CudaResources() {
    CUstream_st* stream = nullptr;
    cuda::check_call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    owns_stream_ = true;
    make(stream);
}
CudaResources::CudaResources(CUstream_st* stream) { make(stream); }
CudaResources::~CudaResources() { release(); }

void CudaResources::make(CUstream_st* stream) {
    constexpr std::size_t workspace_bytes = std::size_t{32} << 20;  // what cuBLAS asks for on sm_90
    device_.stream = stream;
    try {
        cuda::check_call(cudaStreamCreateWithFlags(&device_.side, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
        for (CUevent_st** event : {&device_.forked, &device_.joined})
            cuda::check_call(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        void* faults = nullptr;
        cuda::check_call(cudaHostAlloc(&faults, CudaFaults::words * sizeof(std::int64_t), cudaHostAllocDefault),
                         "cudaHostAlloc");
        device_.faults = static_cast<std::int64_t*>(faults);
        for (int word = 0; word < CudaFaults::words; ++word) device_.faults[word] = -1;
        cuda::check_blas(cublasCreate(&device_.blas), "cublasCreate");
        cuda::check_call(cudaMalloc(&workspace_, workspace_bytes), "cudaMalloc");
        // In this order: a new stream takes the workspace away. With one of its own, cuBLAS sums in the same order in
        // every call and can be captured in a graph.
        cuda::check_blas(cublasSetStream(device_.blas, stream), "cublasSetStream");
        cuda::check_blas(cublasSetWorkspace(device_.blas, workspace_, workspace_bytes), "cublasSetWorkspace");
        // Partial sums of a long product are added in float, not in bf16.
        constexpr int mode = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        cuda::check_blas(cublasSetMathMode(device_.blas, static_cast<cublasMath_t>(mode)), "cublasSetMathMode");
    } catch (...) {
        release();
        throw;
    }
}

void CudaResources::release() {
    if (device_.side != nullptr) cudaStreamSynchronize(device_.side);
    if (device_.blas != nullptr) {
        cudaStreamSynchronize(device_.stream);
        cublasDestroy(device_.blas);
    }
    cudaFree(workspace_);
    cudaFreeHost(device_.faults);
    for (CUevent_st* event : {device_.forked, device_.joined})
        if (event != nullptr) cudaEventDestroy(event);
    if (device_.side != nullptr) cudaStreamDestroy(device_.side);
    if (owns_stream_) cudaStreamDestroy(device_.stream);
}

Status CudaResources::available() {
    int count = 0;
    const cudaError_t result = cudaGetDeviceCount(&count);
    if (result == cudaSuccess && count > 0) return {};
    (void)cudaGetLastError();
    return Status::refuse(Code::device_failure, "cuda", "GPU", "one",
                          result == cudaSuccess ? "none" : cudaGetErrorString(result));
}

Status check_cuda(const Cuda& device) {
    for (CUstream_st* stream : {device.stream, device.side})
        if (const cudaError_t result = cudaStreamSynchronize(stream); result != cudaSuccess)
            return Status::refuse(Code::device_failure, "cuda", "stream", "success",
                                  std::string(cudaGetErrorName(result)) + ": " + cudaGetErrorString(result));
    return {};
}

Status CudaResources::synchronize() {
    if (Status status = check_cuda(device_); !status) return status;
    const std::int64_t token = std::exchange(device_.faults[CudaFaults::bad_logits], std::int64_t{-1});
    if (token < 0) return {};
    return Status::refuse(Code::not_finite, "router", "logits of token " + std::to_string(token), "finite numbers",
                          "a NaN or an infinity");
}

CudaBytes::CudaBytes(index_t bytes, Where where) : size_(bytes), where_(where) {
    if (bytes == 0) return;
    void* data = nullptr;
    const auto size = static_cast<std::size_t>(bytes);
    if (where == Where::gpu)
        cuda::check_call(cudaMalloc(&data, size), "cudaMalloc");
    else
        cuda::check_call(cudaHostAlloc(&data, size, cudaHostAllocDefault), "cudaHostAlloc");
    data_ = static_cast<std::byte*>(data);
}
CudaBytes::~CudaBytes() {
    if (where_ == Where::gpu)
        cudaFree(data_);
    else
        cudaFreeHost(data_);
}
void CudaBytes::upload(const void* from, index_t bytes) const {
    if (bytes > 0)
        cuda::check_call(cudaMemcpy(data_, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault), "cudaMemcpy");
    // A copy from ordinary memory returns when it has been read, which is before it has arrived.
    cuda::check_call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}
void CudaBytes::download(void* to, index_t bytes) const {
    if (bytes > 0)
        cuda::check_call(cudaMemcpy(to, data_, static_cast<std::size_t>(bytes), cudaMemcpyDefault), "cudaMemcpy");
}
void CudaBytes::fill(unsigned char value) const {
    if (size_ > 0) cuda::check_call(cudaMemset(data_, value, static_cast<std::size_t>(size_)), "cudaMemset");
    cuda::check_call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

}  // namespace steelyard
