#include "settings.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cmath>
#include <sstream>

namespace pretrain {

namespace {

struct StrategyText {
    Strategy strategy;
    const char* name;
    const char* meaning;
};

constexpr StrategyText strategy_texts[] = {
    {Strategy::micro, "micro", "load fraction f of each rank's micro-batch"},
    {Strategy::sequence, "sequence", "f of each sequence"},
    {Strategy::sync, "sync", "f summed over all ranks' micro-batches"},
    {Strategy::buffer, "buffer", "sync, summed over the micro-steps so far as well"},
    {Strategy::shuffle, "shuffle", "f of a sample of micro-batch size, drawn over all ranks"},
    {Strategy::windowed, "windowed", "f of the last --windows optimizer steps"},
    {Strategy::hybrid, "hybrid", "buffer, and micro at 1 % of its weight"},
    {Strategy::loss_free, "loss-free", "a selection bias moved after each step, no balance loss"},
    {Strategy::schedule, "schedule", "micro then sync, or sync then micro, from --switch-at on"},
    {Strategy::none, "none", "no balance at all"},
};

struct RouterText {
    RouterKind router;
    const char* name;
    const char* meaning;
};

constexpr RouterText router_texts[] = {
    {RouterKind::top_k, "top-k", "the --top-k best of a softmax"},
    {RouterKind::noisy_top_k, "noisy-top-k", "top-k with learned noise on the logits while training"},
    {RouterKind::hierarchical, "hierarchical", "the best expert of each of the --top-k best of --router-groups groups"},
    {RouterKind::dselect_k, "dselect-k", "--top-k smooth selectors that become sparse while training"},
    {RouterKind::x_moe, "x-moe", "the --top-k closest by direction, on a sphere of few dimensions"},
    {RouterKind::residual, "residual", "top-k of logits that those of the layer before are added to, mapped"},
    {RouterKind::threshold, "threshold", "as few of the --top-k best as have --threshold of the probability"},
    {RouterKind::dense, "dense", "all experts, weighed by a softmax"},
    {RouterKind::every, "every", "all experts, each with weight 1"},
    {RouterKind::hash, "hash", "--top-k experts that follow from the byte; nothing is learned"},
    {RouterKind::task, "task", "the --top-k best of logits that are learned for each domain as a whole"},
    {RouterKind::domain, "domain", "--top-k experts of each domain's own"},
    {RouterKind::random, "random", "--top-k at random while training; the first ones in evaluation"},
    {RouterKind::merge, "merge", "one expert, blended from all for --segment bytes by those before; --balance none"},
};

/// What a language model cannot use, and why.
struct UnfitRouter {
    const char* name;
    const char* reason;
};

constexpr UnfitRouter unfit_routers[] = {
    {"expert-choice", "lets a later token change an earlier one: experts choose among all tokens of a batch"},
    {"base", "lets a later token change an earlier one: its assignment is balanced over all tokens of a batch"},
    {"sinkhorn", "lets a later token change an earlier one: its scores are balanced over all tokens of a batch"},
    {"per-sequence", "lets a later token change an earlier one: it chooses by the mean of the whole sequence"},
    {"soft", "lets a later token change an earlier one: its slots are means over all tokens of a sequence"},
    {"smear", "lets a later token change an earlier one: it blends experts by the mean of the whole sequence"},
    {"multi-gate", "gives one output for each of several tasks, and a language model has one"},
};

template <class Texts>
std::string names_in(const Texts& texts) {
    std::string list;
    for (const auto& text : texts) list += std::string(list.empty() ? "" : ", ") + text.name;
    return list;
}

std::string strategy_list() { return names_in(strategy_texts); }

/// A number as a person writes it: "0.01", "400".
std::string number(double value) {
    std::ostringstream out;
    out << value;
    return out.str();
}

template <class T>
std::string out_of_range(const char* option, const char* expected, T came) {
    return std::string(option) + " must be " + expected + ", but is " + number(static_cast<double>(came));
}

std::vector<Strategy> strategies_from(const std::string& list) {
    std::vector<Strategy> strategies;
    std::stringstream in(list);
    for (std::string name; std::getline(in, name, ',');) {
        const Strategy strategy = strategy_named(name);
        if (std::find(strategies.begin(), strategies.end(), strategy) != strategies.end())
            throw UserError("--balance names '" + name + "' twice");
        strategies.push_back(strategy);
    }
    if (strategies.empty()) throw UserError("--balance names no strategy; known are " + strategy_list());
    return strategies;
}

TextSource text_source_from(const std::string& text) {
    const auto equals = text.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == text.size())
        throw UserError("--text takes name=path, but '" + text + "' came");
    return {text.substr(0, equals), text.substr(equals + 1)};
}

std::string joined(const std::vector<Strategy>& strategies) {
    std::string list;
    for (const Strategy strategy : strategies) list += (list.empty() ? "" : ",") + name_of(strategy);
    return list;
}

/// Options that arrive as text and become richer values after parsing.
struct RawText {
    std::string balance, switch_to, comm, router, device, precision;
    std::vector<std::string> text;
};

void add_options(CLI::App& app, Settings& s, RawText& raw) {
    app.option_defaults()->always_capture_default();
    app.get_formatter()->column_width(37);

    std::string balance_help = "Strategies, separated by commas, run one after the other with equal tokens and seed:";
    for (const auto& text : strategy_texts) balance_help += std::string("\n  ") + text.name + ": " + text.meaning;
    const char* group = "Balance";
    app.add_option("--balance", raw.balance, balance_help)->group(group)->type_name("LIST");
    app.add_option("--balance-coefficient", s.balance_coefficient, "Weight of the load-balancing loss")->group(group);
    app.add_option("--z-loss", s.z_loss, "Weight of the router z-loss")->group(group);
    app.add_option("--bias-rate", s.bias_rate, "loss-free: step of the selection bias")->group(group);
    app.add_option("--windows", s.windows, "windowed: optimizer steps that f is pooled over; 1, 4 or 16")->group(group);
    app.add_option("--switch-at", s.switch_at, "schedule: step of the switch; 0: after half of the steps")
        ->group(group);
    app.add_option("--switch-to", raw.switch_to, "schedule: sync (micro before) or micro (sync before)")->group(group);

    std::string router_help = "What chooses a token's experts:";
    for (const auto& text : router_texts) router_help += std::string("\n  ") + text.name + ": " + text.meaning;
    group = "Routing";
    app.add_option("--router", raw.router, router_help)->group(group)->type_name("NAME");
    app.add_option("--router-groups", s.router_groups, "hierarchical: groups of experts")->group(group);
    app.add_option("--segment", s.segment, "merge: bytes that share a blend of experts")->group(group);
    app.add_option("--threshold", s.threshold, "threshold: probability that a token's experts add up to")
        ->group(group);
    app.add_option("--capacity-factor", s.capacity_factor,
                   "Places of an expert in a micro-batch over its even share; later tokens are dropped. 0: no limit")
        ->group(group);

    group = "Device";
    app.add_option("--device", raw.device, "cpu, or cuda: one GPU for all ranks")->group(group)->type_name("NAME");
    app.add_option("--precision", raw.precision,
                   "Of the mixture-of-experts layers: bf16 or float; usual: bf16 on a GPU, float on the CPU")
        ->group(group)
        ->type_name("NAME");

    group = "Batch (one step sees ranks x micro-batch x accumulate sequences)";
    app.add_option("--ranks", s.ranks, "Data-parallel ranks")->group(group);
    app.add_option("--comm", raw.comm, "threads: ranks of this process; mpi: run under mpirun")->group(group);
    app.add_option("--threads", s.threads, "Threads of each rank")->group(group);
    app.add_option("--micro-batch", s.micro_batch, "Sequences of a rank at a time")->group(group);
    app.add_option("--accumulate", s.accumulate, "Micro-steps of one optimizer step")->group(group);
    app.add_option("--sequence", s.sequence, "Bytes of a sequence")->group(group);

    group = "Model";
    app.add_option("--layers", s.layers, "Transformer layers")->group(group);
    app.add_option("--dim", s.dim, "Width of the model")->group(group);
    app.add_option("--heads", s.heads, "Attention heads")->group(group);
    app.add_option("--experts", s.experts, "Experts of each layer")->group(group);
    app.add_option("--top-k", s.top_k, "Experts of each token")->group(group);
    app.add_option("--hidden", s.hidden, "Inner width of an expert")->group(group);

    group = "Training";
    app.add_option("--steps", s.steps, "Optimizer steps of each strategy")->group(group);
    app.add_option("--seed", s.seed, "Of the first weights, the order of the text and all noise")->group(group);
    app.add_option("--learning-rate", s.learning_rate, "Peak; a cosine takes it to a tenth")->group(group);
    app.add_option("--warmup", s.warmup, "Steps of linear warm-up, at most a tenth of the run")->group(group);
    app.add_option("--weight-decay", s.weight_decay, "Of AdamW")->group(group);
    app.add_option("--clip", s.clip, "Largest norm of the whole gradient; 0: any")->group(group);

    group = "Text";
    app.add_option("--text", raw.text,
                   "A domain: its name and a file or folder; repeat it for each domain. "
                   "Without it: built-in synthetic languages")
        ->group(group)
        ->type_name("NAME=PATH")
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    app.add_option("--held-out", s.held_out, "Fraction of each domain that is kept for evaluation")->group(group);
    app.add_option("--text-limit", s.text_limit, "Megabytes of each domain that are used; 0: all")->group(group);
    app.add_option("--eval-sequences", s.eval_sequences, "Held-out sequences of each domain per evaluation; 0: all")
        ->group(group);

    group = "Output";
    app.add_option("--out", s.out, "Folder for results.json, report.html and checkpoints")->group(group);
    app.add_flag("--resume", s.resume, "Go on from the checkpoint in --out, bit for bit")->group(group);
    app.add_option("--checkpoint-every", s.checkpoint_every, "Steps; 0: only at the end or when interrupted")
        ->group(group);
    app.add_option("--eval-every", s.eval_every, "Steps; 0: only at the end")->group(group);
    app.add_flag("--quiet", s.quiet, "No progress and no table")->group(group);
}

}  // namespace

