// One rank's run: steps, evaluations and checkpoints in order. Every rank does the same; the first one also
// keeps the record and writes files.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>

#include "any_comm.hpp"
#include "checkpoint.hpp"
#include "initial.hpp"
#include "progress.hpp"
#include "replica.hpp"
#include "routing_watch.hpp"
#include "weights.hpp"

namespace pretrain {

extern std::atomic<bool> stop_asked;
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler sets it");

/// What the ranks of one process share.
template <class T, class Device = Threads>
struct Shared {
    const Settings& settings;
    Strategy strategy;
    const Corpus& corpus;
    const std::optional<Checkpoint>& from;  ///< where to go on; empty: from the start
    std::unique_ptr<Weights<T, Device>> weights;  ///< made by the team's first member
    RunRecord record;                       ///< kept by rank 0
};

template <class T, class Device = Threads>
class Run {
    using Model = Transformer<T, Device>;

public:
    Run(Shared<T, Device>& shared, const AnyComm& comm, Team team, typename Model::Blocks blocks, Device device)
        : shared_(shared), settings_(shared.settings), comm_(comm), team_(team),
          replica_(settings_, comm.rank(), std::move(blocks), std::move(device)),
          totals_(settings_.layers, settings_.experts), watch_(settings_, shared.corpus) {}

    /// Trains until the last step, or until somebody asks to stop.
    void go() {
        start();
        std::int64_t step = shared_.from ? shared_.from->step : 0;
        std::optional<Progress> progress;
        if (speaks())
            progress.emplace(name_of(shared_.strategy), settings_.steps, settings_.quiet, step);
        bool stop = false;
        while (step < settings_.steps && !stop) {
            const ProgressState state = one_step(step);
            ++step;
            stop = totals_.stop();
            const bool last = step == settings_.steps;
            if (progress) progress->update(state);
            if (last || due(settings_.eval_every, step)) evaluate(step);
            if (speaks()) shared_.record.interrupted = stop && !last;
            if (last || stop || due(settings_.checkpoint_every, step)) save(step);
        }
    }

private:
    using Clock = std::chrono::steady_clock;

    [[nodiscard]] bool speaks() const { return comm_.rank() == 0; }
    [[nodiscard]] static bool due(std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; }
    [[nodiscard]] const Corpus& corpus() const { return shared_.corpus; }
    [[nodiscard]] typename Model::Params params() {
        return replica_.model().place_params(shared_.weights->params.data());
    }

    /// The weights, made by one member of each team; then every rank's balance state.
    void start() {
        if (team_.member == 0) {
            auto& model = replica_.model();
            shared_.weights = std::make_unique<Weights<T, Device>>(model.param_bytes(), team_.size);
            auto& weights = *shared_.weights;
            weights.tensors = model.tensors(weights.params.data());
            if (shared_.from) {
                restore(shared_.from->params, weights.params, "parameters");
                restore(shared_.from->first_moment, weights.first_moment, "first moment");
                restore(shared_.from->second_moment, weights.second_moment, "second moment");
            } else {
                Bytes first(model.param_bytes());
                initialise(model.tensors(first.data()), settings_.layers, settings_.seed);
                weights.params.load(first.span());
            }
        }
        meet();
        shared_.weights->set_gradient(team_, replica_.gradient());
        if (shared_.from) restore_state();
        if (speaks() && shared_.from) {
            shared_.record = shared_.from->record;
            shared_.record.settings = settings_;
            shared_.record.interrupted = false;
        } else if (speaks()) {
            describe_run();
        }
        meet();
        replica_.model().take_params(params());
    }

    void describe_run() {
        RunRecord& record = shared_.record;
        record.settings = settings_;
        record.strategy = shared_.strategy;
        record.generated_text = corpus().generated();
        record.domains = corpus().domain_names();
        for (const Tensor<T>& tensor : shared_.weights->tensors) {
            record.parameters += tensor.size();
            std::int64_t active = tensor.size();
            if (tensor.name.find(".experts.") != std::string::npos)
                active = active / settings_.experts * settings_.experts_met();
            if (tensor.name == "embedding") active = settings_.dim;
            record.active_parameters += active;
        }
    }

