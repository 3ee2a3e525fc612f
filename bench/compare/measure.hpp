// Cases measured: all contenders in turn, round by round, with a look at the limit that binds the case between them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "../limits.hpp"
#include "contender.hpp"
#include "statistics.hpp"

namespace steelyard_bench {

/// What one contender did in one case. A round is one sample: the mean over the case's sets of tokens.
struct Measured {
    std::string contender;
    double error = 0;             // against the reference, relative in norm
    std::vector<double> seconds;  // of each round
};

struct CaseResult {
    Case of;
    bool memory_bound = false;  // which limit takes longer: reading the touched weights, or the operations
    double bytes = 0;           // of the touched weights, mean over the sets
    double largest_load = 0;
    std::vector<double> limit;  // GFLOP/s or GB/s of all threads used, before each sample of any contender
    double others = 0;          // share of the processors' time that other programs had meanwhile
    std::vector<Measured> measured;

    /// What binds the case: operations, or bytes of touched weights.
    [[nodiscard]] double work() const { return memory_bound ? bytes : of.flops(); }
    /// The rates of a contender's rounds as shares of the limit, whose median is taken: single looks at it are noisy.
    [[nodiscard]] std::vector<double> of_limit(const Measured& one) const;
    [[nodiscard]] const Measured* find(const std::string& contender) const;
};

struct MeasureOptions {
    double seconds = 5;  // for the rounds of a case, about
    int fewest_rounds = 3, most_rounds = 15;
    bool check_only = false;  // no timing
    std::string contenders;   // a regular expression that names must match; empty: all
};

/// Why a contender is missing from a case, one line each.
using Notes = std::vector<std::string>;

/// Measures the cases in their order and tells `each` of every result.
void measure_cases(const std::vector<Case>& cases, const Limits& limits, const MeasureOptions& options, Notes& notes,
                   const std::function<void(const CaseResult&)>& each);

}  // namespace steelyard_bench