std::string name_of(Strategy strategy) {
    for (const auto& text : strategy_texts)
        if (text.strategy == strategy) return text.name;
    return "unknown";
}

Strategy strategy_named(std::string_view name) {
    for (const auto& text : strategy_texts)
        if (name == text.name) return text.strategy;
    throw UserError("--balance does not know '" + std::string(name) + "'; known are " + strategy_list());
}

std::string describe(Strategy strategy) {
    for (const auto& text : strategy_texts)
        if (text.strategy == strategy) return text.meaning;
    return "";
}

std::string name_of(RouterKind router) {
    for (const auto& text : router_texts)
        if (text.router == router) return text.name;
    return "unknown";
}

RouterKind router_named(std::string_view name) {
    for (const auto& text : router_texts)
        if (name == text.name) return text.router;
    for (const auto& text : unfit_routers)
        if (name == text.name)
            throw UserError("--router " + std::string(name) + " cannot train a causal model: it " + text.reason);
    throw UserError("--router does not know '" + std::string(name) + "'; known are " + names_in(router_texts));
}

std::string describe(RouterKind router) {
    for (const auto& text : router_texts)
        if (text.router == router) return text.meaning;
    return "";
}

std::string name_of(CommKind comm) { return comm == CommKind::mpi ? "mpi" : "threads"; }

