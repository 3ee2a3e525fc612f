// The code of docs/embedding.md.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "steelyard/steelyard.hpp"

namespace {

using namespace steelyard;

using Layer = MoE<float, TopK, SwiGlu, SynchronizedLoss, ThreadComm>;

/// One layer of a model, on memory that the framework hands out.
struct Block {
    Layer layer;
    Layer::Params params, grads;  // views of the framework's tensors
    std::span<std::byte> state, context;

    Status forward(const ThreadComm& comm, view<const float, 2> x, view<float, 2> y,
                   std::span<std::byte> workspace, const TokenInfo<>& tokens, Stack* stack, index_t row) const {
        return layer.forward(comm, {.x = x,
                                    .params = layer.read_only_params(params),
                                    .y = y,
                                    .context = context,
                                    .workspace = workspace,
                                    .state = state,
                                    .tokens = tokens,
                                    .stack = stack,
                                    .row = row});
    }

    Status backward(view<const float, 2> x, view<const float, 2> dy, view<float, 2> dx,
                    std::span<std::byte> workspace) const {
        return layer.backward({.x = x,
                               .params = layer.read_only_params(params),
                               .dy = dy,
                               .dx = dx,
                               .grads = grads,
                               .context = context,
                               .workspace = workspace});
    }
};

/// Parameters in tensors that exist already: each view is set by hand. Rows may be padded.
Layer::Params own_tensors(const LayerShape& shape, index_t hidden, float* router, index_t router_stride, float* gate,
                          float* up, float* down) {
    Layer::Params params;
    params.router.weight = {router, shape.experts, shape.width};
    params.router.weight.strides[0] = router_stride;
    params.experts.gate = {gate, shape.experts, hidden, shape.width};
    params.experts.up = {up, shape.experts, hidden, shape.width};
    params.experts.down = {down, shape.experts, shape.width, hidden};
    return params;
}

/// A micro-step of all layers with one reduction. activation[l] is the input of layer l, gradient[l] that of it.
Status micro_step(std::span<const Block> model, const ThreadComm& comm, Stack& stack, const TokenInfo<>& tokens,
                  std::span<const view<float, 2>> activation, std::span<const view<float, 2>> gradient,
                  std::span<std::byte> workspace) {
    stack.clear();
    for (std::size_t l = 0; l < model.size(); ++l)
        if (Status s = model[l].forward(comm, activation[l], activation[l + 1], workspace, tokens, &stack,
                                        static_cast<index_t>(l));
            !s)
            return s;

    if (Status s = stack.begin(comm); !s) return s;
    // Here the loss of the model and its gradient are computed, while the counts travel.
    if (Status s = stack.end(comm); !s) return s;

    for (std::size_t l = model.size(); l-- > 0;) {
        const Block& block = model[l];
        if (Status s = block.layer.conclude(stack, static_cast<index_t>(l), block.context, workspace, block.state); !s)
            return s;
        if (Status s = block.backward(activation[l], gradient[l + 1], gradient[l], workspace); !s) return s;
    }
    return {};
}

/// The experts' weights once more, in the order in which they are read: after every optimizer step, or once for inference.
Layer::ConstParams packed_params(const Layer& layer, const Layer::Params& params, Bytes& packed, PackedFormat format) {
    const auto& expert = layer.config().expert;
    const Cpu& device = layer.config().device;
    Layer::ConstParams all = layer.read_only_params(params);
    packed = Bytes(expert.packed_bytes<float>(device, layer.shape(), format));
    throw_if_refused(expert.pack<float>(device, layer.shape(), all.experts, packed, format));
    all.experts.packed = {packed.data(), static_cast<index_t>(packed.size())};
    return all;
}

Layer::Config config(index_t hidden, std::uint32_t index) {
    return {.shape = {.tokens = 6, .width = 4, .experts = 3}, .expert = {.hidden = hidden}, .layer = index};
}

}  // namespace

