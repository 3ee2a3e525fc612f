// Two layers on the GPU with all their memory, trained for two steps: for what must not change how they are summed.
#pragma once

#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/device_memory.hpp"
#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

namespace gpu {

/// Work at the end of a stream that lasts until `open`, or, so that a test ends, for ten seconds.
class Gate {
public:
    explicit Gate(CUstream_st* stream) { REQUIRE(cudaLaunchHostFunc(stream, wait, this) == cudaSuccess); }
    Gate(const Gate&) = delete;
    Gate& operator=(const Gate&) = delete;
    /// The stream must not see it go.
    ~Gate() { open(); }

    void open() {
        open_ = true;
        while (!passed_) std::this_thread::yield();
    }
    [[nodiscard]] bool passed() const { return passed_; }

private:
    static void wait(void* self) {
        auto& gate = *static_cast<Gate*>(self);
        for (int i = 0; i < 10000 && !gate.open_; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        gate.passed_ = true;
    }
    std::atomic<bool> open_ = false, passed_ = false;
};

/// How the sums of a model's layers are made, and whether the GPU stands still until all calls of a step have returned.
struct Way {
    bool stacked = false, gated = false;
};

/// What a model leaves behind.
struct Trained {
    std::vector<Host<bf16>> y, dx;  // by step, call and layer
    std::vector<double> losses;
    std::vector<std::vector<std::byte>> grads, states;  // of each layer
};

template <class BalanceT, class CommT>
class Model {
public:
    using Layer = steelyard::MoE<bf16, steelyard::TopK, steelyard::SwiGlu, BalanceT, CommT, steelyard::Dropless,
                                 steelyard::KeepActivations, steelyard::Cuda>;
    static constexpr index_t tokens = 200, width = 64, experts = 6;

    Model(const BalanceT& balance, const steelyard::Cuda& device) : device_(device) {
        for (std::uint32_t l = 0; l < 2; ++l)
            layers_.push_back(std::make_unique<Of>(
                Layer({.shape = {.tokens = tokens, .width = width, .experts = experts, .micro_steps = 2},
                       .router = {.k = 2, .score = steelyard::Score::sigmoid},
                       .expert = {.hidden = 96},
                       .balance = balance,
                       .device = device,
                       .layer = l})));
        const Layer& layer = layers_[0]->layer;
        workspace_host_ = CudaBytes(layer.workspace_bytes().host, CudaBytes::Where::pinned);
        workspace_device_ = CudaBytes(layer.workspace_bytes().device);
        words_ = std::max(layer.wire_words(), layer.step_words());
    }

    /// Two steps of two micro-steps, the second of which is replayed.
    Trained train(const CommT& comm, Way way = {}) {
        const CudaBytes rows(2 * words_ * 8 + 8, CudaBytes::Where::pinned);
        typename Layer::Stack stack(
            {reinterpret_cast<std::int64_t*>(rows.data()), static_cast<std::size_t>(2 * words_)}, 2, words_, device_);
        Trained all;
        for (int step = 0; step < 2; ++step) {
            std::vector<std::unique_ptr<Tensors>> tensors;
            for (const int micro_step : micro_steps) tensors.push_back(std::make_unique<Tensors>(step, micro_step));
            std::unique_ptr<Gate> gate;
            if (way.gated) gate = std::make_unique<Gate>(device_.stream);
            for (std::size_t call = 0; call < micro_steps.size(); ++call)
                run(comm, step, call, *tensors[call], way.stacked ? &stack : nullptr);
            if (way.gated) {
                CHECK_FALSE(gate->passed());  // nobody waited
                gate->open();
            }
            finish();
            for (std::size_t call = 0; call < micro_steps.size(); ++call)
                for (std::size_t l = 0; l < 2; ++l) {
                    const auto context = layers_[l]->context(call);
                    CHECK(layers_[l]->layer.summed(context).message() == "ok");
                    all.y.push_back(tensors[call]->y[l].host()), all.dx.push_back(tensors[call]->dx[l].host());
                    all.losses.push_back(layers_[l]->layer.balance_loss(context));
                }
            end(comm, step, way.stacked ? &stack : nullptr);
        }
        finish();
        for (const auto& of : layers_) {
            all.grads.emplace_back(static_cast<std::size_t>(of->grads.size()));
            of->grads.download(all.grads.back().data(), of->grads.size());
            const auto state = of->state.span();
            all.states.emplace_back(state.begin(), state.end());
        }
        return all;
    }

private:
    static constexpr std::array<int, 3> micro_steps = {0, 1, 1};

