// What kernels must know of the GPU that they are launched on.
#pragma once

#include <array>
#include <string>

#include "steelyard/cuda/call.cuh"

namespace steelyard::cuda {

/// The properties of one GPU, asked for once.
struct Gpu {
    static constexpr int most = 32;  ///< GPUs of a machine

    int ordinal = 0;
    int multiprocessors = 0;
    bool is_sm_90 = false;

    /// The one that this thread works on.
    static const Gpu& current();

    /// It has Hopper's own instructions, and kernels were compiled for the target that has them, sm_90a: the build says
    /// so by STEELYARD_CUDA_SM_90A.
    [[nodiscard]] bool runs_sm_90a() const {
#if defined(STEELYARD_CUDA_SM_90A)
        return is_sm_90;
#else
        return false;
#endif
    }
};

namespace detail {

inline std::array<Gpu, Gpu::most> find_gpus() {
    const auto attribute = [](cudaDeviceAttr which, int ordinal) {
        int value = 0;
        check_call(cudaDeviceGetAttribute(&value, which, ordinal), "cudaDeviceGetAttribute");
        return value;
    };
    std::array<Gpu, Gpu::most> gpus;
    int count = 0;
    check_call(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    for (int i = 0; i < count && i < Gpu::most; ++i)
        gpus[static_cast<std::size_t>(i)] = {i, attribute(cudaDevAttrMultiProcessorCount, i),
                                             attribute(cudaDevAttrComputeCapabilityMajor, i) == 9 &&
                                                 attribute(cudaDevAttrComputeCapabilityMinor, i) == 0};
    return gpus;
}

}  // namespace detail

inline const Gpu& Gpu::current() {
    static const std::array<Gpu, most> gpus = detail::find_gpus();
    int ordinal = 0;
    check_call(cudaGetDevice(&ordinal), "cudaGetDevice");
    if (ordinal >= most)
        throw Error(Status::refuse(Code::invalid_argument, "cuda", "GPU", "one of the first " + std::to_string(most),
                                   std::to_string(ordinal)));
    return gpus[static_cast<std::size_t>(ordinal)];
}

}  // namespace steelyard::cuda