TEST_CASE("two layers on a framework's memory share one reduction, and their state goes through a checkpoint") {
    constexpr index_t layers = 2, hidden = 5;
    ThreadGroup group(2);
    run_ranks(group, [&](ThreadComm comm) {
        std::vector<Bytes> memory;
        const auto take = [&](index_t bytes) { return memory.emplace_back(bytes).span(); };
        std::vector<Block> model;
        index_t workspace_bytes = 0;
        for (index_t l = 0; l < layers; ++l) {
            const Layer layer(config(hidden, static_cast<std::uint32_t>(l)));
            throw_if_refused(layer.check());
            Block block{layer, layer.place_params(take(layer.param_bytes()).data()),
                        layer.place_params(take(layer.param_bytes()).data()), take(layer.state_bytes()),
                        take(layer.context_bytes())};
            throw_if_refused(layer.init_state(block.state));
            layer.each_param(block.params, [&](const auto&, auto weights) {
                const Philox random(1, Stream::init, 0, static_cast<std::uint32_t>(l));
                for (index_t i = 0; i < weights.size(); ++i)
                    weights.data[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
            });
            workspace_bytes = std::max(workspace_bytes, layer.workspace_bytes());
            model.push_back(block);
        }
        const std::span<std::byte> workspace = take(workspace_bytes);  // one for all layers: dead between calls
        std::vector<std::int64_t> words(static_cast<std::size_t>(layers * model[0].layer.wire_words()));
        Stack stack(words, layers, model[0].layer.wire_words());

        std::vector<float> numbers(2 * (layers + 1) * 6 * 4, 0.25f);
        std::vector<view<float, 2>> activation, gradient;
        for (index_t l = 0; l <= layers; ++l) {
            activation.emplace_back(&numbers[static_cast<std::size_t>(l * 24)], 6, 4);
            gradient.emplace_back(&numbers[static_cast<std::size_t>((layers + 1 + l) * 24)], 6, 4);
        }
        TokenInfo<> tokens;
        tokens.step.total_tokens = 12;  // 6 on each of 2 ranks
        throw_if_refused(micro_step(model, comm, stack, tokens, activation, gradient, workspace));
        CHECK(model[1].layer.balance_loss(model[1].context) > 0.0);
        CHECK(model[0].layer.balance_record(model[0].context).load(0, 3) == 12);  // tokens of both ranks

        // A checkpoint is a copy of bytes; bytes of another layer are refused.
        std::vector<std::byte> saved(model[0].state.begin(), model[0].state.end());
        throw_if_refused(model[0].layer.init_state(model[0].state));
        std::copy(saved.begin(), saved.end(), model[0].state.begin());
        CHECK(model[0].layer.check_state("resume", model[0].state).ok());
        model[0].state[0] = std::byte{0};
        const Status refused = model[0].layer.check_state("resume", model[0].state);
        CHECK(refused.code() == Code::bad_state);
    });
}

TEST_CASE("parameters may lie in tensors of the caller's, with padded rows") {
    const LayerShape shape{.tokens = 6, .width = 4, .experts = 3};
    const Layer layer(config(5, 0));
    std::vector<float> router(3 * 7, 0.1f), gate(60, 0.1f), up(60, 0.1f), down(60, 0.1f), x(24, 1.0f), y(24);
    const Layer::Params params = own_tensors(shape, 5, router.data(), 7, gate.data(), up.data(), down.data());
    Bytes state(layer.state_bytes()), context(layer.context_bytes()), workspace(layer.workspace_bytes());
    throw_if_refused(layer.init_state(state));
    ThreadGroup group(1);
    const Block block{layer, params, {}, state, context};
    throw_if_refused(block.forward(group.comm(0), {x.data(), 6, 4}, {y.data(), 6, 4}, workspace, {}, nullptr, 0));
    CHECK(y[0] != 0.0f);
}

TEST_CASE("Module visits each weight together with its own gradient") {
    Module moe(MoE<float, TopK, WithShared<SwiGlu, Mlp>>(
        {.shape = {.tokens = 6, .width = 4, .experts = 3}, .expert = {.routed = {5}, .shared = {.hidden = 3}}}));
    std::vector<std::string> names;
    std::vector<const float*> weights, gradients;
    moe.each_param([&](const std::string& name, auto weight, auto gradient) {
        names.push_back(name);
        weights.push_back(weight.data);
        gradients.push_back(gradient.data);
        CHECK(weight.size() == gradient.size());
    });
    CHECK(names == std::vector<std::string>{"router.weight", "experts.gate", "experts.up", "experts.down", "shared.up",
                                            "shared.down", "shared.up_bias", "shared.down_bias"});
    CHECK(weights[3] == moe.params.experts.down.data);
    CHECK(gradients[0] == moe.grads.router.weight.data);
    CHECK(gradients[3] == moe.grads.experts.down.data);
    CHECK(gradients[5] == moe.grads.shared.down.data);
}

TEST_CASE("packed weights give forward the same bits, and fewer bits of weight nearly the same") {
    const LayerShape shape{.tokens = 6, .width = 4, .experts = 3};
    const Layer layer(config(5, 0));
    std::vector<float> router(12), gate(60), up(60), down(60), x(24), plain(24), y(24);
    for (auto* tensor : {&router, &gate, &up, &down, &x}) {
        const Philox random(tensor->size(), Stream::user);
        for (std::size_t i = 0; i < tensor->size(); ++i) (*tensor)[i] = static_cast<float>(random.normal(i));
    }
    const Layer::Params params = own_tensors(shape, 5, router.data(), 4, gate.data(), up.data(), down.data());
    Bytes state(layer.state_bytes()), context(layer.context_bytes()), workspace(layer.workspace_bytes());
    throw_if_refused(layer.init_state(state));
    ThreadGroup group(1);
    const auto forward = [&](const Layer::ConstParams& all, std::vector<float>& to) {
        throw_if_refused(layer.forward(group.comm(0), {.x = {x.data(), 6, 4},
                                                       .params = all,
                                                       .y = {to.data(), 6, 4},
                                                       .context = context,
                                                       .workspace = workspace,
                                                       .state = state}));
    };
    forward(layer.read_only_params(params), plain);
    Bytes packed;
    forward(packed_params(layer, params, packed, PackedFormat::full), y);
    CHECK(y == plain);
    for (const PackedFormat format : {PackedFormat::bf16, PackedFormat::int8}) {
        Layer::ConstParams all = packed_params(layer, params, packed, format);
        all.experts.gate = all.experts.up = all.experts.down = {};  // not needed any more
        forward(all, y);
        double off = 0, norm = 0;
        for (std::size_t i = 0; i < y.size(); ++i) off += (y[i] - plain[i]) * (y[i] - plain[i]), norm += plain[i] * plain[i];
        CHECK(off < 4e-4 * norm);  // 2 % in norm
        CHECK(off > 0);
    }
}
