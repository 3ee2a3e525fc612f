#include "measure.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>
#include <regex>

#include "busy.hpp"

namespace steelyard_bench {
namespace {

/// The rate of the type's widest multiply-adds, as it is now; of float's where there are no others.
double peak_now(Type type, int threads) {
    const double peak = type == Type::bf16   ? dot_gflops_bf16_now(threads)
                        : type == Type::int8 ? dot_gops_int8_now(threads)
                                             : 0;
    return peak > 0 ? peak : fma_gflops_now(threads);
}
double peak_of(Type type, const Limits& limits) {
    const double peak = type == Type::bf16 ? limits.dot_gflops_bf16 : type == Type::int8 ? limits.dot_gops_int8 : 0;
    return peak > 0 ? peak : limits.fma_gflops_float;
}

struct Candidate {
    std::string name;
    std::unique_ptr<Contender> contender;
};

/// Everything that cases with the same weights share.
class ModelRun {
public:
    ModelRun(const Case& first, const MeasureOptions& options, Notes& notes)
        : options_(options),
          notes_(notes),
          model_(first.shape, first.pass == Pass::train),
          reference_(make_reference(model_)) {
        const std::regex wanted(options.contenders);
        for (const Entry& entry : entries()) {
            if (!entry.supports(first)) continue;
            if (!options.contenders.empty() && !std::regex_search(entry.name, wanted)) continue;
            guarded(entry.name, first, [&] { candidates_.push_back({entry.name, entry.make(model_, first)}); });
        }
    }

    CaseResult measure(const Case& of, const Limits& limits) {
        if (!batch_ || batch_of_.shape.tokens != of.shape.tokens || batch_of_.skew != of.skew ||
            batch_of_.shape.top_k != of.shape.top_k) {
            batch_.reset();
            batch_ = std::make_unique<Batch>(of, model_);
            batch_of_ = of;
            expected_ = outcome(*reference_, of);
        }
        CaseResult result;
        result.of = of;
        result.largest_load = batch_->largest_load;
        for (index_t set = 0; set < of.sets(); ++set)
            result.bytes += batch_->touched_bytes(of, set) / static_cast<double>(of.sets());
        const auto memory = limits.memory.find(of.threads);
        if (memory != limits.memory.end())
            result.memory_bound =
                result.bytes / memory->second.read_gbytes > of.flops() / (peak_of(of.type, limits) * of.threads);
        std::vector<Candidate*> agreeing;
        for (Candidate& candidate : candidates_) {
            guarded(candidate.name, of, [&] {
                const double error = relative_error(outcome(*candidate.contender, of), expected_);
                if (!(error <= tolerance(of.type)))
                    throw std::runtime_error("differs from ours by " + std::to_string(error) + " and is not reported");
                result.measured.push_back({candidate.name, error, {}});
                agreeing.push_back(&candidate);
            });
        }
        if (!options_.check_only) time(of, agreeing, result);
        return result;
    }

private:
    template <class Body>
    void guarded(const std::string& name, const Case& of, Body&& body) {
        try {
            body();
        } catch (const std::exception& problem) {
            notes_.push_back(of.name() + ": " + name + ": " + problem.what());
            std::cerr << notes_.back() << '\n';
        }
    }

    Outcome outcome(Contender& contender, const Case& of) {
        contender.prepare(of, *batch_);
        contender.forget_gradients();
        contender.timed(0, of.pass == Pass::train);
        return contender.outcome();
    }

    static double seconds_of_sets(Contender& contender, const Case& of) {
        double seconds = 0;
        for (index_t set = 0; set < of.sets(); ++set) {
            if (of.cold()) evict_caches();
            seconds += contender.timed(set, of.pass == Pass::train);
        }
        return seconds / static_cast<double>(of.sets());
    }

    void time(const Case& of, const std::vector<Candidate*>& candidates, CaseResult& result) {
        if (of.sets() > 1)  // every set's number of rows for the first time: kernels are made
            for (Candidate* candidate : candidates) seconds_of_sets(*candidate->contender, of);
        const Busy before;
        const double begin = now();
        int rounds = options_.fewest_rounds;
        double fastest = 0;
        for (int round = 0; round < rounds; ++round) {
            for (std::size_t i = 0; i < candidates.size(); ++i) {
                auto& samples = result.measured[i].seconds;
                if (is_slow(samples, fastest)) continue;
                result.limit.push_back(result.memory_bound ? read_gbytes_now(of.threads)
                                                           : peak_now(of.type, of.threads));
                samples.push_back(seconds_of_sets(*candidates[i]->contender, of));
                if (fastest == 0 || samples.back() < fastest) fastest = samples.back();
            }
            if (round == 0)
                rounds = static_cast<int>(std::clamp(options_.seconds / (now() - begin),
                                                     static_cast<double>(options_.fewest_rounds),
                                                     static_cast<double>(options_.most_rounds)));
        }
        result.others = Busy().others_since(before);
    }

    /// Whether a contender needs no more samples: it takes more than 2.5 times what the fastest does. A short sample
    /// may have been disturbed, so that takes three of them.
    static bool is_slow(const std::vector<double>& samples, double fastest) {
        const std::size_t enough = !samples.empty() && samples.front() > 0.05 ? 1 : 3;
        return samples.size() >= enough && *std::min_element(samples.begin(), samples.end()) > 2.5 * fastest;
    }

    const MeasureOptions& options_;
    Notes& notes_;
    Model model_;
    std::unique_ptr<Contender> reference_;
    std::vector<Candidate> candidates_;
    std::unique_ptr<Batch> batch_;
    Case batch_of_{};
    Outcome expected_;
};

}  // namespace

std::vector<double> CaseResult::of_limit(const Measured& one) const {
    std::vector<double> shares;
    for (const double seconds : one.seconds) shares.push_back(work() * 1e-9 / seconds / spread_of(limit).median);
    return shares;
}

const Measured* CaseResult::find(const std::string& contender) const {
    for (const Measured& one : measured)
        if (one.contender == contender) return &one;
    return nullptr;
}

void measure_cases(const std::vector<Case>& cases, const Limits& limits, const MeasureOptions& options, Notes& notes,
                   const std::function<void(const CaseResult&)>& each) {
    std::unique_ptr<ModelRun> run;
    for (std::size_t i = 0; i < cases.size(); ++i) {
        if (!run || !cases[i].shares_model(cases[i - 1])) {
            run.reset();  // gigabytes, before the next ones
            run = std::make_unique<ModelRun>(cases[i], options, notes);
        }
        each(run->measure(cases[i], limits));
    }
}

}  // namespace steelyard_bench
