// How long the operations take on the GPU, beside a copy of what they move. Left out of ctest:
//     test_cuda --no-skip --test-case="speed*"
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "cuda/device_memory.hpp"
#include "steelyard/balance/z_loss.hpp"
#include "steelyard/cuda.hpp"

using namespace steelyard;
using gpu::Pinned;
using gpu::Tensor;

namespace {

/// Microseconds of one call among many, the best of five times.
template <class Call>
double time_of(Call&& call) {
    constexpr int calls = 20;
    double best = 1e30;
    for (int run = 0; run < 6; ++run) {  // the first warms up
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < calls; ++i) call();
        gpu::finish();
        const double us =
            std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / calls;
        if (run > 0) best = std::min(best, us);
    }
    return best;
}
void report(const char* what, double us, double bytes = 0.0) {
    std::printf("%-44s %9.1f us", what, us);
    if (bytes > 0.0) std::printf("  %7.1f GB/s", bytes / us * 1e-3);
    std::printf("\n");
}

/// Random rows that repeat after a thousand.
gpu::Host<bf16> random_rows(index_t rows, index_t columns) {
    const gpu::Host<bf16> some = gpu::random<bf16>(std::min<index_t>(rows, 1024), columns, 1);
    gpu::Host<bf16> all(rows, columns);
    for (index_t r = 0; r < rows; ++r) std::copy_n(&some(r % some.rows, 0), columns, &all(r, 0));
    return all;
}

}  // namespace

TEST_CASE("speed of routing and of rows" * doctest::skip()) {
    const Cuda device = gpu::device();
    constexpr index_t width = 4096, experts = 128, top_k = 8;
    for (const index_t tokens : {64, 32768}) {
        std::printf("%d tokens, %d of %d experts, width %d, bf16\n", static_cast<int>(tokens), static_cast<int>(top_k),
                    static_cast<int>(experts), static_cast<int>(width));
        const LayerShape shape{.tokens = tokens, .width = width, .experts = experts};
        const CudaBytes scratch = gpu::scratch(std::max({router_ops<Cuda>::scratch_bytes<bf16>(device, shape),
                                                         plan_ops<Cuda>::scratch_bytes(device, shape, top_k),
                                                         balance_ops<Cuda>::scratch_bytes(device, shape)}));
        const Tensor<bf16> x(random_rows(tokens, width)), w(gpu::random<bf16>(experts, width, 2, 0.02));
        const Tensor<float> logits(tokens, experts), probs(tokens, experts), weight(tokens, top_k);
        const Tensor<expert_t> expert(tokens, top_k);
        const Tensor<index_t> offsets(1, experts + 1);
        const Tensor<std::int32_t> choice(1, tokens * top_k), row(tokens, top_k);
        const Plan<CudaSpace> plan{offsets.line(), choice.line(), row.get()};
        const Routing<float, CudaSpace> routing{logits.get(), probs.get(), expert.get(), weight.get()};
        const Tensor<bf16> rows(tokens * top_k, width), y(tokens, width), copied(tokens * top_k, width);
        const Pinned<std::int64_t> load(1, experts + 1), own(1, 1);
        const Pinned<double> sums(1, experts), loss(1, 1);

        using router = router_ops<Cuda>;
        report("logits",
               time_of([&] { router::logits<bf16>(device, x.get(), w.get(), {}, logits.get(), scratch.data()); }));
        const SelectionRule softmax{top_k, Score::softmax, GateWeight::renormalized};
        const SelectionRule grouped{top_k, Score::sigmoid, GateWeight::renormalized, 2.5, 8, 4, GroupScore::top2_sum};
        const Tensor<float> bias(gpu::random<float>(1, experts, 3, 1e-3));
        report("select, groups, sigmoid, bias",
               time_of([&] { router::select<float>(device, grouped, bias.line(), {}, routing, nullptr); }));
        report("select, softmax", time_of([&] { router::select<float>(device, softmax, {}, {}, routing, nullptr); }));
        report("make_plan", time_of([&] { plan_ops<Cuda>::make_plan(device, expert.get(), plan, scratch.data()); }));

        const double bytes_of_rows = 2.0 * static_cast<double>(tokens * top_k * width);
        const double bytes_of_tokens = 2.0 * static_cast<double>(tokens * width);
        report("copy of the rows", time_of([&] { memory_ops<Cuda>::copy(device, rows.get(), copied.get()); }),
               2.0 * bytes_of_rows);
        report("dispatch", time_of([&] { plan_ops<Cuda>::dispatch<bf16>(device, plan, x.get(), rows.get()); }),
               2.0 * bytes_of_rows);
        report("combine",
               time_of([&] { plan_ops<Cuda>::combine<bf16>(device, plan, rows.get(), weight.get(), y.get()); }),
               bytes_of_rows + bytes_of_tokens);
        report("combine_backward", time_of([&] {
                   plan_ops<Cuda>::combine_backward<bf16>(device, plan, rows.get(), x.get(), weight.get());
               }),
               bytes_of_rows + bytes_of_tokens);

        Observation<float, CudaSpace> seen;
        seen.routing = routing;
        seen.valid_tokens = tokens;
        using balance = balance_ops<Cuda>;
        report("count", time_of([&] { balance::count<float>(device, seen, load.get(), Choices{}, scratch.data()); }));
        report("sum of probabilities", time_of([&] {
                   balance::sum_quantity<float, Quantity::probs>(device, seen, sums.get(), own.line(), scratch.data());
               }));
        report("z-loss",
               time_of([&] { balance::sum_tokens<float>(device, seen, ZLoss{}, loss.line(), scratch.data()); }));
        const RoutingGrad<float, CudaSpace> grad{weight.get(), probs.get(), logits.get()};
        report("select_backward", time_of([&] { router::select_backward<float>(device, softmax, {}, routing, grad); }));
        report("logits_backward", time_of([&] {
                   router::logits_backward<bf16>(device, x.get(), {}, w.get(), {}, logits.get(), y.get(), w.get(),
                                                 scratch.data());
               }));
    }
}