CommKind comm_named(std::string_view name) {
    if (name == "threads") return CommKind::threads;
    if (name == "mpi") return CommKind::mpi;
    throw UserError("--comm is threads or mpi, but '" + std::string(name) + "' came");
}

std::string name_of(DeviceKind device) { return device == DeviceKind::cuda ? "cuda" : "cpu"; }

DeviceKind device_named(std::string_view name) {
    if (name == "cpu") return DeviceKind::cpu;
    if (name == "cuda") return DeviceKind::cuda;
    throw UserError("--device is cpu or cuda, but '" + std::string(name) + "' came");
}

std::string name_of(Precision precision) {
    return precision == Precision::usual ? "usual" : precision == Precision::bf16 ? "bf16" : "float";
}

Precision precision_named(std::string_view name) {
    for (const Precision precision : {Precision::usual, Precision::single, Precision::bf16})
        if (name == name_of(precision)) return precision;
    throw UserError("--precision is usual, float or bf16, but '" + std::string(name) + "' came");
}

std::int64_t balance_bsz(const Settings& s, Strategy strategy) {
    switch (strategy) {
        case Strategy::sequence:
            return 1;
        case Strategy::micro:
        case Strategy::shuffle:
            return s.micro_batch;
        case Strategy::sync:
            return std::int64_t{s.ranks} * s.micro_batch;
        case Strategy::buffer:
        case Strategy::hybrid:
        case Strategy::loss_free:
            return s.global_batch();
        case Strategy::windowed:
            return s.global_batch() * s.windows;
        case Strategy::schedule:
            return balance_bsz(s, s.switch_to);
        case Strategy::none:
            return 0;
    }
    return 0;
}

