// Whole runs at tiny sizes: interruption and resumption, reproducibility, and what is refused.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "pretrain/run_cuda.hpp"
#include "pretrain/training.hpp"
#include "same_runs.hpp"

namespace {

using namespace pretrain;
using test::check_same;
namespace fs = std::filesystem;

struct Folder {
    fs::path path = fs::temp_directory_path() / "steelyard-test-training";
    Folder() { fs::remove_all(path); }
    ~Folder() { fs::remove_all(path); }
};

Settings tiny(const Folder& folder, const std::string& name) {
    Settings s;
    s.ranks = 2;
    s.micro_batch = 2;
    s.accumulate = 2;
    s.sequence = 16;
    s.layers = 2;
    s.dim = 16;
    s.heads = 2;
    s.experts = 4;
    s.hidden = 8;
    s.steps = 6;
    s.bias_rate = 0.1;
    s.eval_sequences = 3;
    s.quiet = true;
    s.out = (folder.path / name).string();
    return s;
}

std::string complaint_of(const Settings& settings, Strategy strategy, const Corpus& corpus) {
    try {
        (void)train(settings, strategy, corpus);
    } catch (const UserError& error) {
        return error.what();
    }
    return "accepted";
}

TEST_CASE("pretrain training: a run that is interrupted after every step equals the uninterrupted one bit for bit") {
    const Folder folder;
    for (const Strategy strategy : all_strategies) {
        CAPTURE(name_of(strategy));
        const Settings whole = tiny(folder, "whole");
        const Corpus corpus(whole);
        const RunRecord record = train(whole, strategy, corpus);
        CHECK(record.series.size() == 6);
        CHECK_FALSE(record.interrupted);
        REQUIRE(record.evaluations.size() == 1);
        CHECK(record.evaluations[0].domains.size() == corpus.domains().size());

        Settings parts = tiny(folder, "parts");
        for (int step = 1; step <= 6; ++step) {
            ask_to_stop();
            const RunRecord part = train(parts, strategy, corpus);
            CHECK(part.series.size() == step);
            CHECK(part.interrupted == (step < 6));
            parts.resume = true;
        }
        forget_stop();
        check_same(whole, parts, strategy);
    }
}

TEST_CASE("pretrain training: every router trains, goes on after an interruption, and is not mixed with another") {
    const Folder folder;
    for (const RouterKind router : all_routers) {
        CAPTURE(name_of(router));
        Settings whole = tiny(folder, "whole"), parts = tiny(folder, "parts");
        whole.router = parts.router = router;
        whole.router_groups = parts.router_groups = 4;
        whole.experts = parts.experts = 12;
        whole.capacity_factor = parts.capacity_factor = 1.0;
        whole.steps = parts.steps = 3;
        whole.eval_every = parts.eval_every = 1;
        const Corpus corpus(whole);
        const bool merged = router == RouterKind::merge;
        const Strategy strategy = merged ? Strategy::none : Strategy::loss_free;
        const RunRecord record = train(whole, strategy, corpus);
        CHECK(record.series.loss[2] != record.series.loss[1]);
        REQUIRE(record.evaluations.size() == 3);
        const LayerRouting &first = record.evaluations[0].routing[1], &last = record.evaluations[2].routing[1];
        CHECK(std::isnan(first.kept));  // there is none before it
        CHECK(std::isnan(last.kept) == merged);
        if (router == RouterKind::hash || router == RouterKind::domain || router == RouterKind::every)
            CHECK(last.kept == 1);  // nothing is learned
        ask_to_stop();
        (void)train(parts, strategy, corpus);
        forget_stop();
        parts.resume = true;
        Settings other = parts;
        other.router = router == RouterKind::hash ? RouterKind::top_k : RouterKind::hash;
        CHECK(complaint_of(other, strategy, corpus).find("which has --router '" + name_of(router)) !=
              std::string::npos);
        (void)train(parts, strategy, corpus);
        check_same(whole, parts, strategy);
    }
}

TEST_CASE("pretrain training: a capacity that is never reached changes no bit, and one that is changes the losses") {
    const Folder folder;
    Settings open = tiny(folder, "open"), roomy = tiny(folder, "roomy"), tight = tiny(folder, "tight");
    roomy.capacity_factor = 100;
    tight.capacity_factor = 0.5;
    const Corpus corpus(open);
    (void)train(open, Strategy::sync, corpus);
    (void)train(roomy, Strategy::sync, corpus);
    check_same(open, roomy, Strategy::sync);
    CHECK(train(tight, Strategy::sync, corpus).series.loss != train(open, Strategy::sync, corpus).series.loss);
}

TEST_CASE("pretrain training: two runs, and runs with other numbers of threads, give the same bits") {
    const Folder folder;
    const Settings first = tiny(folder, "first");
    Settings second = tiny(folder, "second");
    second.threads = 3;
    second.checkpoint_every = 2;
    const Corpus corpus(first);
    (void)train(first, Strategy::sync, corpus);
    (void)train(second, Strategy::sync, corpus);
    check_same(first, second, Strategy::sync);
}

TEST_CASE("pretrain training: the loss falls, and evaluation in between changes nothing") {
    const Folder folder;
    Settings plain = tiny(folder, "plain"), watched = tiny(folder, "watched");
    plain.steps = watched.steps = 40;
    plain.learning_rate = watched.learning_rate = 0.01;
    watched.eval_every = 10;
    const Corpus corpus(plain);
    const RunRecord record = train(plain, Strategy::loss_free, corpus);
    CHECK(record.series.loss.front() > 5.0);
    CHECK(record.series.loss.back() < 4.5);
    const RunRecord seen = train(watched, Strategy::loss_free, corpus);
    CHECK(seen.evaluations.size() == 4);
    CHECK(seen.series.loss == record.series.loss);
    CHECK(seen.evaluations.back().domains[0].loss == record.evaluations.back().domains[0].loss);
}

TEST_CASE("pretrain training: the end of a step reaches the balance state: windows fill and biases move") {
    const Folder folder;
    const Settings settings = tiny(folder, "steps");
    const Corpus corpus(settings);
    const auto windowed = train(settings, Strategy::windowed, corpus).series.balance_loss;
    CHECK(windowed[0] == 0);  // no past yet
    CHECK(windowed[1] > 0.5);
    const auto biased = train(settings, Strategy::loss_free, corpus).series;
    const auto plain = train(settings, Strategy::none, corpus).series;
    CHECK(biased.loss[0] == plain.loss[0]);
    CHECK(biased.loss != plain.loss);
}

TEST_CASE("pretrain training: a checkpoint that does not fit is refused, and the sentence names what differs") {
    const Folder folder;
    Settings settings = tiny(folder, "refused");
    settings.steps = 2;
    const Corpus corpus(settings);
    (void)train(settings, Strategy::micro, corpus);
    settings.resume = true;
    CHECK(complaint_of(settings, Strategy::micro, corpus) == "accepted");

    Settings other = settings;
    other.experts = 8;
    CHECK(complaint_of(other, Strategy::micro, corpus).find("--experts") != std::string::npos);
    other = settings;
    other.learning_rate = 0.5;
    CHECK(complaint_of(other, Strategy::micro, corpus).find("--learning-rate") != std::string::npos);

    fs::rename(checkpoint_path(settings, Strategy::micro), checkpoint_path(settings, Strategy::sync));
    CHECK(complaint_of(settings, Strategy::sync, corpus).find("strategy sync, came micro") != std::string::npos);
    std::ofstream(checkpoint_path(settings, Strategy::micro)) << "not a checkpoint at all";
    CHECK(complaint_of(settings, Strategy::micro, corpus).find("another kind of file") != std::string::npos);
}

TEST_CASE("pretrain training: a GPU that this build or this machine lacks is refused in one sentence") {
    Settings settings;
    require_device(settings);
    settings.device = DeviceKind::cuda;
    const std::string why = cuda_complaint();
    if (why.empty()) {
        require_device(settings);
        MESSAGE("skipped: there is a GPU here");
        return;
    }
    CHECK(why.starts_with("--device cuda: "));
    CHECK(why.find('\n') == std::string::npos);
    CHECK_THROWS_WITH_AS(require_device(settings), why.c_str(), UserError);
}

TEST_CASE("pretrain training: a number of windows that is not compiled is refused in one sentence") {
    const Folder folder;
    Settings settings = tiny(folder, "windows");
    settings.windows = 3;
    CHECK(complaint_of(settings, Strategy::windowed, Corpus(settings)).find("--windows") != std::string::npos);
}

}  // namespace