    /// One optimizer step.
    ProgressState one_step(std::int64_t step) {
        const auto begin = Clock::now();
        totals_.clear();
        if (stop_asked.load(std::memory_order_relaxed)) totals_.ask_to_stop();
        double norm = 0;
        check(replica_.micro_steps(params(), corpus(), step, totals_));
        check(totals_.sum(comm_));
        check(shared_.weights->step(replica_.model().device(), comm_, team_, settings_, step + 1, norm));
        replica_.model().take_params(params());
        const steelyard::StepInfo info{.step = step, .total_tokens = settings_.tokens_per_step()};
        check(replica_.model().end_step(info));
        const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        return speaks() ? keep(step, norm, seconds) : ProgressState{};
    }

    /// Enters a step in the record.
    ProgressState keep(std::int64_t step, double norm, double seconds) {
        StepSeries& series = shared_.record.series;
        const double tokens = static_cast<double>(settings_.tokens_per_step());
        std::vector<double> micro, global;
        std::vector<std::vector<std::int64_t>> loads;
        for (index_t l = 0; l < settings_.layers; ++l) {
            const auto load = totals_.load(l);
            micro.push_back(totals_.max_vio_micro(l));
            global.push_back(max_vio(load));
            loads.emplace_back(load.begin(), load.end());
        }
        const auto mean = [](const std::vector<double>& v) {
            double sum = 0;
            for (const double x : v) sum += x;
            return sum / static_cast<double>(v.size());
        };
        const ProgressState state{.step = step + 1, .steps = settings_.steps, .loss = totals_.loss_sum() / tokens,
                                  .tokens_per_second = tokens / seconds, .max_vio_micro = mean(micro),
                                  .max_vio_global = mean(global)};
        series.step.push_back(step);
        series.loss.push_back(state.loss);
        series.balance_loss.push_back(totals_.balance_loss());
        series.learning_rate.push_back(learning_rate(settings_, step));
        series.gradient_norm.push_back(norm);
        series.tokens_per_second.push_back(state.tokens_per_second);
        series.max_vio_micro.push_back(std::move(micro));
        series.max_vio_global.push_back(std::move(global));
        const std::int64_t often = std::max<std::int64_t>(1, settings_.steps / 60);
        if (step % often == 0 || step + 1 == settings_.steps)
            shared_.record.loads.push_back({.step = step, .tokens_per_expert = std::move(loads)});
        shared_.record.wall_seconds += seconds;
        return state;
    }

    /// The held-out text, in parts that the ranks share out.
    void evaluate(std::int64_t step) {
        const std::size_t domains = corpus().domains().size();
        const auto layers = static_cast<std::size_t>(settings_.layers);
        const auto experts = static_cast<std::size_t>(settings_.experts);
        std::vector<double> losses(domains);
        std::vector<std::int64_t> tokens(domains), counts(layers * experts * domains);  // [layer][expert][domain]
        std::int64_t part = 0;
        watch_.clear();
        for (std::size_t d = 0; d < domains; ++d) {
            const int domain = static_cast<int>(d);
            const std::int64_t all = corpus().held_out_count(domain);
            for (std::int64_t first = 0; first < all; first += settings_.micro_batch, ++part) {
                if (part % comm_.size() != comm_.rank()) continue;
                const int count = static_cast<int>(std::min<std::int64_t>(settings_.micro_batch, all - first));
                check(replica_.evaluate(
                    params(), count, [&](int i) { return corpus().held_out(domain, first + i); }, losses[d]));
                tokens[d] += std::int64_t{count} * settings_.sequence;
                for (std::size_t l = 0; l < layers; ++l) {
                    const auto& block = replica_.model().block(static_cast<index_t>(l));
                    const auto chosen = block.choices();  // [T, K]
                    watch_.add(static_cast<index_t>(l), domain, first, replica_.given(count), chosen, block.taken());
                    for (index_t t = 0; t < chosen.extents[0]; ++t)
                        for (index_t k = 0; k < chosen.extents[1]; ++k)
                            if (const auto e = chosen(t, k); e >= 0)
                                ++counts[(l * experts + static_cast<std::size_t>(e)) * domains + d];
                }
            }
        }
        sum(std::span(losses));
        sum(std::span(tokens));
        sum(std::span(counts));
        watch_.sum([&](std::span<std::int64_t> words) { sum(words); });
        std::vector<LayerRouting> routing = watch_.finish();
        if (!speaks()) return;
        Evaluation result;
        result.step = step;
        for (std::size_t d = 0; d < domains; ++d)
            result.domains.push_back({.domain = corpus().domains()[d].name,
                                      .loss = losses[d] / static_cast<double>(tokens[d]), .tokens = tokens[d]});
        result.counts.assign(layers, std::vector(experts, std::vector<std::int64_t>(domains)));
        for (std::size_t l = 0; l < layers; ++l)
            for (std::size_t e = 0; e < experts; ++e)
                for (std::size_t d = 0; d < domains; ++d)
                    result.counts[l][e][d] = counts[(l * experts + e) * domains + d];
        result.routing = std::move(routing);
        shared_.record.evaluations.push_back(std::move(result));
    }

