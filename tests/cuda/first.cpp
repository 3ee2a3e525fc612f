// The example of docs/gpu.md.
#include <doctest/doctest.h>

#include <steelyard/cuda.hpp>
#include <steelyard/steelyard.hpp>

using namespace steelyard;

using Layer = MoE<bf16, TopK, SwiGlu, MicroBatchLoss, SelfComm, Dropless, KeepActivations, Cuda>;

TEST_CASE("a layer on the GPU, from the first line") {
    CudaResources gpu;  // streams, cuBLAS; or CudaResources gpu(stream) on a stream of yours
    const Layer layer({.shape = {.tokens = 512, .width = 64, .experts = 8},
                       .router = {.k = 2},
                       .expert = {.hidden = 128},
                       .device = gpu.device()});
    REQUIRE(layer.check().ok());

    // Memory of yours: most of it the GPU's, what policies do arithmetic on pinned.
    using Where = CudaBytes::Where;
    const CudaBytes params(layer.param_bytes()), grads(layer.param_bytes()), state(layer.state_bytes(), Where::pinned);
    const CudaBytes context[] = {CudaBytes(layer.context_bytes().host, Where::pinned),
                                 CudaBytes(layer.context_bytes().device)};
    const CudaBytes workspace[] = {CudaBytes(layer.workspace_bytes().host, Where::pinned),
                                   CudaBytes(layer.workspace_bytes().device)};
    const CudaBytes x(512 * 64 * 2), y(512 * 64 * 2), dy(512 * 64 * 2), dx(512 * 64 * 2);
    for (const CudaBytes* block : {&params, &grads, &x, &dy}) block->fill(0);
    REQUIRE(layer.init_state(state.span()).ok());

    const auto matrix = [](const CudaBytes& of) {
        return view<bf16, 2, CudaSpace>(reinterpret_cast<bf16*>(of.data()), 512, 64);
    };
    const auto weights = layer.read_only_params(layer.place_params(params.data()));
    const QueuedBlock kept{context[0].span(), context[1].span()}, work{workspace[0].span(), workspace[1].span()};
    // Both calls enqueue and return.
    Status status = layer.forward({}, {.x = matrix(x),
                                       .params = weights,
                                       .y = matrix(y),  // (=)
                                       .context = kept,
                                       .workspace = work,
                                       .state = state.span()});
    if (status)
        status = layer.backward({.x = matrix(x),
                                 .params = weights,
                                 .dy = matrix(dy),
                                 .dx = matrix(dx),                           // (=)
                                 .grads = layer.place_params(grads.data()),  // (+=)
                                 .context = kept,
                                 .workspace = work});
    if (status) status = gpu.synchronize();  // what went wrong on the GPU is told here
    const double loss = layer.balance_loss(kept);

    REQUIRE(status.message() == "ok");
    CHECK(loss == doctest::Approx(0.008));  // all scores are equal: the first two experts take all, with P = 1 / E
}
