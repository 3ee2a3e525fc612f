// What a layer on the CUDA device refuses before it touches a GPU: on any machine.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;

namespace {

using Layer = MoE<bf16, TopK, SwiGlu, SynchronizedLoss, SelfComm, Dropless, KeepActivations, Cuda>;
constexpr index_t tokens = 10, width = 16;

/// A device that is complete, but leads nowhere: nothing here gets so far.
Cuda nowhere() {
    static std::int64_t words[64];
    Cuda device;
    device.blas = reinterpret_cast<cublasContext*>(words);
    device.side = reinterpret_cast<CUstream_st*>(words);
    device.forked = device.joined = reinterpret_cast<CUevent_st*>(words);
    device.faults = words;
    return device;
}

struct Call {
    Layer layer{{.shape = {.tokens = tokens, .width = width, .experts = 4},
                 .router = {.k = 2},
                 .expert = {.hidden = 24},
                 .device = nowhere()}};
    std::vector<std::byte> memory = std::vector<std::byte>(std::size_t{1} << 22);
    std::size_t used = 0;
    Layer::ForwardArgs args;

    std::span<std::byte> take(index_t bytes) {
        const auto size = static_cast<std::size_t>(bytes);
        auto* begin = memory.data() + used;
        begin += (64 - reinterpret_cast<std::uintptr_t>(begin) % 64) % 64;
        used = static_cast<std::size_t>(begin - memory.data()) + size;
        REQUIRE(used <= memory.size());
        return {begin, size};
    }
    view<bf16, 2, CudaSpace> matrix() {
        return {reinterpret_cast<bf16*>(take(tokens * width * 2).data()), tokens, width};
    }
    Call() {
        args.params = layer.read_only_params(layer.place_params(take(layer.param_bytes()).data()));
        args.x = matrix(), args.y = matrix();
        args.context = {take(layer.context_bytes().host), take(layer.context_bytes().device)};
        args.workspace = {take(layer.workspace_bytes().host), take(layer.workspace_bytes().device)};
        args.state = take(layer.state_bytes());
        REQUIRE(layer.init_state(args.state).ok());
    }
    [[nodiscard]] std::string forward() const { return layer.forward({}, args).message(); }
};

}  // namespace

TEST_CASE("a layer on the GPU refuses blocks that are too small, each by its name") {
    for (const auto block : {&QueuedBlock::host, &QueuedBlock::device}) {
        const bool host = block == &QueuedBlock::host;
        Call context, workspace;
        (context.args.context.*block) = (context.args.context.*block).first(8);
        CHECK(context.forward().starts_with("steelyard: layer.forward: context." +
                                            std::string(host ? "host" : "device") + ": expected at least "));
        (workspace.args.workspace.*block) = (workspace.args.workspace.*block).first(0);
        CHECK(workspace.forward().starts_with("steelyard: layer.forward: workspace." +
                                              std::string(host ? "host" : "device") + ": expected at least "));
    }
    Call state;
    state.args.state = state.args.state.first(16);
    CHECK(state.forward().starts_with("steelyard: layer.forward: state: expected at least "));
    Call other;
    other.args.state[0] = std::byte{1};
    CHECK(other.forward().starts_with("steelyard: layer.forward: state: expected version "));
}

TEST_CASE("a layer on the GPU refuses tensors of other sizes, a mask whose tokens nobody counted, a device in parts") {
    Call call;
    call.args.y.extents[1] = width + 1;
    CHECK(call.forward() == "steelyard: layer.forward: y: expected [10, 16], came [10, 17]");

    Call masked;
    std::uint8_t mask[tokens] = {};
    masked.args.tokens.mask = view<const std::uint8_t, 1, CudaSpace>(mask, tokens);
    CHECK(masked.forward() ==
          "steelyard: layer.forward: step.total_tokens: expected the valid tokens of the whole step, which the host "
          "cannot count, came 0");

    Layer::Config config = Call().layer.config();
    config.device.faults = nullptr;
    CHECK(Layer(config).check().message() ==
          "steelyard: device: faults: expected what CudaResources made, came a null pointer");
    config.device = nowhere();
    config.router.k = 5;
    CHECK(Layer(config).check().message() ==
          "steelyard: router: top_k: expected 1 to 4 (the number of experts), came 5");
}

TEST_CASE("backward on the GPU wants the context of a forward") {
    Call call;
    CHECK(call.layer
              .backward({.x = call.args.x,
                         .params = call.args.params,
                         .dy = call.args.y,
                         .dx = call.matrix(),
                         .grads = {},
                         .context = call.args.context,
                         .workspace = call.args.workspace})
              .message() ==
          "steelyard: layer.backward: context: expected the context of a training forward, came a context that no "
          "forward has written");
}
