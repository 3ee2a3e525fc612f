// The layer on a GPU, as shares of what the GPU does in the same run. See docs/performance_gpu.md.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <regex>

#include "gpu/layer.hpp"
#include "gpu/timeline.hpp"
#if defined(STEELYARD_HAS_NCCL)
#include <nccl.h>

#include "steelyard/comm/nccl.hpp"
#endif

using namespace bench;
using json = nlohmann::json;
using steelyard::MicroBatchLoss;
using steelyard::NoBalance;
using steelyard::SynchronizedLoss;

namespace {

std::vector<Case> cases(bool quick) {
    std::vector<Case> all;
    const auto add = [&](std::string name, index_t tokens, index_t d, index_t h, index_t e, int k, bool zipf = false) {
        all.push_back({std::move(name), tokens, d, h, e, k, zipf});
    };
    // The grid of SonicMoE's figure 14.
    add("grid", 40960, 768, 256, 128, 8);
    add("grid", 24576, 1536, 256, 128, 8);
    add("grid", 24576, 1536, 1024, 32, 2);
    add("grid", 32768, 4096, 256, 256, 16);
    add("grid", 32768, 4096, 512, 128, 8);
    add("grid", 32768, 4096, 1024, 128, 8);
    add("grid", 32768, 4096, 2048, 64, 4);
    struct Model {
        const char* name;
        index_t d, h, e;
        int k;
    };
    for (const Model& m : {Model{"Qwen3-30B-A3B", 2048, 768, 128, 8},
                           {"OLMoE-1B-7B", 2048, 1024, 64, 8},
                           {"DeepSeek-V2-Lite", 2048, 1408, 64, 6},
                           {"gpt-oss-20b without biases", 2880, 2880, 32, 4},
                           {"Mixtral-8x7B", 4096, 14336, 8, 2},
                           {"DeepSeek-V3", 7168, 2048, 256, 8}})
        for (const bool zipf : {false, true})
            for (const index_t tokens : {1, 4, 16, 64, 512, 4096, 16384, 32768}) {
                if (quick && (zipf || tokens == 4 || tokens == 512 || tokens == 16384)) continue;
                add(m.name, tokens, m.d, m.h, m.e, m.k, zipf);
            }
    return all;
}

struct Limits {
    double dense, copy;
};

json of_spread(const Spread& ms) { return {{"median", ms.median}, {"low", ms.low}, {"high", ms.high}}; }

/// Launches cost the host more than few tokens cost the GPU: calls captured in a graph, which is how decoding runs.
template <class Layer>
Spread time_in_graph(const Layer& timed, const Cuda& device) {
    constexpr int calls = 16;
    timed.evaluate(0);
    check(cudaStreamSynchronize(device.stream));
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    check(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) timed.evaluate(i);
    check(cudaStreamEndCapture(device.stream, &graph));
    check(cudaGraphInstantiate(&runnable, graph, 0));
    Spread ms = time_calls(device.stream, 15, [&](int) { check(cudaGraphLaunch(runnable, device.stream)); });
    check(cudaGraphExecDestroy(runnable)), check(cudaGraphDestroy(graph));
    for (double* number : {&ms.median, &ms.low, &ms.high}) *number /= calls;
    return ms;
}

json run(const Case& of, const Cuda& device, const Limits& limits) {
    const TimedLayer<MicroBatchLoss> timed(of, device);
    const int repeats = of.tokens >= 16384 ? 7 : 15;
    json result = {{"name", of.name},       {"tokens", of.tokens}, {"width", of.width}, {"hidden", of.hidden},
                   {"experts", of.experts}, {"top_k", of.top_k},   {"zipf", of.zipf}};
    const Spread forward = time_calls(device.stream, repeats, [&](int turn) { timed.forward(turn); });
    // Backward alone: the time of both less that of forward, for each backward uses its forward up.
    const Spread both =
        time_calls(device.stream, repeats, [&](int turn) { timed.forward(turn), timed.backward(turn); });
    const Spread added = time_calls(
        device.stream, repeats, [&](int turn) { timed.forward(turn), timed.backward(turn, steelyard::Write::add); });
    const double backward = both.median - forward.median, flops = of.forward_flops();
    result["forward_ms"] = of_spread(forward), result["both_ms"] = of_spread(both);
    result["both_added_ms"] = of_spread(added);
    result["forward_flops"] = flops / forward.median * 1e3, result["backward_flops"] = 2 * flops / backward * 1e3;
    result["forward_share"] = flops / forward.median * 1e3 / limits.dense;
    result["backward_share"] = 2 * flops / backward * 1e3 / limits.dense;
    result["context_bytes_per_token"] = timed.context_bytes() / static_cast<double>(of.tokens);
    result["workspace_bytes_per_token"] = timed.workspace_bytes() / static_cast<double>(of.tokens);
    std::printf(
        "%-28s T %5lld %s  forward %9.3f ms %4.0f TFLOP/s %3.0f %%  backward %9.3f ms %4.0f TFLOP/s %3.0f %%, "
        "adding %+.1f %%",
        of.name.c_str(), static_cast<long long>(of.tokens), of.zipf ? "Zipf" : "    ", forward.median,
        flops / forward.median / 1e9, 100 * flops / forward.median * 1e3 / limits.dense, backward,
        2 * flops / backward / 1e9, 100 * 2 * flops / backward * 1e3 / limits.dense,
        100 * (added.median - both.median) / backward);
    if (of.tokens <= 64) {
        const Spread graph = time_in_graph(timed, device);
        const double touched = timed.touched_experts();
        const double bytes = touched * 6.0 * static_cast<double>(of.width) * static_cast<double>(of.hidden);
        result["graph_ms"] = of_spread(graph);
        result["weight_bytes_rate"] = bytes / graph.median * 1e3;
        result["weight_bytes_share"] = bytes / graph.median * 1e3 / limits.copy;
        std::printf("  in a graph %6.1f us, weights at %3.0f %% of copying", graph.median * 1e3,
                    100 * bytes / graph.median * 1e3 / limits.copy);
    }
    std::printf("\n");
    std::fflush(stdout);
    return result;
}

/// Router, plan and combine alone, on the bytes that they must move: x, logits, probabilities, rows, y.
json stages(const Case& of, const Cuda& device, const Limits& limits) {
    const TimedLayer<NoBalance> timed(of, device);
    using namespace steelyard;
    const auto& layer = timed.layer();
    timed.forward(0);
    check(cudaStreamSynchronize(device.stream));
    const auto routing = layer.routing(timed.context());
    const auto plan = layer.plan(timed.context());
    const LayerShape shape{.tokens = of.tokens, .width = of.width, .experts = of.experts};
    const CudaBytes scratch(std::max(router_ops<Cuda>::scratch_bytes<bf16>(device, shape),
                                     plan_ops<Cuda>::scratch_bytes(device, shape, of.top_k)));
    const CudaBytes row_bytes(of.tokens * of.top_k * of.width * 2);
    fill_random(row_bytes, 1.0f, 9);
    const view<bf16, 2, CudaSpace> rows(reinterpret_cast<bf16*>(row_bytes.data()), of.tokens * of.top_k, of.width);
    const SelectionRule rule{.top_k = of.top_k, .weight = GateWeight::renormalized};
    const double t = static_cast<double>(of.tokens), d = static_cast<double>(of.width),
                 e = static_cast<double>(of.experts), k = of.top_k;
    json result = {
        {"name", of.name}, {"tokens", of.tokens}, {"width", of.width}, {"experts", of.experts}, {"top_k", of.top_k}};
    double ms_of_all = 0, bytes_of_all = 0;
    const auto add = [&](const char* name, double bytes, const auto& call) {
        const Spread ms = time_calls(device.stream, 15, call);
        ms_of_all += ms.median, bytes_of_all += bytes;
        result[name] = {{"ms", of_spread(ms)}, {"share", bytes / ms.median * 1e3 / limits.copy}};
        std::printf("  %-10s %8.1f us  %3.0f %% of copying\n", name, ms.median * 1e3,
                    100 * bytes / ms.median * 1e3 / limits.copy);
    };
    std::printf("stages: T %lld d %lld E %lld K %d\n", static_cast<long long>(of.tokens),
                static_cast<long long>(of.width), static_cast<long long>(of.experts), of.top_k);
    add("logits", 2 * t * d + 4 * t * e, [&](int turn) {
        router_ops<Cuda>::logits<bf16>(device, timed.x(turn), timed.weights().router.weight, RouterNoise{},
                                       routing.logits, scratch.data());
    });
    add("select", 8 * t * e + 8 * t * k,
        [&](int) { router_ops<Cuda>::select<float>(device, rule, {}, {}, routing, scratch.data()); });
    add("plan", 12 * t * k, [&](int) { plan_ops<Cuda>::make_plan(device, routing.expert, plan, scratch.data()); });
    add("combine", 2 * t * k * d + 2 * t * d,
        [&](int) { plan_ops<Cuda>::combine<bf16>(device, plan, rows, routing.weight, timed.y()); });
    result["share"] = bytes_of_all / ms_of_all * 1e3 / limits.copy;
    std::printf("  all        %8.1f us  %3.0f %% of copying\n", ms_of_all * 1e3,
                100 * bytes_of_all / ms_of_all * 1e3 / limits.copy);
    return result;
}

/// What summing over ranks costs: forward and backward with a loss of the micro-batch, and with one that is
/// synchronised, in turn: the GPU's clock changes within a second by more than what is looked for. Counted is the time
/// in which a kernel or a copy runs on either stream, not that in which the GPU waits for the host.
template <class CommT>
json synchronized_cost(const Case& of, const Cuda& device, const char* name, const CommT& comm, bool stacked) {
    const TimedLayer<SynchronizedLoss, CommT> synchronized(of, device, comm, stacked);
    const TimedLayer<MicroBatchLoss> micro(of, device, {}, false, synchronized.memory());
    // And with another of the same: what this way of measuring finds between equals.
    const TimedLayer<MicroBatchLoss> equal(of, device, {}, false, synchronized.memory());
    const auto busy_ms = [&](const auto& step, int turn) {
        Timeline line;
        step.forward(turn), step.backward(turn);
        check(cudaStreamSynchronize(device.stream));
        return busy(line.stop()) * 1e-3;
    };
    std::vector<double> of_micro, ratios, of_equals;
    for (int i = -2; i < 100; ++i) {
        const double before = busy_ms(micro, i + 2), after = busy_ms(synchronized, i + 2),
                     again = busy_ms(equal, i + 2);
        if (i < 0) continue;
        of_micro.push_back(before), ratios.push_back(2 * after / (before + again)), of_equals.push_back(again / before);
    }
    const Spread cost = spread_of(std::move(ratios)), of_none = spread_of(std::move(of_equals));
    std::printf(
        "Synchronized over MicroBatch at T %lld, %s: %+.2f %% (quartiles %+.2f, %+.2f); between equals %+.2f %%\n",
        static_cast<long long>(of.tokens), name, 100 * cost.median - 100, 100 * cost.low - 100, 100 * cost.high - 100,
        100 * of_none.median - 100);
    std::fflush(stdout);
    return {{"tokens", of.tokens},
            {"sum", name},
            {"cost", cost.median - 1},
            {"low", cost.low - 1},
            {"high", cost.high - 1},
            {"between_equals", of_none.median - 1},
            {"micro_ms", spread_of(std::move(of_micro)).median}};
}
json synchronized_costs(const Case& of, const Cuda& device) {
    json all;
    const auto both = [&](const std::string& name, const auto& comm) {
        all.push_back(synchronized_cost(of, device, name.c_str(), comm, false));
        all.push_back(synchronized_cost(of, device, (name + ", stacked").c_str(), comm, true));
    };
    both("SelfComm", steelyard::SelfComm{});
#if defined(STEELYARD_HAS_NCCL)
    ncclComm_t group = nullptr;
    const int first = 0;
    if (ncclCommInitAll(&group, 1, &first) != ncclSuccess) throw std::runtime_error("NCCL: no communicator");
    {
        const steelyard::NcclComm comm(group, device.side);
        both("NcclComm, one rank", comm);
    }
    ncclCommDestroy(group);
#endif
    return all;
}

/// What the GPU does in one forward and one backward with a synchronised loss, or in one evaluation.
void timeline(const Case& of, const Cuda& device, bool train) {
    const TimedLayer<SynchronizedLoss> timed(of, device);
    const auto once = [&](int turn) {
        if (train)
            timed.forward(turn), timed.backward(turn);
        else
            timed.evaluate(turn);
        check(cudaStreamSynchronize(device.stream));
    };
    once(0), once(1);
    Timeline line;
    once(2);
    std::printf("timeline of %s: T %lld d %lld h %lld E %lld K %d\n",
                train ? "forward and backward with SynchronizedLoss" : "evaluation", static_cast<long long>(of.tokens),
                static_cast<long long>(of.width), static_cast<long long>(of.hidden), static_cast<long long>(of.experts),
                of.top_k);
    print(line.stop());
}

}  // namespace