    struct Of {
        explicit Of(const Layer& value)
            : layer(value),
              params(layer.param_bytes()),
              grads(layer.param_bytes()),
              state(layer.state_bytes(), CudaBytes::Where::pinned) {
            REQUIRE(layer.check().message() == "ok");
            state.fill(0);
            REQUIRE(layer.init_state(state.span()).ok());
            const Host<bf16> numbers = random<bf16>(1, layer.param_bytes() / 2, 7 + layer.config().layer, 0.2);
            params.upload(numbers.data.data(), layer.param_bytes());
            grads.fill(0);
            for (std::size_t call = 0; call < micro_steps.size(); ++call) {
                context_host.emplace_back(layer.context_bytes().host, CudaBytes::Where::pinned);
                context_host.back().fill(0);
                context_device.emplace_back(layer.context_bytes().device);
            }
        }
        [[nodiscard]] steelyard::QueuedBlock context(std::size_t call) const {
            return {context_host[call].span(), context_device[call].span()};
        }
        [[nodiscard]] auto weights() const { return layer.read_only_params(layer.place_params(params.data())); }

        Layer layer;
        CudaBytes params, grads, state;
        std::vector<CudaBytes> context_host, context_device;
    };
    /// Of one call of both layers.
    struct Tensors {
        std::vector<Tensor<bf16>> x, dy, y, dx;
        Tensors(int step, int micro_step) {
            for (unsigned l = 0; l < 2; ++l) {
                const auto seed = static_cast<unsigned>(100 * step + 10 * micro_step) + l;
                x.emplace_back(random<bf16>(tokens, width, seed));
                dy.emplace_back(random<bf16>(tokens, width, seed + 50));
                y.emplace_back(tokens, width), dx.emplace_back(tokens, width);
            }
        }
    };

    [[nodiscard]] steelyard::QueuedBlock workspace() const {
        return {workspace_host_.span(), workspace_device_.span()};
    }

    void run(const CommT& comm, int step, std::size_t call, const Tensors& of, typename Layer::Stack* stack) {
        if (stack != nullptr) stack->clear();
        for (std::size_t l = 0; l < 2; ++l) {
            const Of& at = *layers_[l];
            REQUIRE(at.layer
                        .forward(comm, {.x = of.x[l].get(),
                                        .params = at.weights(),
                                        .y = of.y[l].get(),
                                        .context = at.context(call),
                                        .workspace = workspace(),
                                        .state = at.state.span(),
                                        .tokens = {.step = {.step = step,
                                                            .micro_step = micro_steps[call],
                                                            .total_tokens = 2 * tokens}},
                                        .stack = stack,
                                        .row = static_cast<index_t>(l)})
                        .message() == "ok");
        }
        if (stack != nullptr) {
            REQUIRE(stack->begin(comm).message() == "ok");
            REQUIRE(stack->end(comm).message() == "ok");
        }
        for (std::size_t l = 0; l < 2; ++l) {
            const Of& at = *layers_[l];
            if (stack != nullptr)
                REQUIRE(
                    at.layer.conclude(*stack, static_cast<index_t>(l), at.context(call), workspace(), at.state.span())
                        .message() == "ok");
            REQUIRE(at.layer
                        .backward({.x = of.x[l].get(),
                                   .params = at.weights(),
                                   .dy = of.dy[l].get(),
                                   .dx = of.dx[l].get(),
                                   .grads = at.layer.place_params(at.grads.data()),
                                   .context = at.context(call),
                                   .workspace = workspace()})
                        .message() == "ok");
        }
    }
    void end(const CommT& comm, int step, typename Layer::Stack* stack) {
        if (stack == nullptr) {
            for (const auto& of : layers_)
                REQUIRE(of->layer.end_step(comm, step, of->state.span(), workspace()).message() == "ok");
            return;
        }
        stack->clear();
        for (index_t l = 0; l < 2; ++l) {
            const Of& of = *layers_[static_cast<std::size_t>(l)];
            REQUIRE(of.layer.post_step(*stack, l, step, of.state.span()).message() == "ok");
        }
        REQUIRE(stack->begin(comm).message() == "ok");
        REQUIRE(stack->end(comm).message() == "ok");
        for (index_t l = 0; l < 2; ++l) {
            const Of& of = *layers_[static_cast<std::size_t>(l)];
            REQUIRE(of.layer.end_step(*stack, l, step, of.state.span()).message() == "ok");
        }
    }

    steelyard::Cuda device_;
    std::vector<std::unique_ptr<Of>> layers_;
    CudaBytes workspace_host_, workspace_device_;
    index_t words_ = 0;
};

inline void check_same(const Trained& a, const Trained& b) {
    REQUIRE(a.y.size() == b.y.size());
    for (std::size_t i = 0; i < a.y.size(); ++i) {
        CAPTURE(i);
        CHECK(a.y[i].same(b.y[i]));
        CHECK(a.dx[i].same(b.dx[i]));
    }
    CHECK(a.losses == b.losses);
    CHECK(a.grads == b.grads);
    CHECK(a.states == b.states);
}

/// A model of its own, trained.
template <class BalanceT, class CommT>
Trained train(const CommT& comm, const BalanceT& balance, Way way = {},
              steelyard::CudaExperts experts = steelyard::CudaExperts::automatic) {
    return Model<BalanceT, CommT>(balance, resources().device(experts)).train(comm, way);
}

}  // namespace gpu
