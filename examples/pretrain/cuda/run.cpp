// Runs whose ranks are threads that share a GPU, each with a stream of its own.
#include "pretrain/run.hpp"

#include "gpu_ops.hpp"
#include "pretrain/run_cuda.hpp"
#include "steelyard/comm/threads.hpp"
#include "strategies.hpp"

namespace pretrain {

std::string cuda_complaint() {
    const Status found = steelyard::CudaResources::available();
    return found ? "" : "--device cuda: there is no GPU here (" + found.came() + ")";
}

RunRecord run_cuda(const Settings& settings, Strategy strategy, const Corpus& corpus,
                   const std::optional<Checkpoint>& from, double patience) {
    Shared<float, Gpu> shared{
        .settings = settings, .strategy = strategy, .corpus = corpus, .from = from, .weights = nullptr, .record = {}};
    steelyard::ThreadGroup group(settings.ranks, {.timeout = patience});
    steelyard::run_ranks(group, [&](const steelyard::ThreadComm& comm) {
        const Gpu gpu;
        Run<float, Gpu>(shared, comm, {comm.rank(), comm.size()}, make_cuda_blocks(gpu, settings, strategy, comm), gpu)
            .go();
    });
    return std::move(shared.record);
}

}  // namespace pretrain