int main(int argc, char** argv) try {
    CLI::App app("The layer on a GPU, in shares of what the GPU does in the same run.");
    bool quick = false, skip_rest = false, only_timeline = false;
    std::string filter = ".*", out, commit = "unknown";
    index_t most_tokens = std::numeric_limits<index_t>::max();
    app.add_flag("--quick", quick, "Fewer numbers of tokens, uniform routing");
    app.add_flag("--cases-only", skip_rest, "Neither stages nor what synchronising costs");
    app.add_flag("--timeline", only_timeline, "When each kernel ran in one step, and nothing else");
    app.add_option("--filter", filter, "Cases whose names match");
    app.add_option("--most-tokens", most_tokens, "Cases of at most so many tokens");
    app.add_option("--out", out, "Where the JSON goes");
    app.add_option("--commit", commit, "What was measured");
    CLI11_PARSE(app, argc, argv);
    if (const steelyard::Status status = steelyard::CudaResources::available(); !status) {
        std::printf("skipped: no GPU here (%s)\n", status.came().c_str());
        return 77;
    }
    steelyard::CudaResources resources;
    const Cuda device = resources.device();
    if (only_timeline) {
        timeline({"grid", 32768, 4096, 1024, 128, 8}, device, true);
        timeline({"synchronized", 16384, 2048, 768, 128, 8}, device, true);
        timeline({"decode", 1, 2048, 768, 128, 8}, device, false);
        return 0;
    }
    const Limits limits{dense_rate(device), copy_rate(device)};
    std::printf("limits: dense bf16 product %.0f TFLOP/s, copying %.0f GB/s\n", limits.dense / 1e12, limits.copy / 1e9);
    json all = {{"commit", commit}, {"limits", {{"dense_flops", limits.dense}, {"copy_bytes", limits.copy}}}};
    std::size_t free_bytes = 0, total = 0;
    const std::regex wanted(filter);
    for (const Case& of : cases(quick)) {
        if (!std::regex_search(of.name, wanted) || of.tokens > most_tokens) continue;
        check(cudaMemGetInfo(&free_bytes, &total));
        const double rows = static_cast<double>(of.tokens) * of.top_k, h = static_cast<double>(of.hidden),
                     d = static_cast<double>(of.width);
        const double bytes =
            12.0 * static_cast<double>(of.experts) * h * d + rows * (12 * h + 2 * d) + (4 << 20) * h / 64;
        if (1.1 * bytes > static_cast<double>(free_bytes)) {
            std::printf("%-28s T %5lld: skipped, it needs %.0f GB\n", of.name.c_str(),
                        static_cast<long long>(of.tokens), bytes / 1e9);
            continue;
        }
        all["cases"].push_back(run(of, device, limits));
    }
    if (!skip_rest) {
        all["stages"].push_back(stages({"stages", 32768, 4096, 64, 128, 8}, device, limits));
        all["stages"].push_back(stages({"stages", 4096, 2048, 64, 128, 8}, device, limits));
        if (!Timeline::available)
            std::printf("what synchronising costs: skipped, built without CUPTI\n");
        else
            all["synchronized"] = synchronized_costs({"synchronized", 16384, 2048, 768, 128, 8}, device);
    }
    all["limits_after"] = {{"dense_flops", dense_rate(device)}, {"copy_bytes", copy_rate(device)}};
    if (!out.empty()) std::ofstream(out) << all.dump(1) << '\n';
    return 0;
} catch (const std::exception& failure) {
    std::fprintf(stderr, "steelyard_gpu_bench: %s\n", failure.what());
    return 1;
}
