#include "steelyard/cuda/router.hpp"

#include <doctest/doctest.h>

#include <limits>

#include "cuda/device_memory.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/router.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::Tensor;
using ops = router_ops<Cuda>;

namespace {

using Mask = std::vector<std::uint8_t>;

Mask mask_of(index_t tokens, bool masked) {
    Mask mask(static_cast<std::size_t>(tokens + 1), 1);
    for (std::size_t t = 0; masked && t < mask.size(); ++t) mask[t] = t % 3 != 1 ? 1 : 0;
    return mask;
}
view<const std::uint8_t, 1> on_host(const Mask& mask, bool masked) {
    return {masked ? mask.data() : nullptr, static_cast<index_t>(mask.size()) - 1};
}
Host<std::uint8_t> as_host(const Mask& mask) {
    Host<std::uint8_t> out(1, static_cast<index_t>(mask.size()) - 1);
    std::copy_n(mask.begin(), mask.size() - 1, out.data.begin());
    return out;
}
view<const std::uint8_t, 1, CudaSpace> on_gpu(const Tensor<std::uint8_t>& mask, bool masked) {
    return masked ? mask.line() : view<std::uint8_t, 1, CudaSpace>{};
}

/// A routing on either side.
template <class T>
struct HostRouting {
    Host<T> logits, probs, weight;
    Host<expert_t> expert;
    HostRouting(const Host<float>& z, index_t top_k)
        : logits(z.as<T>()), probs(z.rows, z.columns), weight(z.rows, top_k), expert(z.rows, top_k, expert_t{-9}) {}
    Routing<T> get() { return {logits.get(), probs.get(), expert.get(), weight.get()}; }
};
struct GpuRouting {
    Tensor<float> logits, probs, weight;
    Tensor<expert_t> expert;
    GpuRouting(const Host<float>& z, index_t top_k)
        : logits(z, 3), probs(z.rows, z.columns, 1), weight(z.rows, top_k, 2), expert(z.rows, top_k, 1) {}
    [[nodiscard]] Routing<float, CudaSpace> get() const {
        return {logits.get(), probs.get(), expert.get(), weight.get()};
    }
};

struct Case {
    index_t experts;
    int top_k, groups = 1, kept = 1;
};
const Case cases[] = {{1, 1},     {3, 2},         {8, 8},   {33, 4},          {64, 6, 8, 3}, {160, 6, 8, 3},
                      {160, 160}, {256, 8, 8, 4}, {512, 2}, {512, 20, 32, 7}, {1000, 16}};

template <class Body>
void each_rule(const Case& c, Body&& body) {
    for (const Score score : {Score::softmax, Score::sigmoid})
        for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized})
            for (const GroupScore group : {GroupScore::max, GroupScore::top2_sum}) {
                if (c.kept == c.groups && group == GroupScore::top2_sum) continue;
                CAPTURE(c.experts);
                CAPTURE(c.top_k);
                CAPTURE(static_cast<int>(score));
                CAPTURE(static_cast<int>(weight));
                CAPTURE(static_cast<int>(group));
                body(SelectionRule{c.top_k, score, weight, 2.5, c.groups, c.kept, group});
            }
}

template <class T>
Bytes cpu_scratch(index_t tokens, index_t width, index_t experts) {
    return Bytes(router_ops<Cpu>::scratch_bytes<T>(Cpu{}, {.tokens = tokens, .width = width, .experts = experts}));
}

/// Whether the CPU rounds what it compares as kernels do.
constexpr bool rounds_alike = compiled_isa >= Isa::avx512;

}  // namespace

