#include "pretrain/settings.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "pretrain/any_router.hpp"
#include "pretrain/limit.hpp"

using namespace pretrain;

namespace {

CommandLine parse(const std::vector<std::string>& arguments) {
    std::vector<const char*> argv = {"pretrain"};
    for (const auto& argument : arguments) argv.push_back(argument.c_str());
    return parse_command_line(static_cast<int>(argv.size()), argv.data());
}

/// The sentence for wrong input; checks that it is one line and leaves with the right code.
std::string refusal(const std::vector<std::string>& arguments) {
    const CommandLine line = parse(arguments);
    CHECK_FALSE(line.settings.has_value());
    CHECK(line.exit_code == exit_wrong_input);
    CHECK(line.message.find('\n') == std::string::npos);
    return line.message;
}

}  // namespace

TEST_CASE("no arguments give the defaults, and these are valid") {
    const CommandLine line = parse({});
    REQUIRE(line.settings.has_value());
    CHECK(*line.settings == Settings{});
    CHECK(complaint(Settings{}).empty());
}

TEST_CASE("every option reaches its setting") {
    const CommandLine line = parse({"--balance",
                                    "loss-free,none",
                                    "--ranks",
                                    "3",
                                    "--comm",
                                    "mpi",
                                    "--threads",
                                    "2",
                                    "--micro-batch",
                                    "5",
                                    "--accumulate",
                                    "7",
                                    "--sequence",
                                    "64",
                                    "--experts",
                                    "12",
                                    "--top-k",
                                    "4",
                                    "--hidden",
                                    "40",
                                    "--layers",
                                    "6",
                                    "--heads",
                                    "2",
                                    "--dim",
                                    "48",
                                    "--steps",
                                    "99",
                                    "--seed",
                                    "11",
                                    "--learning-rate",
                                    "0.5",
                                    "--warmup",
                                    "3",
                                    "--weight-decay",
                                    "0.25",
                                    "--clip",
                                    "2.5",
                                    "--balance-coefficient",
                                    "0.125",
                                    "--z-loss",
                                    "0.5",
                                    "--bias-rate",
                                    "0.75",
                                    "--switch-at",
                                    "50",
                                    "--switch-to",
                                    "micro",
                                    "--windows",
                                    "16",
                                    "--router",
                                    "threshold",
                                    "--router-groups",
                                    "6",
                                    "--segment",
                                    "9",
                                    "--threshold",
                                    "0.75",
                                    "--capacity-factor",
                                    "1.5",
                                    "--device",
                                    "cpu",
                                    "--precision",
                                    "float",
                                    "--text",
                                    "a=b/c",
                                    "--text",
                                    "d=e=f",
                                    "--held-out",
                                    "0.25",
                                    "--text-limit",
                                    "1.5",
                                    "--eval-sequences",
                                    "8",
                                    "--out",
                                    "there",
                                    "--resume",
                                    "--checkpoint-every",
                                    "10",
                                    "--eval-every",
                                    "20",
                                    "--quiet"});
    REQUIRE_MESSAGE(line.settings.has_value(), line.message);
    Settings s;
    s.balance = {Strategy::loss_free, Strategy::none};
    s.ranks = 3, s.ranks_given = true, s.comm = CommKind::mpi, s.threads = 2, s.micro_batch = 5, s.accumulate = 7;
    s.sequence = 64, s.experts = 12, s.top_k = 4, s.hidden = 40, s.layers = 6, s.heads = 2, s.dim = 48;
    s.steps = 99, s.seed = 11, s.learning_rate = 0.5, s.warmup = 3, s.weight_decay = 0.25, s.clip = 2.5;
    s.balance_coefficient = 0.125, s.z_loss = 0.5, s.bias_rate = 0.75;
    s.switch_at = 50, s.switch_to = Strategy::micro, s.windows = 16;
    s.router = RouterKind::threshold, s.router_groups = 6, s.segment = 9, s.threshold = 0.75;
    s.capacity_factor = 1.5;
    s.precision = Precision::single;
    s.text = {{"a", "b/c"}, {"d", "e=f"}};
    s.held_out = 0.25, s.text_limit = 1.5, s.eval_sequences = 8, s.out = "there", s.resume = true;
    s.checkpoint_every = 10, s.eval_every = 20, s.quiet = true;
    CHECK(*line.settings == s);
}

