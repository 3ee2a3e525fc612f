// Launches of kernels that follow each other closely.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "steelyard/cuda/call.cuh"
#include "steelyard/cuda/gpu.cuh"

namespace steelyard::cuda {

struct Grid {
    dim3 blocks, threads;
    std::size_t shared = 0;  ///< bytes of dynamic shared memory
    int cluster = 1;         ///< blocks of a cluster
};

/// The first statement of a kernel that `launch_early` launches: what kernels before it on the stream wrote is there
/// from here on, and the next kernel may come onto the GPU to wait likewise.
__device__ inline void after_earlier_kernels() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

/// kernel(arguments...), whose blocks come onto the GPU while the kernel before it ends, where the GPU can do that:
/// with few tokens, starting kernels takes as long as what they do.
template <class... Parameters, class... Arguments>
void launch_early(const char* name, CUstream_st* stream, const Grid& grid, void (*kernel)(Parameters...),
                  Arguments&&... arguments) {
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (Gpu::current().runs_sm_90a()) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (grid.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    check_call(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace steelyard::cuda