TEST_CASE("selection chooses what the CPU chooses") {
    for (const Case& c : cases)
        each_rule(c, [&](const SelectionRule& rule) {
            for (const index_t tokens : {0, 1, 31, 33, 1000})
                for (const bool biased : {false, true}) {
                    const bool masked = tokens % 2 == 1;
                    CAPTURE(tokens);
                    CAPTURE(biased);
                    Host<float> z = gpu::random<float>(tokens, c.experts, 5, tokens == 33 ? 1e-3 : 3.0);
                    if (tokens == 1000)  // ties, and a row of nothing else
                        for (std::size_t i = 0; i < z.data.size(); i += 2) z.data[i] = i < 2000 ? 1.5f : z.data[i / 2];
                    Host<float> bias = gpu::random<float>(1, c.experts, 6, 1e-3);
                    const Mask mask = mask_of(tokens, masked);
                    HostRouting<float> want(z, c.top_k);
                    const Bytes scratch = cpu_scratch<float>(tokens, 1, c.experts);
                    const view<const float, 1> host_bias(biased ? bias.data.data() : nullptr, c.experts);
                    REQUIRE(router_ops<Cpu>::select<float>(Cpu{}, rule, host_bias, on_host(mask, masked), want.get(),
                                                           scratch.data()) == -1);
                    const Tensor<std::uint8_t> gpu_mask(as_host(mask));
                    const Tensor<float> gpu_bias(bias);
                    for (int run = 0; run < 2; ++run) {
                        const GpuRouting got(z, c.top_k);
                        REQUIRE(ops::select<float>(gpu::device(), rule,
                                                   biased ? gpu_bias.line() : view<float, 1, CudaSpace>{},
                                                   on_gpu(gpu_mask, masked), got.get(), nullptr) == -1);
                        gpu::finish();
                        const Host<float> probs = got.probs.host(), weight = got.weight.host();
                        gpu::require_close(probs, want.probs, 2e-6);
                        const bool exact = (!biased && c.kept == c.groups) || (rounds_alike && c.top_k <= 16);
                        if (!exact) continue;  // what is within rounding may tie
                        REQUIRE(got.expert.host().same(want.expert));
                        gpu::require_close(weight, want.weight, 4e-6);
                        if (rounds_alike && c.top_k <= 16) {
                            WARN(probs.same(want.probs));
                            WARN(weight.same(want.weight));
                        }
                    }
                }
        });
}

TEST_CASE("a row that is not finite has distinct experts and is reported") {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    for (const bool biased : {false, true}) {
        const index_t tokens = 200, experts = 40, top_k = 6;
        Host<float> z = gpu::random<float>(tokens, experts, 1);
        for (const index_t t : {199, 90, 17, 18}) z(t, t % experts) = t == 18 ? infinity : nan;
        for (index_t e = 0; e < experts; ++e) z(120, e) = nan;
        z(3, 3) = nan;  // masked
        Mask mask(static_cast<std::size_t>(tokens + 1), 1);
        mask[3] = 0;
        const Tensor<std::uint8_t> gpu_mask(as_host(mask));
        const Tensor<float> bias(gpu::random<float>(1, experts, 2));
        const GpuRouting got(z, top_k);
        const SelectionRule rule{static_cast<int>(top_k)};
        ops::select<float>(gpu::device(), rule, biased ? bias.line() : view<float, 1, CudaSpace>{}, gpu_mask.line(),
                           got.get(), nullptr);
        const Status status = gpu::resources().synchronize();
        REQUIRE(status.code() == Code::not_finite);
        CHECK(status.tensor() == "logits of token 17");
        const Host<expert_t> expert = got.expert.host();
        for (index_t t = 0; t < tokens; ++t) {
            CAPTURE(t);
            std::vector<bool> seen(static_cast<std::size_t>(experts));
            for (index_t k = 0; k < top_k; ++k) {
                const expert_t e = expert(t, k);
                REQUIRE((e == -1) == (t == 3));
                if (e < 0) continue;
                REQUIRE(e < experts);
                REQUIRE(!seen[static_cast<std::size_t>(e)]);
                seen[static_cast<std::size_t>(e)] = true;
            }
        }
        if (!biased) {  // a NaN ranks last, an infinity first
            CHECK(expert(18, 0) == 18);
            for (index_t k = 0; k < top_k; ++k) CHECK(expert(17, k) != 17);
        }
        gpu::finish();  // reported once
    }
}