std::string balance_bsz_text(const Settings& s, Strategy strategy) {
    const std::string bsz = std::to_string(balance_bsz(s, strategy));
    switch (strategy) {
        case Strategy::hybrid:
            return bsz + " & " + std::to_string(s.micro_batch);
        case Strategy::shuffle:
            return bsz + " of " + std::to_string(balance_bsz(s, Strategy::sync));
        case Strategy::schedule: {
            const Strategy from = s.switch_to == Strategy::sync ? Strategy::micro : Strategy::sync;
            return std::to_string(balance_bsz(s, from)) + " → " + bsz + " at step " + std::to_string(s.switch_step());
        }
        case Strategy::none:
            return "none";
        default:
            return bsz;
    }
}

namespace {

constexpr int most_experts_on_gpu = 1024;

/// What is wrong with the router and its options, in one sentence.
std::string router_complaint(const Settings& s) {
    if (!(s.threshold >= 0 && s.threshold <= 1)) return out_of_range("--threshold", "from 0 to 1", s.threshold);
    if (s.capacity_factor != 0 && !(s.capacity_factor >= 0.01 && s.capacity_factor <= 1000))
        return out_of_range("--capacity-factor", "0 (no limit) or from 0.01 to 1000", s.capacity_factor);
    if (s.router == RouterKind::hierarchical) {
        const std::string groups = "--router-groups " + std::to_string(s.router_groups);
        if (s.router_groups < 1 || s.experts % s.router_groups != 0)
            return groups + " does not divide --experts " + std::to_string(s.experts);
        if (s.top_k > s.router_groups)
            return "--router hierarchical takes one expert from each of --top-k groups, but --top-k " +
                   std::to_string(s.top_k) + " is more than " + groups;
    }
    if (s.router == RouterKind::merge) {
        if (s.balance != std::vector{Strategy::none})
            return "--router merge blends all experts, so there is nothing to balance: it needs --balance none";
        if (s.capacity_factor != 0) return "--router merge drops nothing: it needs --capacity-factor 0";
    }
    const int needed = s.domain_count() * s.top_k;
    if (s.router == RouterKind::domain && needed > s.experts)
        return "--router domain gives each of the " + std::to_string(s.domain_count()) + " domains --top-k " +
               std::to_string(s.top_k) + " experts of its own, so --experts must be at least " +
               std::to_string(needed) + ", but is " + std::to_string(s.experts);
    return "";
}

/// What the device cannot do of what the settings ask, in one sentence.
std::string device_complaint(const Settings& s) {
    if (s.device == DeviceKind::cpu) {
        if (s.in_bf16()) return "--precision bf16 needs --device cuda: on the CPU there is float";
        return "";
    }
    if (s.comm != CommKind::threads)
        return "--device cuda runs all ranks on one GPU, as threads: it needs --comm threads, but '" + name_of(s.comm) +
               "' came";
    if (s.router != RouterKind::top_k && s.router != RouterKind::dense)
        return "--device cuda has the routers top-k and dense, but --router '" + name_of(s.router) + "' came";
    if (s.capacity_factor != 0)
        return "--device cuda drops nothing: it needs --capacity-factor 0, but " + number(s.capacity_factor) + " came";
    if (std::find(s.balance.begin(), s.balance.end(), Strategy::shuffle) != s.balance.end())
        return "--device cuda has every --balance but 'shuffle', which draws tokens over ranks";
    if (s.experts > most_experts_on_gpu)
        return out_of_range("--experts", ("at most " + std::to_string(most_experts_on_gpu) + " with --device cuda").c_str(),
                            s.experts);
    return "";
}

}  // namespace

