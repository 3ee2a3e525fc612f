// The whole layer, and what balance costs of it.
#include <algorithm>
#include <barrier>
#include <memory>
#include <vector>

#include "layer_case.hpp"

namespace steelyard_bench {
namespace {

using LossAndZ = AllOf<MicroBatchLoss, RouterZLoss>;

void layer_forward(benchmark::State& state, const Shape& shape) {
    const int threads = static_cast<int>(state.range(0));
    LayerCase<LossAndZ> layer(shape, {}, threads);
    const Lap lap;
    for (auto _ : state) layer.forward();
    report_flops(state, lap, shape.forward_flops(), threads);
    state.counters["tokens/s"] = static_cast<double>(shape.tokens) / lap.seconds(state);
}

void layer_forward_backward(benchmark::State& state, const Shape& shape) {
    const int threads = static_cast<int>(state.range(0));
    LayerCase<LossAndZ> layer(shape, {}, threads);
    const Lap lap;
    for (auto _ : state) layer.forward(), layer.backward();
    report_flops(state, lap, 3 * shape.forward_flops(), threads);
    state.counters["tokens/s"] = static_cast<double>(shape.tokens) / lap.seconds(state);
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
}

/// What a policy does in one forward and backward, timed alone on the routing of a real layer, as a share of the layer's
/// forward + backward in the same run: the two alternate.
template <class Balance>
void balance_share(benchmark::State& state, const Shape& shape) {
    LayerCase<Balance> layer(shape, {}, 1);
    layer.forward();
    const auto& config = layer.layer().config();
    const Balance& policy = config.balance;
    Observation<float> seen;
    seen.routing = layer.layer().routing(layer.context());
    seen.valid_tokens = seen.count();
    const Bytes state_memory(bytes_of<typename Balance::template State<>>(policy, config.shape)),
        record_memory(bytes_of<typename Balance::template Record<>>(policy, config.shape)),
        grad_memory(bytes_of<RoutingGrad<float>>(shape.tokens, shape.experts, index_t{shape.top_k})),
        scratch(balance_ops<Cpu>::scratch_bytes(config.device, config.shape));
    const auto kept = place<typename Balance::template State<>>(state_memory.data(), policy, config.shape);
    const auto record = place<typename Balance::template Record<>>(record_memory.data(), policy, config.shape);
    const auto grad = place<RoutingGrad<float>>(grad_memory.data(), shape.tokens, shape.experts, index_t{shape.top_k});
    std::vector<std::int64_t> words(static_cast<std::size_t>(policy.wire_words(config.shape)) + 1);
    policy.init(kept);

    std::vector<double> shares;
    for (auto _ : state) {
        const double start = now();
        layer.forward();
        layer.backward();
        const double after_layer = now();
        ++seen.tokens.step.step;
        Wire<> out(view<std::int64_t, 1>(words.data(), static_cast<index_t>(words.size()))), in = out;
        policy.observe(config.device, seen, kept, record, out);
        policy.conclude(config.device, seen, kept, record, in, scratch.data());
        policy.gradient(config.device, seen, record, grad);
        shares.push_back((now() - after_layer) / (after_layer - start));
    }
    state.counters["share_of_layer"] = median(shares);
}

/// `Synchronized` over four ranks that are threads of this process, against `MicroBatch` on the same ranks: steps of
/// both alternate, so that noise of the machine meets both. Each rank has its own layer and one thread.
void sync_over_micro(benchmark::State& state, const Shape& shape) {
    constexpr int ranks = 4;
    ThreadGroup group(ranks);
    std::vector<std::unique_ptr<LayerCase<MicroBatchLoss, ThreadComm>>> micro;
    std::vector<std::unique_ptr<LayerCase<SynchronizedLoss, ThreadComm>>> sync;
    for (int r = 0; r < ranks; ++r) {
        micro.push_back(std::make_unique<LayerCase<MicroBatchLoss, ThreadComm>>(shape, MicroBatchLoss{}, 1,
                                                                                group.comm(r), ranks));
        sync.push_back(std::make_unique<LayerCase<SynchronizedLoss, ThreadComm>>(shape, SynchronizedLoss{}, 1,
                                                                                 group.comm(r), ranks));
    }
    const auto step_of_all = [&](auto& layers) {
        const double start = now();
        run_ranks(group, [&](const ThreadComm& comm) {
            layers[static_cast<std::size_t>(comm.rank())]->forward();
            layers[static_cast<std::size_t>(comm.rank())]->backward();
        });
        return now() - start;
    };
    std::vector<double> ratios;
    for (auto _ : state) {
        const double first = step_of_all(micro), second = step_of_all(sync);
        ratios.push_back(second / first);
        state.SetIterationTime(first + second);
    }
    state.counters["sync_over_micro"] = median(ratios);
}

[[maybe_unused]] const bool registered = [] {
    for (const Shape* shape : {&shape_a, &shape_b}) {
        const auto add = [&](const std::string& name, void (*body)(benchmark::State&, const Shape&)) {
            return benchmark::RegisterBenchmark((name + "/" + shape->name).c_str(),
                                                [shape, body](benchmark::State& state) { body(state, *shape); })
                ->Unit(benchmark::kMillisecond)
                ->UseRealTime();
        };
        add("layer_forward", layer_forward)->Arg(1)->Arg(2);
        add("layer_forward_backward", layer_forward_backward)->Arg(1)->Arg(2);
        add("balance_share/micro", balance_share<MicroBatchLoss>)->Iterations(15);
        add("balance_share/sync", balance_share<SynchronizedLoss>)->Iterations(15);
        add("balance_share/micro_and_z", balance_share<LossAndZ>)->Iterations(15);
    }
    benchmark::RegisterBenchmark("sync_over_micro/A", [](benchmark::State& state) { sync_over_micro(state, shape_a); })
        ->Unit(benchmark::kMillisecond)
        ->UseManualTime()
        ->Iterations(11);
    return true;
}();

}  // namespace
}  // namespace steelyard_bench