    /// Every rank brings its balance state to the first, which writes.
    void save(std::int64_t step) {
        check(finish(replica_.model().device()));
        std::vector<std::int64_t> mine;
        for (index_t l = 0; l < settings_.layers; ++l) {
            const auto state = replica_.model().block(l).state();
            const std::size_t at = mine.size();
            mine.resize(at + (state.size() + 7) / 8);
            if (!state.empty()) std::memcpy(mine.data() + at, state.data(), state.size());
        }
        std::vector<std::int64_t> all(mine.size() * static_cast<std::size_t>(comm_.size()));  // [R, words]
        check(comm_.all_gather(std::span<const std::int64_t>(mine), std::span(all)));
        if (!speaks()) return;
        const auto& weights = *shared_.weights;
        write_checkpoint(checkpoint_path(settings_, shared_.strategy),
                         {.step = step, .text = corpus().fingerprint(), .record = shared_.record,
                          .params = weights.params.contents(), .first_moment = weights.first_moment.contents(),
                          .second_moment = weights.second_moment.contents(), .state = std::as_bytes(std::span(all)),
                          .probe = watch_.before()});
    }

    void restore_state() {
        std::size_t words = 0;
        for (index_t l = 0; l < settings_.layers; ++l) words += (replica_.model().block(l).state().size() + 7) / 8;
        if (!watch_.restore(shared_.from->probe)) misfit("probe's choices");
        const auto& saved = shared_.from->state;
        if (saved.size() != words * 8 * static_cast<std::size_t>(comm_.size())) misfit("balance state");
        const std::byte* at = saved.data() + words * 8 * static_cast<std::size_t>(comm_.rank());
        for (index_t l = 0; l < settings_.layers; ++l) {
            const auto state = replica_.model().block(l).state();
            if (!state.empty()) std::memcpy(state.data(), at, state.size());
            at += (state.size() + 7) / 8 * 8;
        }
    }

    void restore(const std::vector<std::byte>& saved, typename Device::Memory& to, const char* what) const {
        if (static_cast<index_t>(saved.size()) != to.size()) misfit(what);
        to.load(saved);
    }
    [[noreturn]] void misfit(const char* what) const {
        throw UserError("checkpoint " + checkpoint_path(settings_, shared_.strategy).string() + ": its " + what +
                        " have another size than this model's");
    }

    template <class Number>
    void sum(std::span<Number> words) {
        check(comm_.begin_sum(words));
        check(comm_.end_sum(words));
    }
    void meet() {
        if (team_.size > 1) check(comm_.barrier());
    }
    static void check(Status status) { steelyard::throw_if_refused(std::move(status)); }

    Shared<T, Device>& shared_;
    const Settings& settings_;
    AnyComm comm_;
    Team team_;
    Replica<T, Device> replica_;
    StepTotals totals_;
    RoutingWatch watch_;
};

}  // namespace pretrain
