// pretrain: trains a small mixture-of-experts language model on text, under one balance strategy after the other.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "checkpoint.hpp"
#include "corpus.hpp"
#include "report.hpp"
#include "settings.hpp"
#include "training.hpp"

namespace {

using namespace pretrain;

/// The first Ctrl-C asks; the second one ends the program.
void on_interrupt(int signal) {
    ask_to_stop();
    std::signal(signal, SIG_DFL);
}

void print(const std::string& text) { std::printf("%s\n", text.c_str()); }

/// The command line that goes on from here.
std::string resume_command(const Settings& settings, const std::string& program) {
    std::string command = command_of(settings) + " --resume";
    if (const auto at = command.find("pretrain"); at != std::string::npos) command.replace(at, 8, program);
    return command;
}

void require_checkpoint(const Settings& settings) {
    for (const Strategy strategy : settings.balance)
        if (std::filesystem::exists(checkpoint_path(settings, strategy))) return;
    throw UserError("--resume: there is no checkpoint of these strategies in '" + settings.out + "'");
}

/// Before hours of training, not after.
void require_folder(const Settings& settings) {
    std::error_code error;
    std::filesystem::create_directories(settings.out, error);
    if (error || ::access(settings.out.c_str(), W_OK) != 0)
        throw UserError("--out '" + settings.out + "' is not a folder that can be written");
}

int run(const Settings& settings, const std::string& program, bool speaks) {
    require_device(settings);
    require_folder(settings);
    if (settings.resume) require_checkpoint(settings);
    const Corpus corpus(settings);
    if (speaks && corpus.generated() && !settings.quiet)
        print("No --text was given: training on built-in synthetic languages.");
    std::signal(SIGINT, on_interrupt);
    std::signal(SIGTERM, on_interrupt);

    std::vector<RunRecord> runs;
    for (const Strategy strategy : settings.balance) {
        runs.push_back(train(settings, strategy, corpus));
        if (stop_was_asked()) break;
    }
    if (!speaks) return 0;
    const auto page = write_report(settings.out, runs);
    if (!settings.quiet) print("\n" + table_text(runs));
    for (const std::string& sentence : findings(runs))
        if (!settings.quiet) print(sentence);
    print("Report: " + page.string());
    if (stop_was_asked() && (runs.back().interrupted || runs.size() < settings.balance.size()))
        print("Interrupted. To go on: " + resume_command(settings, program));
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    CommandLine line = parse_command_line(argc, argv);
    if (!line.settings) {
        std::fprintf(line.exit_code == 0 ? stdout : stderr, "%s%s\n", line.exit_code == 0 ? "" : "pretrain: ",
                     line.message.c_str());
        return line.exit_code;
    }
    int exit_code = 1;
    std::string problem;
    try {
        Ranks ranks(*line.settings);
        try {
            return run(*line.settings, argv[0], ranks.first());
        } catch (const UserError& error) {
            exit_code = exit_wrong_input;
            problem = error.what();
        } catch (const std::exception& error) {
            problem = error.what();
        }
        if (ranks.first()) std::fprintf(stderr, "pretrain: %s\n", problem.c_str());
        ranks.give_up(exit_code);
    } catch (const UserError& error) {
        exit_code = exit_wrong_input;
        std::fprintf(stderr, "pretrain: %s\n", error.what());
    }
    return exit_code;
}
