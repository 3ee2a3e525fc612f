#include "training.hpp"

#include <optional>

#include "run_cuda.hpp"
#include "run_mpi.hpp"
#include "run_rank.hpp"
#include "steelyard/comm/threads.hpp"

namespace pretrain {

std::atomic<bool> stop_asked{false};

void ask_to_stop() noexcept { stop_asked.store(true, std::memory_order_relaxed); }
bool stop_was_asked() noexcept { return stop_asked.load(std::memory_order_relaxed); }
void forget_stop() noexcept { stop_asked.store(false, std::memory_order_relaxed); }

namespace {

/// Seconds that a rank waits for the others: more than the longest evaluation, checkpoint or paused laptop lid.
constexpr double patience = 600;

RunRecord run_threads(Shared<float>& shared) {
    steelyard::ThreadGroup group(shared.settings.ranks, {.timeout = patience});
    steelyard::run_ranks(group, [&](const steelyard::ThreadComm& comm) {
        run_rank(shared, comm, {comm.rank(), comm.size()});
    });
    return std::move(shared.record);
}

/// The checkpoint to go on from, if there is one and it fits.
std::optional<Checkpoint> saved_run(const Settings& settings, Strategy strategy, const Corpus& corpus) {
    const auto path = checkpoint_path(settings, strategy);
    if (!settings.resume || !std::filesystem::exists(path)) return {};
    Checkpoint saved = read_checkpoint(path);
    if (saved.record.strategy != strategy)
        throw UserError("checkpoint " + path.string() + ": expected strategy " + name_of(strategy) + ", came " +
                        name_of(saved.record.strategy));
    if (const std::string differs = resume_complaint(saved.record.settings, settings); !differs.empty())
        throw UserError(differs);
    if (saved.text != corpus.fingerprint())
        throw UserError("checkpoint " + path.string() + ": the text has changed since it was written");
    return saved;
}

}  // namespace

void require_device(const Settings& settings) {
    if (settings.device == DeviceKind::cpu) return;
    if (const std::string sentence = cuda_complaint(); !sentence.empty()) throw UserError(sentence);
}

RunRecord train(const Settings& settings, Strategy strategy, const Corpus& corpus) {
    const std::optional<Checkpoint> from = saved_run(settings, strategy, corpus);
    if (settings.device == DeviceKind::cuda) return run_cuda(settings, strategy, corpus, from, patience);
    Shared<float> shared{.settings = settings, .strategy = strategy, .corpus = corpus, .from = from,
                         .weights = nullptr, .record = {}};
    if (settings.comm == CommKind::mpi) return run_mpi(shared, patience);
    return run_threads(shared);
}

}  // namespace pretrain