TEST_CASE("choices of others are weighed, and gradients go back") {
    for (const Case& c : cases)
        each_rule(c, [&](const SelectionRule& rule) {
            if (c.kept < c.groups) return;
            for (const index_t tokens : {0, 1, 33, 300}) {
                CAPTURE(tokens);
                const bool masked = tokens != 1;
                const Host<float> z = gpu::random<float>(tokens, c.experts, 3, 2.0);
                const Mask mask = mask_of(tokens, masked);
                const Tensor<std::uint8_t> gpu_mask(as_host(mask));
                Host<expert_t> chosen(tokens, c.top_k);
                for (index_t t = 0; t < tokens; ++t)
                    for (index_t k = 0; k < c.top_k; ++k)
                        chosen(t, k) = (t + k) % 4 == 3 || t % 7 == 5 ? -1 : static_cast<expert_t>((t + k) % c.experts);
                HostRouting<double> want(z, c.top_k);
                want.expert = chosen;
                const Bytes scratch = cpu_scratch<double>(tokens, 1, c.experts);
                router_ops<Cpu>::weigh<double>(Cpu{}, rule, on_host(mask, masked), want.get(), scratch.data());
                GpuRouting got(z, c.top_k);
                got.expert = Tensor<expert_t>(chosen, 1);
                REQUIRE(ops::weigh<float>(gpu::device(), rule, on_gpu(gpu_mask, masked), got.get(), nullptr) == -1);
                gpu::finish();
                REQUIRE(got.expert.host().same(want.expert));
                gpu::require_close(got.probs.host(), want.probs, 4e-6);
                gpu::require_close(got.weight.host(), want.weight, 4e-6);

                const Host<float> dweight = gpu::random<float>(tokens, c.top_k, 7);
                const Host<float> dprobs = gpu::random<float>(tokens, c.experts, 8);
                for (const int absent : {0, 1, 2}) {
                    CAPTURE(absent);
                    Host<float> before = gpu::random<float>(tokens, c.experts, 9);
                    for (index_t t = 0; t < tokens; ++t)
                        if (masked && mask[static_cast<std::size_t>(t)] == 0)
                            before(t, 0) = std::numeric_limits<float>::quiet_NaN();
                    Host<double> dlogits = before.as<double>(), w = dweight.as<double>(), p = dprobs.as<double>();
                    const RoutingGrad<double> host_grad{absent == 1 ? view<double, 2>{} : w.get(),
                                                        absent == 2 ? view<double, 2>{} : p.get(), dlogits.get()};
                    router_ops<Cpu>::select_backward<double>(Cpu{}, rule, on_host(mask, masked), want.get(), host_grad);
                    Host<float> first(0, 0);
                    for (int run = 0; run < 2; ++run) {
                        const Tensor<float> gpu_w(dweight, 1), gpu_p(dprobs), gpu_z(before, 2);
                        const RoutingGrad<float, CudaSpace> grad{
                            absent == 1 ? view<float, 2, CudaSpace>{} : gpu_w.get(),
                            absent == 2 ? view<float, 2, CudaSpace>{} : gpu_p.get(), gpu_z.get()};
                        ops::select_backward<float>(gpu::device(), rule, on_gpu(gpu_mask, masked), got.get(), grad);
                        gpu::finish();
                        const Host<float> out = gpu_z.host();
                        gpu::require_close(out, dlogits, 2e-5);
                        if (run == 0) first = out;
                        REQUIRE(out.same(first));
                    }
                }
            }
        });
}

TEST_CASE("all experts for every valid token") {
    for (const index_t tokens : {0, 1, 70}) {
        const index_t experts = 5;
        const Mask mask = mask_of(tokens, true);
        const Tensor<std::uint8_t> gpu_mask(as_host(mask));
        const Host<float> z(tokens, experts);
        HostRouting<float> want(z, experts);
        router_ops<Cpu>::take_all<float>(Cpu{}, on_host(mask, true), want.get());
        const GpuRouting got(z, experts);
        ops::take_all<float>(gpu::device(), gpu_mask.line(), got.get());
        gpu::finish();
        CHECK(got.expert.host().same(want.expert));
        CHECK(got.weight.host().same(want.weight));
        CHECK(got.probs.host().same(want.probs));
        CHECK(got.logits.host().same(want.logits));
    }
}