TEST_CASE("the command of a run gives the same run again") {
    const CommandLine line =
        parse({"--balance", "schedule", "--steps", "50", "--text", "a=my file's.txt", "--seed", "3"});
    REQUIRE(line.settings.has_value());
    CHECK(command_of(*line.settings) == "pretrain --balance schedule --steps 50 --seed 3 --text 'a=my file'\\''s.txt'");
    CHECK(command_of(Settings{}) == "pretrain");
    Settings mpi;
    mpi.comm = CommKind::mpi;
    mpi.ranks = 8;
    CHECK(command_of(mpi) == "mpirun -n 8 --oversubscribe pretrain --comm mpi");
}

TEST_CASE("help names every option and every strategy") {
    const CommandLine line = parse({"--help"});
    CHECK_FALSE(line.settings.has_value());
    CHECK(line.exit_code == 0);
    Settings s;
    s.fields([&](std::string name, auto&) {
        for (char& c : name)
            if (c == '_') c = '-';
        CHECK_MESSAGE(line.message.find("--" + name) != std::string::npos, name);
    });
    for (const char* flag : {"--resume", "--quiet", "--help"}) CHECK(line.message.find(flag) != std::string::npos);
    for (const Strategy strategy : all_strategies)
        CHECK(line.message.find("  " + name_of(strategy) + ": " + describe(strategy)) != std::string::npos);
    for (const RouterKind router : all_routers)
        CHECK(line.message.find("  " + name_of(router) + ": " + describe(router)) != std::string::npos);
}

TEST_CASE("a router that lets later tokens change earlier ones is refused, and the sentence says why") {
    CHECK(refusal({"--router", "expert-choice"}) ==
          "--router expert-choice cannot train a causal model: it lets a later token change an earlier one: experts "
          "choose among all tokens of a batch");
    for (const char* name : {"base", "sinkhorn", "per-sequence", "soft", "smear"})
        CHECK(refusal({"--router", name}).find("it lets a later token change an earlier one: ") != std::string::npos);
    CHECK(refusal({"--router", "multi-gate"}).find("a language model has one") != std::string::npos);
}

TEST_CASE("what the settings accept, the router accepts") {
    for (const RouterKind router : all_routers) {
        CAPTURE(name_of(router));
        CHECK(router_named(name_of(router)) == router);
        for (const int top_k : {1, 2, 4}) {
            Settings s;
            s.router = router;
            s.top_k = top_k;
            s.experts = 20;
            s.router_groups = 5;
            if (router == RouterKind::merge) s.balance = {Strategy::none};
            REQUIRE(complaint(s).empty());
            const steelyard::LayerShape shape{.tokens = 8, .width = s.dim, .experts = s.experts};
            if (router == RouterKind::merge) continue;  // a layer of its own
            const AnyRouter made = make_router(s);
            CHECK(made.check(shape).ok());
            CHECK(made.top_k(shape) == s.experts_met());
            CHECK(make_limit(s).check(shape, s.experts_met()).ok());
        }
    }
    CHECK(make_limit(Settings{}).capacity.has_value() == false);
    CHECK(make_limit(Settings{}).causal(2));
    Settings s;
    for (const double factor : {0.01, 1.0, 1000.0}) {
        s.capacity_factor = factor;
        CHECK(complaint(s).empty());
        CHECK(make_limit(s).check({.tokens = 8, .experts = 4}, 2).ok());
        CHECK(make_limit(s).causal(2));
    }
}

