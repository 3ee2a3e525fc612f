// Layers on the GPU whose counts are summed by NCCL, beside the experts: one rank, and the bits of no communication.
#include <doctest/doctest.h>
#include <nccl.h>

#include "cuda/model.hpp"
#include "steelyard/comm/nccl.hpp"

using namespace steelyard;

namespace {

template <class BalanceT>
void compare(const NcclComm& comm, const BalanceT& balance) {
    const gpu::Trained alone = gpu::train(SelfComm{}, balance);
    gpu::check_same(gpu::train(comm, balance), alone);
    gpu::check_same(gpu::train(comm, balance, {.stacked = true}), alone);
    // Nobody waits for a sum. Looped experts would wait for the plan.
    const auto grouped = CudaExperts::grouped;
    const gpu::Trained alone_grouped = gpu::train(SelfComm{}, balance, {}, grouped);
    gpu::check_same(gpu::train(comm, balance, {.gated = true}, grouped), alone_grouped);
    gpu::check_same(gpu::train(comm, balance, {.stacked = true, .gated = true}, grouped), alone_grouped);
}

}  // namespace

TEST_CASE("layers' counts are summed by NCCL on the side stream, each by itself or as one") {
    ncclComm_t group = nullptr;
    const int first = 0;
    REQUIRE(ncclCommInitAll(&group, 1, &first) == ncclSuccess);
    {
        const NcclComm comm(group, gpu::device().side);
        compare(comm, SynchronizedLoss{{}, {.coefficient = 0.5}});
        compare(comm, AllOf{BufferedLoss{{}, {.coefficient = 0.5}}, LossFree{{}, {.rate = 0.1}}, WindowedLoss<2>{}});
        CHECK(comm.synchronize().message() == "ok");
    }
    CHECK(ncclCommDestroy(group) == ncclSuccess);
}
