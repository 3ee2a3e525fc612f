// What communication costs of a layer. Whole layers beside their peers, and their stages: compare/.
#include <algorithm>
#include <barrier>
#include <memory>
#include <vector>

#include "layer_case.hpp"

namespace steelyard_bench {
namespace {

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
}

/// `Synchronized` over four ranks that are threads of this process, against `MicroBatch` on the same ranks: steps of
/// both alternate, so that noise of the machine meets both. Each rank has its own layer and one thread.
void sync_over_micro(benchmark::State& state, const Shape& shape) {
    constexpr int ranks = 4;
    ThreadGroup group(ranks);
    std::vector<std::unique_ptr<LayerCase<MicroBatchLoss, ThreadComm>>> micro;
    std::vector<std::unique_ptr<LayerCase<SynchronizedLoss, ThreadComm>>> sync;
    for (int r = 0; r < ranks; ++r) {
        micro.push_back(
            std::make_unique<LayerCase<MicroBatchLoss, ThreadComm>>(shape, MicroBatchLoss{}, 1, group.comm(r), ranks));
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
    benchmark::RegisterBenchmark("sync_over_micro/A", [](benchmark::State& state) { sync_over_micro(state, shape_a); })
        ->Unit(benchmark::kMillisecond)
        ->UseManualTime()
        ->Iterations(11);
    return true;
}();

}  // namespace
}  // namespace steelyard_bench