TEST_CASE("wrong input is answered in one sentence") {
    CHECK(refusal({"--balance", "micro,global"}) ==
          "--balance does not know 'global'; known are micro, sequence, sync, buffer, shuffle, windowed, hybrid, "
          "loss-free, schedule, none");
    CHECK(refusal({"--balance", "micro,micro"}) == "--balance names 'micro' twice");
    CHECK(refusal({"--balance", ""}) != "");
    CHECK(refusal({"--top-k", "17"}) == "--top-k 17 is more than --experts 16");
    CHECK(refusal({"--dim", "97"}) == "--dim 97 cannot be divided by --heads 4");
    CHECK(refusal({"--dim", "12"}).find("--dim / --heads must be even") == 0);
    CHECK(refusal({"--steps", "ten"}) == "--steps takes a number that fits, but 'ten' came");
    CHECK(refusal({"--steps", "0"}) == "--steps must be at least 1, but is 0");
    CHECK(refusal({"--steps"}).find("--steps") == 0);
    CHECK(refusal({"--ranks", "-2"}) == "--ranks must be at least 1, but is -2");
    CHECK(refusal({"--seed", "-1"}).find("--seed must be") == 0);
    CHECK(refusal({"--held-out", "0.9"}) == "--held-out must be above 0 and at most 0.5, but is 0.9");
    CHECK(refusal({"--held-out", "nan"}).find("--held-out") == 0);
    CHECK(refusal({"--learning-rate", "0"}) == "--learning-rate must be above 0, but is 0");
    CHECK(refusal({"--z-loss", "-1"}) == "--z-loss must be 0 or more, but is -1");
    CHECK(refusal({"--comm", "tcp"}) == "--comm is threads or mpi, but 'tcp' came");
    CHECK(refusal({"--switch-to", "none"}) == "--switch-to is sync or micro, but 'none' came");
    CHECK(refusal({"--switch-at", "400"}) == "--switch-at 400 is not before the end of --steps 400");
    CHECK(refusal({"--windows", "9"}) == "--windows is compiled for 1, 4 and 16, but 9 came");
    CHECK(refusal({"--text", "novel.txt"}) == "--text takes name=path, but 'novel.txt' came");
    CHECK(refusal({"--text", "a=b", "--text", "a=c"}) == "--text names the domain 'a' twice");
    CHECK(refusal({"--router", "best"}) ==
          "--router does not know 'best'; known are top-k, noisy-top-k, hierarchical, dselect-k, x-moe, residual, "
          "threshold, dense, every, hash, task, domain, random, merge");
    CHECK(refusal({"--router", "merge"}) ==
          "--router merge blends all experts, so there is nothing to balance: it needs --balance none");
    CHECK(refusal({"--router", "merge", "--balance", "none", "--capacity-factor", "1"}) ==
          "--router merge drops nothing: it needs --capacity-factor 0");
    CHECK(refusal({"--segment", "0"}) == "--segment must be at least 1, but is 0");
    CHECK(refusal({"--router", "hierarchical", "--router-groups", "3"}) ==
          "--router-groups 3 does not divide --experts 16");
    CHECK(refusal({"--router", "hierarchical", "--router-groups", "2", "--top-k", "4"}) ==
          "--router hierarchical takes one expert from each of --top-k groups, but --top-k 4 is more than "
          "--router-groups 2");
    CHECK(refusal({"--router", "domain", "--experts", "8"}) ==
          "--router domain gives each of the 5 domains --top-k 2 experts of its own, so --experts must be at least "
          "10, but is 8");
    CHECK(refusal({"--threshold", "1.5"}) == "--threshold must be from 0 to 1, but is 1.5");
    CHECK(refusal({"--capacity-factor", "-1"}) ==
          "--capacity-factor must be 0 (no limit) or from 0.01 to 1000, but is -1");
    CHECK(refusal({"--capacity-factor", "nan"}).find("--capacity-factor") == 0);
    CHECK(refusal({"--foo", "3"}) == "there is no option '--foo'; --help lists them all");
    CHECK(refusal({"foo"}) == "there is no option 'foo'; --help lists them all");
}