std::string complaint(const Settings& s) {
    const auto at_least = [](const char* option, auto value, auto least) -> std::string {
        return value >= least ? "" : out_of_range(option, ("at least " + std::to_string(least)).c_str(), value);
    };
    const auto not_negative = [](const char* option, double value) -> std::string {
        return value >= 0 && std::isfinite(value) ? "" : out_of_range(option, "0 or more", value);
    };
    for (const std::string& sentence : {
             s.balance.empty() ? std::string("--balance names no strategy") : std::string(),
             at_least("--ranks", s.ranks, 1),
             at_least("--threads", s.threads, 1),
             at_least("--micro-batch", s.micro_batch, 1),
             at_least("--accumulate", s.accumulate, 1),
             at_least("--sequence", s.sequence, 2),
             at_least("--layers", s.layers, 1),
             at_least("--dim", s.dim, 1),
             at_least("--heads", s.heads, 1),
             at_least("--experts", s.experts, 1),
             at_least("--top-k", s.top_k, 1),
             at_least("--hidden", s.hidden, 1),
             at_least("--segment", s.segment, 1),
             at_least("--steps", s.steps, std::int64_t{1}),
             at_least("--switch-at", s.switch_at, std::int64_t{0}),
             at_least("--warmup", s.warmup, std::int64_t{0}),
             at_least("--eval-sequences", s.eval_sequences, 0),
             at_least("--checkpoint-every", s.checkpoint_every, std::int64_t{0}),
             at_least("--eval-every", s.eval_every, std::int64_t{0}),
             not_negative("--balance-coefficient", s.balance_coefficient),
             not_negative("--z-loss", s.z_loss),
             not_negative("--bias-rate", s.bias_rate),
             not_negative("--weight-decay", s.weight_decay),
             not_negative("--clip", s.clip),
             not_negative("--text-limit", s.text_limit),
         })
        if (!sentence.empty()) return sentence;

    if (!(s.learning_rate > 0) || !std::isfinite(s.learning_rate))
        return out_of_range("--learning-rate", "above 0", s.learning_rate);
    if (!(s.held_out > 0 && s.held_out <= 0.5))
        return out_of_range("--held-out", "above 0 and at most 0.5", s.held_out);
    if (s.seed > 0x7FFFFFFFFFFFFFFFu) return "--seed must be a whole number from 0 to 9223372036854775807";
    if (s.steps > 1'000'000'000) return out_of_range("--steps", "at most a thousand million", s.steps);
    if (s.top_k > s.experts)
        return "--top-k " + std::to_string(s.top_k) + " is more than --experts " + std::to_string(s.experts);
    if (const std::string sentence = router_complaint(s); !sentence.empty()) return sentence;
    if (const std::string sentence = device_complaint(s); !sentence.empty()) return sentence;
    if (s.dim % s.heads != 0)
        return "--dim " + std::to_string(s.dim) + " cannot be divided by --heads " + std::to_string(s.heads);
    if (s.dim / s.heads % 2 != 0)
        return "--dim / --heads must be even, because rotary positions turn pairs of numbers, but is " +
               std::to_string(s.dim / s.heads);
    if (s.switch_to != Strategy::sync && s.switch_to != Strategy::micro)
        return "--switch-to is sync or micro, but '" + name_of(s.switch_to) + "' came";
    if (s.switch_at >= s.steps)
        return "--switch-at " + std::to_string(s.switch_at) + " is not before the end of --steps " +
               std::to_string(s.steps);
    if (s.windows != 1 && s.windows != 4 && s.windows != 16)  // part of the policy's type
        return "--windows is compiled for 1, 4 and 16, but " + std::to_string(s.windows) + " came";
    if (s.out.empty()) return "--out names no folder";
    for (std::size_t a = 0; a < s.text.size(); ++a)
        for (std::size_t b = 0; b < a; ++b)
            if (s.text[a].name == s.text[b].name) return "--text names the domain '" + s.text[a].name + "' twice";
    return "";
}

namespace {

/// Collects "name=value" for every field, for comparing and for the command line.
struct FieldTexts {
    std::vector<std::pair<std::string, std::string>> texts;

    void operator()(const char* name, const std::vector<Strategy>& v) { texts.emplace_back(name, joined(v)); }
    void operator()(const char* name, const std::vector<TextSource>& sources) {
        std::string all;
        for (const auto& source : sources) all += (all.empty() ? "" : " ") + source.name + "=" + source.path;
        texts.emplace_back(name, all);
    }
    void operator()(const char* name, Strategy v) { texts.emplace_back(name, name_of(v)); }
    void operator()(const char* name, CommKind v) { texts.emplace_back(name, name_of(v)); }
    void operator()(const char* name, DeviceKind v) { texts.emplace_back(name, name_of(v)); }
    void operator()(const char* name, Precision v) { texts.emplace_back(name, name_of(v)); }
    void operator()(const char* name, RouterKind v) { texts.emplace_back(name, name_of(v)); }
    void operator()(const char* name, const std::string& v) { texts.emplace_back(name, v); }
    template <class Number>
    void operator()(const char* name, const Number& v) {
        std::ostringstream out;
        out.precision(std::is_floating_point_v<Number> ? 15 : 6);
        out << v;
        texts.emplace_back(name, out.str());
    }
};

auto field_texts(Settings s) {
    FieldTexts collected;
    s.fields(collected);
    return collected.texts;
}

std::string option_of(std::string name) {
    std::replace(name.begin(), name.end(), '_', '-');
    return "--" + name;
}

/// As a shell reads it.
std::string quoted(const std::string& text) {
    const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
        return std::isalnum(c) || std::string_view("-_./=,+:@%").find(static_cast<char>(c)) != std::string_view::npos;
    });
    if (plain) return text;
    std::string result = "'";
    for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return result + "'";
}

}  // namespace

