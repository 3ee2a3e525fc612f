#include "pretrain/record.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "fabricated.hpp"

using namespace pretrain;

TEST_CASE("a record survives JSON with every bit") {
    RunRecord run = fabricated::run(Strategy::loss_free, 0.3, 0.01, 20);
    run.settings.text = {{"a \"quoted\" name", "päth/with\nnewline"}};
    run.settings.learning_rate = 0.1;
    run.settings.seed = 0x7FFFFFFFFFFFFFFFu;
    run.series.loss[3] = std::numeric_limits<double>::infinity();
    run.series.loss[4] = -std::numeric_limits<double>::infinity();
    run.series.loss[5] = 5e-324;
    run.series.loss[6] = 1.0 / 3.0;
    run.interrupted = true;
    const std::string text = to_json(run);
    const RunRecord back = record_from_json(text);
    CHECK(to_json(back) == text);
    CHECK(back.settings == run.settings);
    CHECK(back.strategy == run.strategy);
    CHECK(back.series.loss == run.series.loss);
    CHECK(back.series.max_vio_micro == run.series.max_vio_micro);
    CHECK(back.loads[1].tokens_per_expert == run.loads[1].tokens_per_expert);
    CHECK(back.evaluations[0].counts == run.evaluations[0].counts);
    CHECK(back.evaluations[0].routing[2].dropped == run.evaluations[0].routing[2].dropped);
    CHECK(back.interrupted);

    run.series.loss[3] = std::nan("");
    CHECK(std::isnan(record_from_json(to_json(run)).series.loss[3]));
}

TEST_CASE("a record from before a setting was there has that setting's default") {
    RunRecord run = fabricated::run(Strategy::micro, 0, 0, 10);
    run.settings.device = DeviceKind::cuda;
    run.settings.precision = Precision::bf16;
    CHECK(record_from_json(to_json(run)).settings == run.settings);
    std::string text = to_json(run);
    for (const std::string line : {"\"device\": \"cuda\",", "\"precision\": \"bf16\","}) {
        REQUIRE(text.find(line) != std::string::npos);
        text.erase(text.find(line), line.size());
    }
    const RunRecord back = record_from_json(text);
    CHECK(back.settings.device == DeviceKind::cpu);
    CHECK(back.settings.precision == Precision::usual);
    CHECK(back.settings.seed == run.settings.seed);
}

TEST_CASE("results.json comes back as the same runs") {
    const auto path = std::filesystem::temp_directory_path() / "steelyard-results.json";
    const std::vector<RunRecord> runs = {fabricated::run(Strategy::micro, 0, 0, 10),
                                         fabricated::run(Strategy::sync, 1, 0, 10)};
    write_results(path, runs);
    const auto back = read_results(path);
    REQUIRE(back.size() == 2);
    CHECK(to_json(back[0]) == to_json(runs[0]));
    CHECK(to_json(back[1]) == to_json(runs[1]));

    std::ofstream(path) << "{\"version\": 2, \"runs\": [{}]}";
    CHECK_THROWS_AS((void)read_results(path), UserError);
    std::ofstream(path) << "half a fi";
    CHECK_THROWS_AS((void)read_results(path), UserError);
    std::filesystem::remove(path);
    CHECK_THROWS_AS((void)read_results(path), UserError);
    CHECK_THROWS_AS((void)record_from_json("[1, 2]"), UserError);
}

TEST_CASE("specialisation is read from a layer's counts, experts down and domains across") {
    // By hand: shares (3/4, 1/4) and (1/4, 3/4), marginal 1/2.
    const auto some = specialization_of({{3, 1}, {1, 3}});
    CHECK(some.mutual_information == doctest::Approx(0.75 * std::log(1.5) + 0.25 * std::log(0.5)));
    CHECK(some.largest_share == 0.75);
    CHECK(specialization_of({{5, 50}, {15, 150}}).mutual_information == doctest::Approx(0.0));
    // Not square: one expert takes all of both domains.
    CHECK(specialization_of({{4, 4}, {0, 0}, {0, 0}}).largest_share == 1.0);
    CHECK(specialization_of({{4, 4}, {0, 0}, {0, 0}}).mutual_information == doctest::Approx(0.0));
    CHECK(specialization_of({}).mutual_information == 0.0);
}

TEST_CASE("the summary is computed from the record") {
    RunRecord run = fabricated::run(Strategy::micro, 0, 0, 20);
    run.domains = {"a", "b"};
    run.evaluations[0].domains = {{"a", std::log(2.0), 10}, {"b", std::log(8.0), 10}};
    run.evaluations[0].counts = {{{1, 0}, {0, 1}}};
    run.evaluations[0].routing = {{0.2, 0.1, 0, 0.5, {10, 10}, {0, 4}}, {0.4, 0.1, 0, 1.0, {10, 10}, {0, 6}}};
    run.series.loss.assign(20, 9.0);
    run.series.loss[18] = 1.0, run.series.loss[19] = 2.0;
    run.series.max_vio_micro.assign(20, {100.0});
    for (std::size_t i = 10; i < 20; ++i) run.series.max_vio_micro[i] = {1.0, 3.0};
    run.wall_seconds = 4;
    const Summary s = summarise(run);
    CHECK(s.perplexity[0] == doctest::Approx(2.0));
    CHECK(s.geometric_perplexity == doctest::Approx(4.0));
    CHECK(s.final_loss == doctest::Approx(1.5));
    CHECK(s.max_vio_micro == doctest::Approx(2.0));
    CHECK(s.information[0] == doctest::Approx(std::log(2.0)));
    CHECK(s.share[0] == 1.0);
    CHECK(s.dropped == doctest::Approx(0.25));
    CHECK(s.by_byte == doctest::Approx(0.3));
    CHECK(s.by_position == doctest::Approx(0.1));
    CHECK(s.kept == doctest::Approx(0.75));
    CHECK(s.tokens == 20 * 4096);
    CHECK(s.tokens_per_second == doctest::Approx(20 * 1024.0));

    const Summary empty = summarise(RunRecord{});
    CHECK(std::isnan(empty.geometric_perplexity));
    CHECK(std::isnan(empty.final_loss));
    CHECK(std::isnan(empty.kept));
    CHECK(std::isnan(empty.dropped));
}

TEST_CASE("truncation forgets what came after the checkpoint and keeps the rest") {
    RunRecord run = fabricated::run(Strategy::micro, 0, 0, 20);
    Evaluation early = run.evaluations[0];
    early.step = 12;
    run.evaluations.insert(run.evaluations.begin(), early);
    const RunRecord whole = run;
    truncate(run, 12);
    CHECK(run.series.size() == 12);
    CHECK(run.series.step.back() == 11);
    CHECK(run.series.loss.size() == 12);
    CHECK(run.series.max_vio_global.size() == 12);
    CHECK(run.series.loss[11] == whole.series.loss[11]);
    CHECK(run.loads.back().step == 10);
    REQUIRE(run.evaluations.size() == 1);
    CHECK(run.evaluations[0].step == 12);
    truncate(run, 100);
    CHECK(run.series.size() == 12);
}
