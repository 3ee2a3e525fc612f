// The whole layer on the CUDA device against the same layer on the CPU in double: the same policies, the same numbers.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device_memory.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::number;
using gpu::Tensor;

namespace {

template <class T, class U>
double error_in_norm(const T* got, const U* want, index_t count) {
    double off = 0.0, norm = 0.0;
    for (index_t i = 0; i < count; ++i) {
        const double a = number(got[i]), b = number(want[i]);
        off += (a - b) * (a - b), norm += b * b;
    }
    return norm == 0.0 ? std::sqrt(off) : std::sqrt(off / norm);
}

struct Sizes {
    index_t tokens = 40, width = 32, experts = 6;
    bool masked = false;
    int micro_steps = 1, steps = 1;
};

/// One layer twice.
template <class T, class Policies>
struct Pair {
    using Router = decltype(Policies::router);
    using Expert = decltype(Policies::expert);
    using Balance = decltype(Policies::balance);
    using Retention = typename Policies::Retention;
    using OnCpu = MoE<double, Router, Expert, Balance, SelfComm, Dropless, Retention>;
    using OnGpu = MoE<T, Router, Expert, Balance, SelfComm, Dropless, Retention, Cuda>;
    static constexpr double tolerance = std::is_same_v<T, bf16> ? 5e-3 : 1e-5;

    Sizes n;
    /// The first gradients replace what was there. Not of one token: its router's are small differences, and are only
    /// compared on top of other numbers.
    bool replaces = n.tokens != 1;
    LayerShape shape{.tokens = n.tokens + 3, .width = n.width, .experts = n.experts, .micro_steps = n.micro_steps};
    OnCpu cpu;
    OnGpu gpu;
    Bytes cpu_params, cpu_grads, cpu_state, cpu_context, cpu_workspace;
    CudaBytes params, grads, state, context_host, context_device, workspace_host, workspace_device;

    Pair(const Policies& policies, const Sizes& sizes, Cuda device)
        : n(sizes),
          cpu({.shape = shape, .router = policies.router, .expert = policies.expert, .balance = policies.balance}),
          gpu({.shape = shape,
               .router = policies.router,
               .expert = policies.expert,
               .balance = policies.balance,
               .device = device}),
          cpu_params(cpu.param_bytes()),
          cpu_grads(cpu.param_bytes()),
          cpu_state(cpu.state_bytes()),
          cpu_context(cpu.context_bytes()),
          cpu_workspace(cpu.workspace_bytes()),
          params(gpu.param_bytes()),
          grads(gpu.param_bytes()),
          state(gpu.state_bytes(), CudaBytes::Where::pinned),
          context_host(gpu.context_bytes().host, CudaBytes::Where::pinned),
          context_device(gpu.context_bytes().device),
          workspace_host(gpu.workspace_bytes().host, CudaBytes::Where::pinned),
          workspace_device(gpu.workspace_bytes().device) {
        REQUIRE(cpu.check().message() == "ok");
        REQUIRE(gpu.check().message() == "ok");
        for (const CudaBytes* block : {&context_host, &context_device, &workspace_host, &workspace_device})
            block->fill(0xff);
        if (context_host.size() > 0) std::memset(context_host.data(), 0, static_cast<std::size_t>(context_host.size()));
        REQUIRE(cpu.init_state(cpu_state).ok());
        REQUIRE(gpu.init_state(state.span()).ok());
        draw(cpu_params, params, 1);
        if (replaces)
            grads.fill(0xff);  // NaNs
        else
            draw(cpu_grads, grads, 2);
    }

    [[nodiscard]] QueuedBlock context() const { return {context_host.span(), context_device.span()}; }
    [[nodiscard]] QueuedBlock workspace() const { return {workspace_host.span(), workspace_device.span()}; }

