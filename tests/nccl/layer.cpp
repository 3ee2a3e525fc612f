// A layer on the GPU whose counts are summed by NCCL, beside the experts: one rank, and the bits of no communication.
#include <doctest/doctest.h>
#include <nccl.h>

#include <cstring>
#include <vector>

#include "cuda/device_memory.hpp"
#include "steelyard/comm/nccl.hpp"
#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::Tensor;

namespace {

constexpr index_t tokens = 200, width = 64;

struct Result {
    std::vector<Host<bf16>> y, dx;
    std::vector<double> losses;
};

/// Two steps of two micro-steps.
template <class BalanceT, class CommT>
Result train(const CommT& comm, const BalanceT& balance) {
    using Layer = MoE<bf16, TopK, SwiGlu, BalanceT, CommT, Dropless, KeepActivations, Cuda>;
    const Layer layer({.shape = {.tokens = tokens, .width = width, .experts = 6, .micro_steps = 2},
                       .router = {.k = 2, .score = Score::sigmoid},
                       .expert = {.hidden = 96},
                       .balance = balance,
                       .device = gpu::device()});
    const CudaBytes params(layer.param_bytes()), grads(layer.param_bytes());
    const CudaBytes state(layer.state_bytes(), CudaBytes::Where::pinned);
    const CudaBytes context_host(layer.context_bytes().host, CudaBytes::Where::pinned);
    const CudaBytes context_device(layer.context_bytes().device);
    const CudaBytes workspace_host(layer.workspace_bytes().host, CudaBytes::Where::pinned);
    const CudaBytes workspace_device(layer.workspace_bytes().device);
    std::memset(context_host.data(), 0, static_cast<std::size_t>(context_host.size()));
    REQUIRE(layer.init_state(state.span()).ok());
    const Host<bf16> numbers = gpu::random<bf16>(1, layer.param_bytes() / 2, 7, 0.2);
    params.upload(numbers.data.data(), layer.param_bytes());
    grads.fill(0);
    const QueuedBlock context{context_host.span(), context_device.span()};
    const QueuedBlock workspace{workspace_host.span(), workspace_device.span()};
    const auto weights = layer.read_only_params(layer.place_params(params.data()));
    Result result;
    for (int step = 0; step < 2; ++step) {
        for (int micro_step = 0; micro_step < 2; ++micro_step) {
            const auto seed = static_cast<unsigned>(10 * step + micro_step);
            const Tensor<bf16> x(gpu::random<bf16>(tokens, width, seed)),
                dy(gpu::random<bf16>(tokens, width, seed + 100));
            const Tensor<bf16> y(tokens, width), dx(tokens, width);
            const TokenInfo<CudaSpace> info{
                .step = {.step = step, .micro_step = micro_step, .total_tokens = 2 * tokens}};
            REQUIRE(layer
                        .forward(comm, {.x = x.get(),
                                        .params = weights,
                                        .y = y.get(),
                                        .context = context,
                                        .workspace = workspace,
                                        .state = state.span(),
                                        .tokens = info})
                        .message() == "ok");
            REQUIRE(layer
                        .backward({.x = x.get(),
                                   .params = weights,
                                   .dy = dy.get(),
                                   .dx = dx.get(),
                                   .grads = layer.place_params(grads.data()),
                                   .context = context,
                                   .workspace = workspace})
                        .message() == "ok");
            gpu::finish();
            REQUIRE(layer.summed(context).ok());
            result.y.push_back(y.host()), result.dx.push_back(dx.host());
            result.losses.push_back(layer.balance_loss(context));
        }
        REQUIRE(layer.end_step(comm, step, state.span(), workspace).message() == "ok");
    }
    return result;
}

template <class BalanceT>
void compare(const NcclComm& comm, const BalanceT& balance) {
    const Result alone = train(SelfComm{}, balance), summed = train(comm, balance);
    for (std::size_t i = 0; i < alone.y.size(); ++i) {
        CHECK(summed.y[i].same(alone.y[i]));
        CHECK(summed.dx[i].same(alone.dx[i]));
    }
    CHECK(summed.losses == alone.losses);
}

}  // namespace

TEST_CASE("a layer's counts are summed by NCCL on the side stream") {
    ncclComm_t group = nullptr;
    const int first = 0;
    REQUIRE(ncclCommInitAll(&group, 1, &first) == ncclSuccess);
    {
        const NcclComm comm(group, gpu::device().side);
        compare(comm, SynchronizedLoss{{}, {.coefficient = 0.5}});
        compare(comm, BufferedLoss{{}, {.coefficient = 0.5}});
        compare(comm, LossFree{{}, {.rate = 0.1}});
        CHECK(comm.synchronize().message() == "ok");
    }
    CHECK(ncclCommDestroy(group) == ncclSuccess);
}
