// Calls of the CUDA runtime: an error ends in an exception that names the call.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "steelyard/core/status.hpp"

namespace steelyard::cuda {

/// Throws what a call of the CUDA runtime, or a launch, answered with, unless that is success.
inline void check_call(cudaError_t result, const char* call) {
    if (result == cudaSuccess) return;
    throw Error(Status::refuse(Code::device_failure, "cuda", call, "success",
                               std::string(cudaGetErrorName(result)) + ": " + cudaGetErrorString(result)));
}

}  // namespace steelyard::cuda