    /// The same random parameters, which T holds exactly, on both sides.
    void draw(Bytes& on_cpu, const CudaBytes& on_gpu, unsigned seed) {
        auto placed = cpu.place_params(on_cpu.data());
        auto far = gpu.place_params(on_gpu.data());
        std::vector<std::byte> raw(static_cast<std::size_t>(on_gpu.size()));
        std::vector<std::byte*> begins;
        gpu.each_param(far, [&](const std::string&, auto tensor) {
            begins.push_back(raw.data() + (reinterpret_cast<std::byte*>(tensor.data) - on_gpu.data()));
        });
        std::size_t which = 0;
        cpu.each_param(placed, [&](const std::string&, auto tensor) {
            const double spread = 1.0 / std::sqrt(static_cast<double>(n.width));
            const Host<T> numbers = gpu::random<T>(1, tensor.size(), seed + 10 * static_cast<unsigned>(which), spread);
            for (index_t i = 0; i < tensor.size(); ++i) tensor.data[i] = number(numbers(0, i));
            std::memcpy(begins[which++], numbers.data.data(), static_cast<std::size_t>(tensor.size()) * sizeof(T));
        });
        on_gpu.upload(raw.data(), on_gpu.size());
    }
    void compare_grads() {
        auto placed = cpu.place_params(cpu_grads.data());
        auto far = gpu.place_params(grads.data());
        std::vector<std::byte> raw(static_cast<std::size_t>(grads.size()));
        grads.download(raw.data(), grads.size());
        std::vector<const T*> begins;
        gpu.each_param(far, [&](const std::string&, auto tensor) {
            begins.push_back(
                reinterpret_cast<const T*>(raw.data() + (reinterpret_cast<std::byte*>(tensor.data) - grads.data())));
        });
        std::size_t which = 0;
        cpu.each_param(placed, [&](const std::string& name, auto tensor) {
            CAPTURE(name);
            CHECK(error_in_norm(begins[which++], tensor.data, tensor.size()) < tolerance);
        });
    }

    void step(int at_step, int micro_step) {
        CAPTURE(at_step);
        CAPTURE(micro_step);
        const unsigned seed = static_cast<unsigned>(100 * at_step + 10 * micro_step);
        const Host<T> x = gpu::random<T>(n.tokens, n.width, seed + 1), dy = gpu::random<T>(n.tokens, n.width, seed + 2);
        const Host<double> wide_x = x.template as<double>(), wide_dy = dy.template as<double>();
        Host<std::uint8_t> mask(1, n.tokens, 1);
        std::int64_t valid = n.tokens;
        for (index_t t = 0; n.masked && t < n.tokens; t += 3) mask(0, t) = 0, --valid;
        const Write write_grads = replaces && at_step == 0 && micro_step == 0 ? Write::assign : Write::add;
        const StepInfo at{.step = at_step, .micro_step = micro_step, .total_tokens = valid * n.micro_steps};

        Host<double> y(n.tokens, n.width), dx(n.tokens, n.width);
        TokenInfo<> tokens{.step = at};
        if (n.masked) tokens.mask = mask.line();
        REQUIRE(cpu.forward({}, {.x = wide_x.get(),
                                 .params = cpu.read_only_params(cpu.place_params(cpu_params.data())),
                                 .y = y.get(),
                                 .context = cpu_context,
                                 .workspace = cpu_workspace,
                                 .state = cpu_state,
                                 .tokens = tokens})
                    .message() == "ok");

        const Tensor<T> far_x(x), far_dy(dy);
        const Tensor<T> far_y(n.tokens, n.width), far_dx(n.tokens, n.width, 8);
        const Tensor<std::uint8_t> far_mask(mask);
        TokenInfo<CudaSpace> far_tokens{.step = at};
        if (n.masked) far_tokens.mask = far_mask.line();
        const auto far_params = gpu.read_only_params(gpu.place_params(params.data()));
        REQUIRE(gpu.forward({}, {.x = far_x.get(),
                                 .params = far_params,
                                 .y = far_y.get(),
                                 .context = context(),
                                 .workspace = workspace(),
                                 .state = state.span(),
                                 .tokens = far_tokens,
                                 .tokens_of_rank = {n.masked ? &valid : nullptr, 1}})
                    .message() == "ok");
        REQUIRE(gpu.backward({.x = far_x.get(),
                              .params = far_params,
                              .dy = far_dy.get(),
                              .dx = far_dx.get(),
                              .grads = gpu.place_params(grads.data()),
                              .context = context(),
                              .workspace = workspace(),
                              .write_grads = write_grads})
                    .message() == "ok");
        gpu::finish();
        REQUIRE(gpu.summed(context()).ok());
        CHECK(error_in_norm(far_y.host().data.data(), y.data.data(), y.rows * y.columns) < tolerance);
        CHECK(gpu.balance_loss(context()) == doctest::Approx(cpu.balance_loss(cpu_context)).epsilon(1e-5));

        REQUIRE(cpu.backward({.x = wide_x.get(),
                              .params = cpu.read_only_params(cpu.place_params(cpu_params.data())),
                              .dy = wide_dy.get(),
                              .dx = dx.get(),
                              .grads = cpu.place_params(cpu_grads.data()),
                              .context = cpu_context,
                              .workspace = cpu_workspace,
                              .write_grads = write_grads})
                    .message() == "ok");
        CHECK(error_in_norm(far_dx.host().data.data(), dx.data.data(), dx.rows * dx.columns) < tolerance);
    }

