// What a run is: every option of `pretrain`, checked, with defaults that make sense.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace pretrain {

/// Wrong input: one sentence for the user. `main` prints it and leaves with `exit_wrong_input`.
class UserError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

inline constexpr int exit_wrong_input = 2;

/// The compiled balance strategies; what each one is, is said by `describe`.
enum class Strategy { micro, sequence, sync, buffer, shuffle, windowed, hybrid, loss_free, schedule, none };

inline constexpr std::array all_strategies = {Strategy::micro,    Strategy::sequence, Strategy::sync,
                                              Strategy::buffer,   Strategy::shuffle,  Strategy::windowed,
                                              Strategy::hybrid,   Strategy::loss_free, Strategy::schedule,
                                              Strategy::none};

/// The name on the command line and in every file: "micro", "loss-free", ...
[[nodiscard]] std::string name_of(Strategy strategy);
/// Throws `UserError` that lists the known names.
[[nodiscard]] Strategy strategy_named(std::string_view name);
/// Half a line for people: "load fraction from each rank's micro-batch".
[[nodiscard]] std::string describe(Strategy strategy);

/// What chooses the experts of a token: the library's routers whose choice for a token depends on no later token.
enum class RouterKind {
    top_k, noisy_top_k, hierarchical, dselect_k, x_moe, residual, threshold, dense, every, hash, task, domain, random,
    merge
};

inline constexpr std::array all_routers = {
    RouterKind::top_k, RouterKind::noisy_top_k, RouterKind::hierarchical, RouterKind::dselect_k,
    RouterKind::x_moe, RouterKind::residual,    RouterKind::threshold,    RouterKind::dense,
    RouterKind::every, RouterKind::hash,        RouterKind::task,         RouterKind::domain,
    RouterKind::random, RouterKind::merge};

/// The name on the command line and in every file: "top-k", "hash", ...
[[nodiscard]] std::string name_of(RouterKind router);
/// Throws `UserError` that lists the known names; for a router that is not causal, one that says why it is not.
[[nodiscard]] RouterKind router_named(std::string_view name);
/// Half a line for people.
[[nodiscard]] std::string describe(RouterKind router);
/// Whether the ids that it gets are the sequence's domain; else they are the bytes.
[[nodiscard]] constexpr bool reads_domains(RouterKind router) {
    return router == RouterKind::domain || router == RouterKind::task;
}
/// Whether a layer's router hears the logits of the layer before.
[[nodiscard]] constexpr bool hears_prior(RouterKind router) { return router == RouterKind::residual; }

/// How data-parallel ranks run: as threads of this process, or as processes under mpirun.
enum class CommKind { threads, mpi };

[[nodiscard]] std::string name_of(CommKind comm);
[[nodiscard]] CommKind comm_named(std::string_view name);

/// Whose memory and kernels a model is trained in.
enum class DeviceKind { cpu, cuda };

[[nodiscard]] std::string name_of(DeviceKind device);
[[nodiscard]] DeviceKind device_named(std::string_view name);

/// Elements of the mixture-of-experts layers. Weights, moments and all else are float either way.
enum class Precision {
    usual,   ///< bf16 on a GPU, float on the CPU
    single,  ///< "float"
    bf16,
};

[[nodiscard]] std::string name_of(Precision precision);
[[nodiscard]] Precision precision_named(std::string_view name);

/// One domain of text: a file, or a folder whose files are read in sorted order.
struct TextSource {
    std::string name, path;
    bool operator==(const TextSource&) const = default;

    template <class Field>
    void fields(Field&& field) {
        field("name", name), field("path", path);
    }
};

/// Domains of a run without text.
inline constexpr int synthetic_languages = 5;

/// Every option of a run. The model sees bytes, so the vocabulary is 256.
struct Settings {
    // Balance
    std::vector<Strategy> balance = {Strategy::micro, Strategy::sync};  ///< run one after the other
    double balance_coefficient = 0.01;  ///< weight of the load-balancing loss
    double z_loss = 0.001;              ///< weight of the router z-loss
    double bias_rate = 0.001;           ///< loss-free: step of the selection bias
    int windows = 4;                    ///< windowed: optimizer steps that f is pooled over
    std::int64_t switch_at = 0;         ///< schedule: first step of the second strategy; 0: half of the steps
    Strategy switch_to = Strategy::sync;  ///< schedule: sync (from micro) or micro (from sync)

    // Routing
    RouterKind router = RouterKind::top_k;
    int router_groups = 4;       ///< hierarchical: groups of experts
    int segment = 32;            ///< merge: tokens that share a blend of experts
    double threshold = 0.4;      ///< threshold: probability that a token's experts add up to
    double capacity_factor = 0;  ///< places of an expert beside the even share; 0: no limit

    // Device
    DeviceKind device = DeviceKind::cpu;
    Precision precision = Precision::usual;

    // Batch. One optimizer step sees ranks × micro_batch × accumulate sequences.
    int ranks = 4;
    bool ranks_given = false;  ///< whether --ranks was on the command line; under MPI it must then agree
    CommKind comm = CommKind::threads;
    int threads = 1;      ///< of each rank
    int micro_batch = 2;  ///< sequences
    int accumulate = 4;   ///< micro-steps
    int sequence = 128;   ///< bytes that a sequence predicts

