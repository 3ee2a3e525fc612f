// steelyard_compare: our layer beside the peers that this machine has.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <ctime>
#include <fstream>
#include <iostream>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "report.hpp"

namespace {

using namespace steelyard_bench;

std::string processor() {
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);)
        if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
    return "unknown";
}

nlohmann::json describe_run(int argc, char** argv, const std::string& commit) {
    char date[32];
    const std::time_t time = std::time(nullptr);
    std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&time));
    std::string command = "steelyard_compare";
    for (int i = 1; i < argc; ++i) (command += ' ') += argv[i];
    return {
        {"date", date}, {"commit", commit}, {"processor", processor()},
#if defined(__clang__)
            {"compiler", "clang++ " __clang_version__},
#else
            {"compiler", "g++ " __VERSION__},
#endif
        {
            "command", command
        }
    };
}

/// Peers that no entry came from, in words.
std::vector<std::string> absent_peers() {
    std::vector<std::string> absent;
    for (const auto& [peer, why] : {std::pair{"oneDNN", "not found when this was built"},
                                    {"libxsmm", "not found when this was built"},
                                    {"OpenBLAS", "not found when this was built"},
                                    {"Eigen", "not found when this was built"},
                                    {"PyTorch", "no interpreter that has it (--python)"},
                                    {"ggml", "no built tree (STEELYARD_GGML_DIR)"}})
        if (std::none_of(entries().begin(), entries().end(),
                         [&](const Entry& entry) { return entry.name.starts_with(peer); }))
            absent.push_back(std::string(peer) + ": skipped, " + why);
    return absent;
}

/// Whether every case was computed by all who should: what the test asks.
bool all_agree(const Report& report) { return !report.cases.empty() && report.notes.empty(); }

}  // namespace

int main(int argc, char** argv) {
    CaseChoice choice;
    MeasureOptions options;
    StageOptions stages;
    std::string commit = "unknown", json, markdown;
    bool no_stages = false, list = false;

    CLI::App app("Our layer beside the peers that this machine has: limits, cases, stages.");
    app.add_flag("--quick", choice.quick, "Fewer cases, fewer rounds");
    app.add_flag("--check", choice.tiny, "Only whether all contenders agree, on a tiny layer");
    app.add_option("--filter", choice.filter, "Cases and stages whose names match this regular expression");
    app.add_option("--contenders", options.contenders, "Contenders whose names match this regular expression");
    app.add_option("--threads", choice.threads, "Numbers of threads")->delimiter(',')->capture_default_str();
    app.add_option("--seconds", options.seconds, "For the rounds of a case, about")->capture_default_str();
    app.add_option("--python", peer_options().pythons, "Interpreters with PyTorch");
    app.add_option("--torch-script", peer_options().script, "bench/compare/torch_moe.py")->capture_default_str();
    app.add_option("--commit", commit, "What to call this version in the results");
    app.add_option("--json", json, "Where to write everything");
    app.add_option("--markdown", markdown, "Where to write the tables");
    app.add_flag("--no-stages", no_stages, "Whole layers only");
    app.add_flag("--list", list, "Names of the cases only");
    CLI11_PARSE(app, argc, argv);

#if defined(_OPENMP)
    omp_set_num_threads(1);  // libraries do not start threads of their own: experts are what runs in parallel
#endif
    if (choice.quick) options.seconds = std::min(options.seconds, 1.0), options.fewest_rounds = 2, stages.rounds = 5;
    if (choice.tiny) options.check_only = no_stages = true;
    stages.filter = choice.filter;
    const auto cases = list_cases(choice);
    if (list) {
        for (const Case& one : cases) std::cout << one.name() << '\n';
        return 0;
    }

    register_torch();
    std::sort(entries().begin(), entries().end(), [](const Entry& a, const Entry& b) { return a.place < b.place; });
    Report report;
    report.run = describe_run(argc, argv, commit);
    report.absent = absent_peers();
    for (const Entry& entry : entries()) std::cout << entry.name << ": " << entry.version << '\n';
    for (const auto& line : report.absent) std::cout << line << '\n';
    std::cout << '\n';
    if (!choice.tiny) {
        report.limits = measure_limits(choice.threads);
        print_limits(std::cout, report.limits);
    }
    if (!choice.tiny && !cases.empty()) print_heading(std::cout);
    measure_cases(cases, report.limits, options, report.notes, [&](const CaseResult& result) {
        if (!choice.tiny) print_case(std::cout, result);
        report.cases.push_back(result);
    });
    if (!choice.tiny && !cases.empty()) print_explanation(std::cout);
    if (!no_stages) report.stages = measure_stages(stages);
    print_stages(std::cout, report.stages);
    if (!json.empty()) std::ofstream(json) << to_json(report).dump(1) << '\n';
    if (!markdown.empty()) {
        std::ofstream out(markdown);
        write_markdown(out, report);
    }
    if (choice.tiny) {
        for (const CaseResult& result : report.cases)
            for (const Measured& one : result.measured)
                std::cout << result.of.name() << ": " << one.contender << " differs by " << one.error << '\n';
        return all_agree(report) ? 0 : 1;
    }
    return 0;
}
