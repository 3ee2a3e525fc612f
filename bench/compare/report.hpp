// Results as text: a table for the terminal, one in Markdown, and everything in JSON.
#pragma once

#include <iosfwd>
#include <nlohmann/json.hpp>

#include "measure.hpp"
#include "stages.hpp"

namespace steelyard_bench {

struct Report {
    Limits limits;
    std::vector<CaseResult> cases;
    std::vector<StageResult> stages;
    Notes notes;
    std::vector<std::string> absent;  // peers that this program was built or run without
    nlohmann::json run;               // date, commit, processor, compiler, command line
};

void print_limits(std::ostream& out, const Limits& limits);
/// The heading of the cases' columns, and a line of them.
void print_heading(std::ostream& out);
void print_case(std::ostream& out, const CaseResult& result);
void print_stages(std::ostream& out, const std::vector<StageResult>& stages);
void print_explanation(std::ostream& out);

void write_markdown(std::ostream& out, const Report& report);
[[nodiscard]] nlohmann::json to_json(const Report& report);

}  // namespace steelyard_bench
