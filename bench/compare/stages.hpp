// Parts of our layer alone, one thread, each beside the limit that binds it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../limits.hpp"
#include "../shape.hpp"
#include "statistics.hpp"

namespace steelyard_bench {

/// One figure of one part.
struct StageResult {
    std::string name = {}, unit = {};
    std::vector<double> values = {};
    std::vector<double> of_limit = {};  // empty where there is no limit to compare with
    std::string limit = {};             // what that is

    void add(double value) { values.push_back(value); }
    void add(double value, double share) { values.push_back(value), of_limit.push_back(share); }
};

struct StageOptions {
    int rounds = 15;
    std::string filter;  // a regular expression that names must match
};

/// Measures all parts in turn, round by round.
[[nodiscard]] std::vector<StageResult> measure_stages(const StageOptions& options);

/// A part: its name, and what takes one sample.
struct Stage {
    StageResult result;
    std::function<void(StageResult&)> sample;
};
/// Products of so many operations, in float: their rate beside the multiply-add peak, with warm caches.
void add_products(std::vector<Stage>& stages, std::string name, double flops, std::function<void()> body);

void add_router_stages(std::vector<Stage>& stages);
void add_row_stages(std::vector<Stage>& stages);
void add_expert_stages(std::vector<Stage>& stages);
void add_kernel_stages(std::vector<Stage>& stages);
void add_balance_stages(std::vector<Stage>& stages);

/// Seconds of one call of body, over as many calls as take two milliseconds.
template <class Body>
double seconds_of(Body&& body) {
    const double start = now();
    double end = start;
    int calls = 0;
    do {
        body();
        ++calls;
    } while ((end = now()) - start < 2e-3);
    return (end - start) / calls;
}

}  // namespace steelyard_bench
