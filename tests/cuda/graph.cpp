// A layer's calls captured in a CUDA graph: replayed on other tokens, which go to other experts in other numbers.
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/device_memory.hpp"
#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::Tensor;

namespace {

using Layer = MoE<bf16, TopK, SwiGlu, AllOf<MicroBatchLoss, RouterZLoss>, SelfComm, Dropless, KeepActivations, Cuda>;

/// A layer with its memory, and one forward and backward of it.
struct Rig {
    static constexpr index_t tokens = 300, width = 64;
    Layer layer;
    CudaBytes params, grads, state, context_host, context_device, workspace_host, workspace_device;
    Tensor<bf16> x, dy, y, dx;

    explicit Rig(const Cuda& device)
        : layer({.shape = {.tokens = tokens, .width = width, .experts = 6},
                 .router = {.k = 2},
                 .expert = {.hidden = 96},
                 .balance =
                     Layer::Balance(MicroBatchLoss{{}, {.coefficient = 0.5}}, RouterZLoss{{}, {.coefficient = 0.01}}),
                 .device = device}),
          params(layer.param_bytes()),
          grads(layer.param_bytes()),
          state(layer.state_bytes(), CudaBytes::Where::pinned),
          context_host(layer.context_bytes().host, CudaBytes::Where::pinned),
          context_device(layer.context_bytes().device),
          workspace_host(layer.workspace_bytes().host, CudaBytes::Where::pinned),
          workspace_device(layer.workspace_bytes().device),
          x(tokens, width),
          dy(tokens, width),
          y(tokens, width),
          dx(tokens, width) {
        REQUIRE(layer.init_state(state.span()).ok());
        std::memset(context_host.data(), 0, static_cast<std::size_t>(context_host.size()));
        const Host<bf16> numbers = gpu::random<bf16>(1, layer.param_bytes() / 2, 7, 0.2);
        params.upload(numbers.data.data(), layer.param_bytes());
    }

    void bring(unsigned seed) {
        const Host<bf16> tokens_in = gpu::random<bf16>(tokens, width, seed),
                         back = gpu::random<bf16>(tokens, width, seed + 1);
        put(x, tokens_in), put(dy, back);
        grads.fill(0);
    }
    void call() const {
        const auto p = layer.read_only_params(layer.place_params(params.data()));
        const QueuedBlock context{context_host.span(), context_device.span()};
        const QueuedBlock workspace{workspace_host.span(), workspace_device.span()};
        REQUIRE(layer
                    .forward({}, {.x = x.get(),
                                  .params = p,
                                  .y = y.get(),
                                  .context = context,
                                  .workspace = workspace,
                                  .state = state.span()})
                    .message() == "ok");
        REQUIRE(layer
                    .backward({.x = x.get(),
                               .params = p,
                               .dy = dy.get(),
                               .dx = dx.get(),
                               .grads = layer.place_params(grads.data()),
                               .context = context,
                               .workspace = workspace})
                    .message() == "ok");
    }
    struct Result {
        Host<bf16> y, dx;
        std::vector<std::byte> grads;
        double loss;
        std::vector<index_t> offsets;
    };
    [[nodiscard]] Result result() const {
        const QueuedBlock context{context_host.span(), context_device.span()};
        Result of{y.host(), dx.host(), std::vector<std::byte>(static_cast<std::size_t>(grads.size())),
                  layer.balance_loss(context), std::vector<index_t>(7)};
        grads.download(of.grads.data(), grads.size());
        REQUIRE(cudaMemcpy(of.offsets.data(), layer.plan(context).offsets.data, 7 * sizeof(index_t),
                           cudaMemcpyDeviceToHost) == cudaSuccess);
        return of;
    }

private:
    static void put(const Tensor<bf16>& to, const Host<bf16>& from) {
        REQUIRE(cudaMemcpy(to.get().data, from.data.data(), static_cast<std::size_t>(tokens * width) * sizeof(bf16),
                           cudaMemcpyHostToDevice) == cudaSuccess);
        REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    }
};

void check_same(const Rig::Result& a, const Rig::Result& b) {
    CHECK(a.y.same(b.y));
    CHECK(a.dx.same(b.dx));
    CHECK(a.grads == b.grads);
    CHECK(a.loss == b.loss);
    CHECK(a.offsets == b.offsets);
}

}  // namespace

TEST_CASE("a captured forward and backward is replayed with other tokens for each expert") {
    Cuda device = gpu::device();
    device.experts = CudaExperts::grouped;
    Rig direct(device), replayed(device);

    replayed.bring(1);
    replayed.call();  // what is made at the first call is no part of a graph
    gpu::finish();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t runnable = nullptr;
    REQUIRE(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    replayed.call();
    REQUIRE(cudaStreamEndCapture(device.stream, &graph) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&runnable, graph, 0) == cudaSuccess);

    std::vector<index_t> before;
    for (unsigned seed = 10; seed < 13; ++seed) {
        direct.bring(seed);
        direct.call();
        gpu::finish();
        replayed.bring(seed);
        REQUIRE(cudaGraphLaunch(runnable, device.stream) == cudaSuccess);
        gpu::finish();
        const Rig::Result a = replayed.result();
        check_same(a, direct.result());
        CHECK(a.offsets != before);  // other counts each time
        before = a.offsets;
        CHECK(a.loss > 0.0);
    }
    CHECK(cudaGraphExecDestroy(runnable) == cudaSuccess);
    CHECK(cudaGraphDestroy(graph) == cudaSuccess);
}