std::string resume_complaint(const Settings& saved, const Settings& now) {
    const auto before = field_texts(saved), after = field_texts(now);
    for (std::size_t i = 0; i < before.size(); ++i) {
        const std::string& name = before[i].first;
        if (name == "out" || name == "threads" || name == "checkpoint_every" || name == "eval_every") continue;
        if (name == "device" || name == "precision") continue;
        if (name == "eval_sequences" || before[i].second == after[i].second) continue;
        return "--resume needs the settings of the checkpoint, which has " + option_of(name) + " '" + before[i].second +
               "', but '" + after[i].second + "' came";
    }
    return "";
}

std::string command_of(const Settings& s) {
    const auto now = field_texts(s), usual = field_texts(Settings{});
    std::string command =
        s.comm == CommKind::mpi ? "mpirun -n " + std::to_string(s.ranks) + " --oversubscribe pretrain" : "pretrain";
    for (std::size_t i = 0; i < now.size(); ++i) {
        const auto& [name, value] = now[i];
        if (name == "text")
            for (const auto& source : s.text) command += " --text " + quoted(source.name + "=" + source.path);
        else if (value != usual[i].second && !(name == "ranks" && s.comm == CommKind::mpi))
            command += " " + option_of(name) + " " + quoted(value);
    }
    return command;
}

CommandLine parse_command_line(int argc, const char* const* argv) {
    Settings s;
    RawText raw{joined(s.balance), name_of(s.switch_to), name_of(s.comm),     name_of(s.router),
                name_of(s.device), name_of(s.precision), {}};
    CLI::App app{
        "Trains small mixture-of-experts language models on bytes, one for each balance strategy, with\n"
        "equal tokens and seed, and reports perplexity, balance and specialisation side by side.\n",
        "pretrain"};
    CommandLine answer;
    try {
        add_options(app, s, raw);
        app.parse(argc, argv);
        s.ranks_given = app.count("--ranks") > 0;
        s.balance = strategies_from(raw.balance);
        s.comm = comm_named(raw.comm);
        s.router = router_named(raw.router);
        s.device = device_named(raw.device);
        s.precision = precision_named(raw.precision);
        s.switch_to = strategy_named(raw.switch_to);
        for (const auto& text : raw.text) s.text.push_back(text_source_from(text));
        answer.message = complaint(s);
        if (answer.message.empty())
            answer.settings = s;
        else
            answer.exit_code = exit_wrong_input;
    } catch (const CLI::CallForHelp&) {
        answer.message = app.help();
    } catch (const CLI::ConversionError& error) {
        // CLI11 says "Could not convert: --steps = ten".
        const std::string text = error.what();
        const auto equals = text.find(" = "), option = text.find("--");
        answer.exit_code = exit_wrong_input;
        answer.message = equals == std::string::npos || option == std::string::npos || option > equals
                             ? text
                             : text.substr(option, equals - option) + " takes a number that fits, but '" +
                                   text.substr(equals + 3) + "' came";
    } catch (const CLI::ExtrasError& error) {
        std::istringstream words(error.what());  // "The following arguments were not expected: bar --foo"
        std::string extra;
        for (std::string word; words >> word;)
            if (extra.empty() || extra[0] != '-') extra = word;
        answer.exit_code = exit_wrong_input;
        answer.message = "there is no option '" + extra + "'; --help lists them all";
    } catch (const std::exception& error) {
        answer.exit_code = exit_wrong_input;
        answer.message = error.what();
    }
    return answer;
}

}  // namespace pretrain
