#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <ostream>

namespace steelyard_bench {
namespace {

std::string number(double value, int digits) {
    char text[32];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return text;
}
std::string padded(const std::string& text, int width) {  // negative: to the left
    const auto missing = static_cast<std::size_t>(std::max(0, std::abs(width) - static_cast<int>(text.size())));
    return width < 0 ? text + std::string(missing, ' ') : std::string(missing, ' ') + text;
}

/// "0.871 ±.004": median, and half the distance between the quartiles.
std::string with_spread(const std::vector<double>& values, int digits) {
    const Spread of = spread_of(values);
    return number(of.median, digits) + " ±" + number((of.q3 - of.q1) / 2, digits);
}

std::string milliseconds(const Measured& of) {
    std::vector<double> ms;
    for (const double s : of.seconds) ms.push_back(1e3 * s);
    return with_spread(ms, spread_of(ms).median < 10 ? 2 : spread_of(ms).median < 100 ? 1 : 0);
}

/// The columns, ours first; every name once.
std::vector<std::string> columns() {
    std::vector<std::string> names;
    for (const Entry& entry : entries()) names.push_back(entry.name);
    return names;
}

/// Ours against the fastest peer, by medians: above 1 we are faster.
std::string against_best_peer(const CaseResult& result) {
    double best = 0;
    for (const Entry& entry : entries()) {
        const Measured* const peer = entry.place < 10 ? nullptr : result.find(entry.name);
        if (peer == nullptr || peer->seconds.empty()) continue;
        const double seconds = spread_of(peer->seconds).median;
        best = best == 0 ? seconds : std::min(best, seconds);
    }
    const Measured* const ours = result.find(entries().front().name);
    if (ours == nullptr || ours->seconds.empty() || best == 0) return "";
    return number(best / spread_of(ours->seconds).median, 2);
}

/// The cells of a case's line: name, limit, our time, each share of the limit, ours against the best peer.
std::vector<std::string> cells(const CaseResult& result) {
    std::vector<std::string> line = {result.of.name(), result.memory_bound ? "read" : "peak"};
    const Measured* const ours = result.find(entries().front().name);
    line.push_back(ours != nullptr ? milliseconds(*ours) : "");
    for (const std::string& name : columns()) {
        const Measured* const one = result.find(name);
        line.push_back(one != nullptr && !one->seconds.empty() ? with_spread(result.of_limit(*one), 2) : "");
    }
    line.push_back(against_best_peer(result));
    line.push_back(number(100 * result.others, 0) + " %");
    return line;
}
std::vector<std::string> heading() {
    std::vector<std::string> line = {"case", "limit", "ms, ours"};
    for (const std::string& name : columns()) line.push_back(name);
    line.emplace_back("best peer / ours"), line.emplace_back("others");
    return line;
}

/// Widths in characters; "±" is two bytes and one character.
void print_line(std::ostream& out, const std::vector<std::string>& line) {
    const auto titles = heading();
    for (std::size_t i = 0; i < line.size(); ++i) {
        const int extra = static_cast<int>(std::count(line[i].begin(), line[i].end(), '\xc2'));
        const int width = i == 0 ? -46 : i == 1 ? -5 : std::max<int>(11, static_cast<int>(titles[i].size())) + extra;
        out << (i == 0 ? "" : "  ") << padded(line[i], width);
    }
    out << '\n' << std::flush;
}

void markdown_line(std::ostream& out, const std::vector<std::string>& line) {
    for (const auto& cell : line) out << "| " << cell << ' ';
    out << "|\n";
}

/// What is measured, and in what: also the names in JSON.
std::vector<std::pair<std::string, double>> limit_lines(const Limits& limits) {
    std::vector<std::pair<std::string, double>> lines = {
        {"multiply-adds float, GFLOP/s a thread", limits.fma_gflops_float},
        {"multiply-adds double, GFLOP/s a thread", limits.fma_gflops_double},
        {"dot products bf16 (vdpbf16ps), GFLOP/s a thread", limits.dot_gflops_bf16},
        {"dot products int8 (vpdpbusd), Gop/s a thread", limits.dot_gops_int8}};
    for (const auto& [threads, memory] : limits.memory) {
        const std::string by = ", GB/s by " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
        lines.emplace_back("memory read" + by, memory.read_gbytes);
        lines.emplace_back("memory copied (read + written)" + by, memory.copy_gbytes);
        lines.emplace_back("memory copied by non-temporal stores" + by, memory.stream_gbytes);
    }
    return lines;
}

int digits_of(const StageResult& stage) { return stage.unit.starts_with('%') ? 4 : stage.unit == "GB/s" ? 1 : 2; }

nlohmann::json spread_json(const std::vector<double>& values) {
    const Spread of = spread_of(values);
    const double least = values.empty() ? 0 : *std::min_element(values.begin(), values.end());
    return {{"median", of.median}, {"q1", of.q1}, {"q3", of.q3}, {"least", least}, {"samples", values}};
}

constexpr const char* explanation =
    "Shares of the limit that binds the case, measured between the samples: peak, the operations against the "
    "multiply-add peak of the type (float, bf16 and int8 dot products) of all threads used; read, the bytes of the "
    "touched weights, the router's included, against the bandwidth of reading memory. Medians; ± is half the "
    "distance between the quartiles. Contenders take turns; one that takes more than 2.5 times the fastest has one "
    "sample, or three short ones. train is forward + backward. others: the share of the processors' time that other "
    "programs had meanwhile; where it is not about 0, measure again.";

}  // namespace

void print_limits(std::ostream& out, const Limits& limits) {
    for (const auto& [name, value] : limit_lines(limits))
        if (value > 0) out << padded(name, -60) << padded(number(value, 1), 8) << '\n';
    out << '\n' << std::flush;
}

void print_heading(std::ostream& out) { print_line(out, heading()); }
void print_case(std::ostream& out, const CaseResult& result) { print_line(out, cells(result)); }
void print_explanation(std::ostream& out) { out << '\n' << explanation << '\n'; }

void print_stages(std::ostream& out, const std::vector<StageResult>& stages) {
    if (!stages.empty()) out << '\n';
    for (const StageResult& stage : stages) {
        out << padded(stage.name, -60) << padded(with_spread(stage.values, digits_of(stage)), 16) << ' ' << stage.unit;
        if (!stage.of_limit.empty()) out << ", " << with_spread(stage.of_limit, 2) << " of " << stage.limit;
        out << '\n';
    }
}

void write_markdown(std::ostream& out, const Report& report) {
    out << "| limit | |\n|---|---|\n";
    for (const auto& [name, value] : limit_lines(report.limits))
        if (value > 0) out << "| " << name << " | " << number(value, 1) << " |\n";
    out << '\n';
    markdown_line(out, heading());
    out << "|---|---|";
    for (std::size_t i = 2; i < heading().size(); ++i) out << "---:|";
    out << '\n';
    for (const CaseResult& result : report.cases) markdown_line(out, cells(result));
    out << '\n' << explanation << "\n\n";
    out << "| peer | version |\n|---|---|\n";
    for (const Entry& entry : entries()) out << "| " << entry.name << " | " << entry.version << " |\n";
    if (!report.stages.empty()) out << "\n| stage, one thread | | | of the limit |\n|---|---:|---|---|\n";
    for (const StageResult& stage : report.stages)
        out << "| " << stage.name << " | " << with_spread(stage.values, digits_of(stage)) << " | " << stage.unit
            << " | " << (stage.of_limit.empty() ? "" : with_spread(stage.of_limit, 2) + " of " + stage.limit) << " |\n";
}

nlohmann::json to_json(const Report& report) {
    nlohmann::json all = report.run;
    for (const auto& [name, value] : limit_lines(report.limits)) all["limits"][name] = value;
    for (const Entry& entry : entries())
        all["contenders"].push_back({{"name", entry.name}, {"version", entry.version}});
    all["absent"] = report.absent;
    all["notes"] = report.notes;
    all["cases"] = nlohmann::json::array();
    for (const CaseResult& result : report.cases) {
        const Case& of = result.of;
        nlohmann::json one = {{"name", of.name()},
                              {"tokens", of.shape.tokens},
                              {"width", of.shape.width},
                              {"hidden", of.shape.hidden},
                              {"experts", of.shape.experts},
                              {"top_k", of.shape.top_k},
                              {"flops", of.flops()},
                              {"touched_weight_bytes", result.bytes},
                              {"busiest_expert_over_mean", result.largest_load},
                              {"limit", result.memory_bound ? "read" : "peak"},
                              {"limit_rate", spread_json(result.limit)},
                              {"processor_time_of_others", result.others}};
        for (const Measured& measured : result.measured)
            one["contenders"][measured.contender] = {{"error", measured.error},
                                                     {"seconds", spread_json(measured.seconds)},
                                                     {"of_limit", spread_json(result.of_limit(measured))}};
        all["cases"].push_back(std::move(one));
    }
    all["stages"] = nlohmann::json::array();
    for (const StageResult& stage : report.stages) {
        nlohmann::json one = {{"name", stage.name}, {"unit", stage.unit}, {"value", spread_json(stage.values)}};
        if (!stage.of_limit.empty()) one["of_limit"] = spread_json(stage.of_limit), one["limit"] = stage.limit;
        all["stages"].push_back(std::move(one));
    }
    return all;
}

}  // namespace steelyard_bench