    // Model
    int layers = 3;
    int dim = 96;
    int heads = 4;
    int experts = 16;
    int top_k = 2;
    int hidden = 128;  ///< inner width of an expert

    // Training
    std::int64_t steps = 400;
    std::uint64_t seed = 0;
    double learning_rate = 2e-3;  ///< peak; linear warm-up, then cosine to a tenth
    std::int64_t warmup = 20;     ///< steps; never more than a tenth of the run
    double weight_decay = 0.1;
    double clip = 1.0;  ///< largest norm of the whole gradient; 0: no clipping

    // Text
    std::vector<TextSource> text;  ///< empty: the built-in generator
    double held_out = 0.1;         ///< fraction of every domain
    double text_limit = 3.0;       ///< megabytes of one domain that are used; 0: all
    int eval_sequences = 64;       ///< held-out sequences per domain that an evaluation reads; 0: all

    // Output
    std::string out = "pretrain-out";
    bool resume = false;
    std::int64_t checkpoint_every = 100;  ///< steps; 0: only when the run ends or is interrupted
    std::int64_t eval_every = 0;          ///< steps; 0: only at the end
    bool quiet = false;

    /// Sequences of one optimizer step.
    [[nodiscard]] std::int64_t global_batch() const {
        return std::int64_t{ranks} * micro_batch * accumulate;
    }
    /// Byte positions of one optimizer step that the loss is taken over.
    [[nodiscard]] std::int64_t tokens_per_step() const { return global_batch() * sequence; }
    /// Experts that a token meets, at most. One that is blended from all counts as one.
    [[nodiscard]] int experts_met() const {
        const bool all =  // DSelectK: until it has become sparse
            router == RouterKind::dense || router == RouterKind::every || router == RouterKind::dselect_k;
        return all ? experts : router == RouterKind::merge ? 1 : top_k;
    }
    /// Domains of the text.
    [[nodiscard]] int domain_count() const {
        return text.empty() ? synthetic_languages : static_cast<int>(text.size());
    }
    /// `switch_at` with its default resolved.
    [[nodiscard]] std::int64_t switch_step() const { return switch_at > 0 ? switch_at : steps / 2; }
    /// Whether the mixture-of-experts layers are of bf16: `precision` with its default resolved.
    [[nodiscard]] bool in_bf16() const {
        return precision == Precision::usual ? device == DeviceKind::cuda : precision == Precision::bf16;
    }
    /// Warm-up with its limit applied.
    [[nodiscard]] std::int64_t warmup_steps() const { return warmup < steps / 10 ? warmup : steps / 10; }

    bool operator==(const Settings&) const = default;

    /// Every option with its name in files, for JSON and for comparing two runs.
    template <class Field>
    void fields(Field&& field) {
        field("balance", balance), field("balance_coefficient", balance_coefficient), field("z_loss", z_loss);
        field("bias_rate", bias_rate), field("windows", windows);
        field("switch_at", switch_at), field("switch_to", switch_to);
        field("router", router), field("router_groups", router_groups), field("segment", segment);
        field("threshold", threshold);
        field("capacity_factor", capacity_factor);
        field("device", device), field("precision", precision);
        field("ranks", ranks), field("comm", comm), field("threads", threads), field("micro_batch", micro_batch);
        field("accumulate", accumulate), field("sequence", sequence);
        field("layers", layers), field("dim", dim), field("heads", heads), field("experts", experts);
        field("top_k", top_k), field("hidden", hidden);
        field("steps", steps), field("seed", seed), field("learning_rate", learning_rate), field("warmup", warmup);
        field("weight_decay", weight_decay), field("clip", clip);
        field("text", text), field("held_out", held_out), field("text_limit", text_limit);
        field("eval_sequences", eval_sequences);
        field("out", out), field("checkpoint_every", checkpoint_every), field("eval_every", eval_every);
    }
};

/// Sequences that a strategy's load fraction f is taken over (the paper's "Balance BSZ"). For buffer and
/// hybrid this is what the last micro-step of a batch sees; for shuffle the size of the drawn sample; for
/// schedule the strategy that it ends with; 0 for none.
[[nodiscard]] std::int64_t balance_bsz(const Settings& settings, Strategy strategy);
/// The same for people: "32", "32 & 2", "2 → 32 at step 200".
[[nodiscard]] std::string balance_bsz_text(const Settings& settings, Strategy strategy);

/// The first thing that is wrong with the settings, in one sentence; empty when all is well. Looks at no file.
[[nodiscard]] std::string complaint(const Settings& settings);

/// What must agree between a checkpoint and the command that resumes it: the first difference in one
/// sentence, or empty. Where output goes, how often it is written, how many threads a rank has, the device and its
/// precision may change.
[[nodiscard]] std::string resume_complaint(const Settings& saved, const Settings& now);

/// A parsed command line: settings, or what to print and the exit code.
struct CommandLine {
    std::optional<Settings> settings;  ///< absent: print `message` and leave with `exit_code`
    std::string message;               ///< help (exit code 0) or one sentence (exit code 2)
    int exit_code = 0;
};

/// Never throws and never prints.
[[nodiscard]] CommandLine parse_command_line(int argc, const char* const* argv);

/// The command that repeats a run, with every option that differs from the default.
[[nodiscard]] std::string command_of(const Settings& settings);

}  // namespace pretrain
