// Layers on the GPU that share one sum, and calls that return while the GPU stands still: the same bits as each alone.
#include <doctest/doctest.h>

#include "cuda/model.hpp"

using namespace steelyard;
using gpu::check_same;
using gpu::train;

namespace {

const SynchronizedLoss synchronized{{}, {.coefficient = 0.5}};
const AllOf all{BufferedLoss{{}, {.coefficient = 0.5}}, LossFree{{}, {.rate = 0.1}}, WindowedLoss<2>{},
                RouterZLoss{{}, {.coefficient = 0.01}}};

}  // namespace

TEST_CASE("layers on the GPU that share one sum compute what each computes alone") {
    check_same(train(SelfComm{}, synchronized, {.stacked = true}), train(SelfComm{}, synchronized));
    check_same(train(SelfComm{}, all, {.stacked = true}), train(SelfComm{}, all));
    check_same(train(SelfComm{}, MicroBatchLoss{}, {.stacked = true}), train(SelfComm{}, MicroBatchLoss{}));
    const QuantileBalance quantile{{}, {.bins = 50}};
    check_same(train(SelfComm{}, quantile, {.stacked = true}), train(SelfComm{}, quantile));
}

TEST_CASE("forward, conclude and backward of layers that remember return while the GPU stands still") {
    constexpr auto grouped = CudaExperts::grouped;  // looped experts wait for the plan
    const gpu::Trained want = train(SelfComm{}, all, {}, grouped);
    check_same(train(SelfComm{}, all, {.gated = true}, grouped), want);
    check_same(train(SelfComm{}, all, {.stacked = true, .gated = true}, grouped), want);
}

TEST_CASE("a backend that the host waits for sums layers on the GPU, each by itself or as one") {
    ThreadGroup group(1);
    const ThreadComm comm = group.comm(0);
    check_same(train(comm, synchronized), train(SelfComm{}, synchronized));
    check_same(train(comm, all, {.stacked = true}), train(SelfComm{}, all));
}