TEST_CASE_TEMPLATE("logits and their gradients", T, float, bf16) {
    constexpr bool is_float = std::is_same_v<T, float>;
    struct Sizes {
        index_t tokens, width, experts;
    };
    for (const Sizes n : {Sizes{0, 8, 3},
                          {1, 1, 1},
                          {1, 64, 8},
                          {31, 20, 3},
                          {33, 7, 160},
                          {300, 128, 8},
                          {1000, 96, 512},
                          {5000, 40, 16}})
        for (const bool noisy : {false, true})
            for (const bool masked : {false, true}) {
                CAPTURE(n.tokens);
                CAPTURE(n.width);
                CAPTURE(n.experts);
                CAPTURE(noisy);
                CAPTURE(masked);
                // Jitter rounds x to bf16 again, where the reference does not.
                const double relative = is_float ? 1e-5 : noisy ? 1e-2 : 8e-3;  // a unit of bf16 is 2^-7
                RouterNoise noise;
                if (noisy) noise = {.jitter = 0.1, .noise = 0.3, .seed = 9, .step = {.step = 4, .token_offset = 11}};
                const Mask mask = mask_of(n.tokens, masked);
                const Tensor<std::uint8_t> gpu_mask(as_host(mask));
                const auto invalid = [&](index_t t) { return masked && mask[static_cast<std::size_t>(t)] == 0; };
                Host<T> x = gpu::random<T>(n.tokens, n.width, 1);
                const Host<T> w = gpu::random<T>(n.experts, n.width, 2);
                const index_t padding = n.width % 8 == 0 ? 8 : 0;
                const Tensor<T> gpu_x(x, padding), gpu_w(w, padding);
                const LayerShape shape{.tokens = n.tokens, .width = n.width, .experts = n.experts};
                const CudaBytes scratch = gpu::scratch(ops::scratch_bytes<T>(gpu::device(), shape));
                const Bytes host_scratch = cpu_scratch<double>(n.tokens, n.width, n.experts);

                Host<double> want(n.tokens, n.experts);
                const Host<double> x_double = x.template as<double>(), w_double = w.template as<double>();
                router_ops<Cpu>::logits<double>(Cpu{}, x_double.get(), w_double.get(), noise, want.get(),
                                                host_scratch.data());
                Host<float> first(0, 0);
                for (int run = 0; run < 2; ++run) {
                    const Tensor<float> logits(n.tokens, n.experts, 1);
                    ops::logits<T>(gpu::device(), gpu_x.get(), gpu_w.get(), noise, logits.get(), scratch.data());
                    gpu::finish();
                    const Host<float> got = logits.host();
                    if (n.experts > 1) gpu::require_close(got, want, relative);
                    if (run == 0) first = got;
                    REQUIRE(got.same(first));
                }

                Host<float> slope = gpu::random<float>(n.tokens, n.experts, 3);
                for (index_t t = 0; t < n.tokens; ++t)
                    if (invalid(t)) {
                        for (index_t e = 0; e < n.experts; ++e) slope(t, e) = 0.0f;
                        for (index_t j = 0; j < n.width; ++j) x(t, j) = T(std::numeric_limits<float>::quiet_NaN());
                    }
                const Host<T> dx = gpu::random<T>(n.tokens, n.width, 4), dw = gpu::random<T>(n.experts, n.width, 5);
                Host<double> want_dx = dx.template as<double>(), want_dw = dw.template as<double>();
                const Host<double> slope_double = slope.as<double>(), x_poisoned = x.template as<double>();
                router_ops<Cpu>::logits_backward<double>(Cpu{}, x_poisoned.get(), on_host(mask, masked), w_double.get(),
                                                         noise, slope_double.get(), want_dx.get(), want_dw.get(),
                                                         host_scratch.data());
                const Tensor<T> poisoned(x, padding);
                const Tensor<float> gpu_slope(slope, 2);
                Host<T> first_dx(0, 0), first_dw(0, 0);
                for (int run = 0; run < 2; ++run) {
                    const Tensor<T> gpu_dx(dx, padding), gpu_dw(dw, padding);
                    ops::logits_backward<T>(gpu::device(), poisoned.get(), on_gpu(gpu_mask, masked), gpu_w.get(), noise,
                                            gpu_slope.get(), gpu_dx.get(), gpu_dw.get(), scratch.data());
                    gpu::finish();
                    const Host<T> got_dx = gpu_dx.host(), got_dw = gpu_dw.host();
                    gpu::require_close(got_dx, want_dx, relative, 1.0);
                    gpu::require_close(got_dw, want_dw, relative, 1.0);
                    if (run == 0) first_dx = got_dx, first_dw = got_dw;
                    REQUIRE(got_dx.same(first_dx));
                    REQUIRE(got_dw.same(first_dw));
                }
                // Either may be absent.
                const Tensor<T> alone(dw, padding);
                ops::logits_backward<T>(gpu::device(), poisoned.get(), on_gpu(gpu_mask, masked), gpu_w.get(), noise,
                                        gpu_slope.get(), view<T, 2, CudaSpace>{}, alone.get(), scratch.data());
                gpu::finish();
                REQUIRE(alone.host().same(first_dw));

                // A bias, and its gradient.
                const Host<T> bias = gpu::random<T>(1, n.experts, 6);
                const Tensor<T> gpu_bias(bias);
                const Tensor<float> biased(slope, 1);
                ops::add_bias<T>(gpu::device(), gpu_bias.line(), biased.get());
                gpu::finish();
                Host<double> sums = bias.template as<double>(), raised = slope.as<double>();
                for (index_t t = 0; t < n.tokens; ++t)
                    for (index_t e = 0; e < n.experts; ++e)
                        sums(0, e) += gpu::number(slope(t, e)), raised(t, e) += gpu::number(bias(0, e));
                gpu::require_close(biased.host(), raised, 1e-6);
                ops::bias_backward<T>(gpu::device(), gpu_slope.get(), gpu_bias.line());
                gpu::finish();
                gpu::require_close(gpu_bias.host(), sums, is_float ? 1e-6 : 5e-3);
            }
}