TEST_CASE("what a GPU cannot do is refused before anything starts, and the sentence says what it can") {
    const auto on_gpu = [](std::vector<std::string> arguments) {
        arguments.insert(arguments.begin(), {"--device", "cuda"});
        return arguments;
    };
    CHECK(refusal({"--device", "tpu"}) == "--device is cpu or cuda, but 'tpu' came");
    CHECK(refusal({"--precision", "fp8"}) == "--precision is usual, float or bf16, but 'fp8' came");
    CHECK(refusal({"--precision", "bf16"}) == "--precision bf16 needs --device cuda: on the CPU there is float");
    for (const RouterKind router : all_routers) {
        if (router == RouterKind::top_k || router == RouterKind::dense || router == RouterKind::merge) continue;
        CHECK(refusal(on_gpu({"--router", name_of(router)})) ==
              "--device cuda has the routers top-k and dense, but --router '" + name_of(router) + "' came");
    }
    CHECK(refusal(on_gpu({"--router", "merge", "--balance", "none"})).find("--router 'merge'") != std::string::npos);
    CHECK(refusal(on_gpu({"--capacity-factor", "1.25"})) ==
          "--device cuda drops nothing: it needs --capacity-factor 0, but 1.25 came");
    CHECK(refusal(on_gpu({"--balance", "sync,shuffle"})) ==
          "--device cuda has every --balance but 'shuffle', which draws tokens over ranks");
    CHECK(refusal(on_gpu({"--comm", "mpi"})) ==
          "--device cuda runs all ranks on one GPU, as threads: it needs --comm threads, but 'mpi' came");
    CHECK(refusal(on_gpu({"--experts", "1025"})) == "--experts must be at most 1024 with --device cuda, but is 1025");
}

TEST_CASE("what a GPU can do is accepted: bf16 unless float is asked for") {
    for (const Strategy strategy : all_strategies) {
        if (strategy == Strategy::shuffle) continue;
        const CommandLine line = parse({"--device", "cuda", "--balance", name_of(strategy)});
        REQUIRE_MESSAGE(line.settings.has_value(), line.message);
        CHECK(line.settings->device == DeviceKind::cuda);
        CHECK(line.settings->in_bf16());
    }
    const CommandLine line = parse({"--device", "cuda", "--router", "dense", "--precision", "float"});
    REQUIRE(line.settings.has_value());
    CHECK_FALSE(line.settings->in_bf16());
    CHECK(command_of(*line.settings) == "pretrain --router dense --device cuda --precision float");
    CHECK_FALSE(Settings{}.in_bf16());
}

TEST_CASE("Balance BSZ counts the sequences that f is taken over") {
    Settings s;  // 4 ranks of 2 sequences, 4 micro-steps
    CHECK(s.global_batch() == 32);
    CHECK(balance_bsz(s, Strategy::micro) == 2);
    CHECK(balance_bsz(s, Strategy::sequence) == 1);
    CHECK(balance_bsz(s, Strategy::sync) == 8);
    CHECK(balance_bsz(s, Strategy::buffer) == 32);
    CHECK(balance_bsz(s, Strategy::none) == 0);
    CHECK(balance_bsz_text(s, Strategy::hybrid) == "32 & 2");
    CHECK(balance_bsz_text(s, Strategy::shuffle) == "2 of 8");
    CHECK(balance_bsz_text(s, Strategy::schedule) == "2 → 8 at step 200");
    s.switch_to = Strategy::micro;
    s.switch_at = 30;
    CHECK(balance_bsz_text(s, Strategy::schedule) == "8 → 2 at step 30");
}

TEST_CASE("a checkpoint is resumed under its own settings only") {
    Settings saved, now;
    now.out = "elsewhere", now.threads = 2, now.checkpoint_every = 7, now.eval_every = 5;
    CHECK(resume_complaint(saved, now).empty());
    now.device = DeviceKind::cuda, now.precision = Precision::single;
    CHECK(resume_complaint(saved, now).empty());
    now.router = RouterKind::hash;
    CHECK(resume_complaint(saved, now) ==
          "--resume needs the settings of the checkpoint, which has --router 'top-k', but 'hash' came");
    now.router = saved.router;
    now.ranks = 2;
    CHECK(resume_complaint(saved, now) ==
          "--resume needs the settings of the checkpoint, which has --ranks '4', but '2' came");
}