    void run() {
        for (int s = 0; s < n.steps; ++s) {
            for (int m = 0; m < n.micro_steps; ++m) step(s, m);
            REQUIRE(cpu.end_step({}, s, cpu_state, cpu_workspace).ok());
            REQUIRE(gpu.end_step({}, s, state.span(), workspace()).ok());
        }
        compare_grads();
    }
};

template <class RouterT, class ExpertT, class BalanceT, class RetentionT = KeepActivations>
struct Policies {
    using Retention = RetentionT;
    RouterT router;
    ExpertT expert;
    BalanceT balance = {};
};

template <class T, class P>
void compare(const P& policies, const Sizes& sizes, CudaExperts experts = CudaExperts::automatic) {
    Cuda device = gpu::device();
    device.experts = experts;
    Pair<T, P>(policies, sizes, device).run();
}

}  // namespace

TEST_CASE_TEMPLATE("a layer on the GPU is the CPU's: no balance, several experts", T, float, bf16) {
    for (const index_t tokens : {index_t{0}, index_t{1}, index_t{33}, index_t{300}}) {
        CAPTURE(tokens);
        const Sizes n{.tokens = tokens, .width = 64, .experts = 5};
        compare<T>(Policies<TopK, SwiGlu, NoBalance>{{.k = 2}, {.hidden = 72}}, n);
        compare<T>(Policies<TopK, SwiGlu, NoBalance>{{.k = 2}, {.hidden = 72}}, n, CudaExperts::looped);
        compare<T>(Policies<TopK, Mlp, NoBalance>{{.k = 5, .score = Score::sigmoid, .scale = 2.5}, {.hidden = 40}}, n);
    }
}

TEST_CASE_TEMPLATE("a layer on the GPU with each balance", T, float, bf16) {
    const TopK router{.k = 2};
    const SwiGlu expert{.hidden = 32};
    for (const bool masked : {false, true}) {
        CAPTURE(masked);
        const Sizes n{.masked = masked, .micro_steps = 2, .steps = 3};
        const MicroBatchLoss micro{{}, {.coefficient = 0.5}};
        const SynchronizedLoss synchronized{{}, {.coefficient = 0.5}};
        compare<T>(Policies<TopK, SwiGlu, MicroBatchLoss>{router, expert, micro}, n);
        compare<T>(Policies<TopK, SwiGlu, SynchronizedLoss>{router, expert, synchronized}, n);
        compare<T>(Policies<TopK, SwiGlu, ShuffledLoss>{router, expert, ShuffledLoss{{}, {.coefficient = 0.5}}}, n);
        compare<T>(Policies<TopK, SwiGlu, BufferedLoss>{router, expert, BufferedLoss{{}, {.coefficient = 0.5}}}, n);
        compare<T>(
            Policies<TopK, SwiGlu, LossFree>{{.k = 2, .score = Score::sigmoid}, expert, LossFree{{}, {.rate = 0.1}}},
            n);
        using All = AllOf<SynchronizedLoss, RouterZLoss>;
        compare<T>(
            Policies<TopK, SwiGlu, All>{router, expert, All(synchronized, RouterZLoss{{}, {.coefficient = 0.1}})}, n);
    }
}

TEST_CASE_TEMPLATE("a layer on the GPU that recomputes, with a shared expert, with many rows an expert", T, float,
                   bf16) {
    const Sizes n{.tokens = 130, .width = 64, .experts = 8};
    compare<T>(Policies<TopK, SwiGlu, MicroBatchLoss, RecomputeActivations>{{.k = 2}, {.hidden = 64}}, n);
    compare<T>(Policies<TopK, WithShared<SwiGlu>, MicroBatchLoss>{{.k = 2},
                                                                  {.routed = {.hidden = 64}, .shared = {.hidden = 96}}},
               n);
    // More than half a tile of 128: blocks work in pairs.
    compare<T>(Policies<TopK, SwiGlu, MicroBatchLoss>{{.k = 2}, {.hidden = 64}},
               {.tokens = 130, .width = 64, .experts = 2});
}
