// Compiles and links with what steelyard::nccl brings; asks for no GPU.
#include <nccl.h>
#include <steelyard/comm/nccl.hpp>

#ifndef STEELYARD_HAS_NCCL
#error "steelyard::nccl defines STEELYARD_HAS_NCCL"
#endif

static_assert(steelyard::CommBackend<steelyard::NcclComm>);

int main() {
    int version = 0, devices = 0;
    (void)cudaGetDeviceCount(&devices);
    return ncclGetVersion(&version) == ncclSuccess ? 0 : 1;
}
