// The text: domains of bytes, a held-out part of each, and which sequence every training step sees.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "settings.hpp"

namespace pretrain {

/// `sequence + 1` bytes of one domain: the model reads all but the last and predicts all but the first.
struct Sample {
    int domain = 0;
    std::span<const std::uint8_t> bytes;  // [sequence + 1]
};

/// Bytes [begin, end) of a domain.
struct Range {
    std::int64_t begin = 0, end = 0;
    [[nodiscard]] std::int64_t size() const { return end - begin; }
    bool operator==(const Range&) const = default;
};

/// One domain. Training and held-out ranges are disjoint and alternate through the whole text, so that
/// the held-out part is like the rest.
struct Domain {
    std::string name;
    std::vector<std::uint8_t> bytes;
    std::vector<Range> train, held_out;
};

/// The text of a run. Immutable after construction, so every rank may read it at the same time.
class Corpus {
public:
    /// Reads `settings.text`, or makes the built-in synthetic languages when none is given. Throws
    /// `UserError` for a file that is missing or empty, or a domain too short for one sequence.
    explicit Corpus(const Settings& settings);

    [[nodiscard]] const std::vector<Domain>& domains() const { return domains_; }
    [[nodiscard]] std::vector<std::string> domain_names() const;
    /// Whether this is the built-in generator's text.
    [[nodiscard]] bool generated() const { return generated_; }

    /// Training sequence `index` of the run, counted over all steps, ranks and micro-steps. A pure function
    /// of the seed and the index: how a batch is split over ranks and micro-steps changes nothing, and the
    /// position in the data is the step number. Sequences 2i and 2i + 1 are of one domain; every run of
    /// `domains().size()` such pairs holds each domain once, in random order.
    [[nodiscard]] Sample train(std::int64_t index) const;

    /// Held-out sequences of a domain, which do not overlap, spread evenly over its held-out part.
    [[nodiscard]] std::int64_t held_out_count(int domain) const;
    [[nodiscard]] Sample held_out(int domain, std::int64_t index) const;

    /// One number for the text, so that a checkpoint is not resumed on another: FNV-1a over names and bytes.
    [[nodiscard]] std::uint64_t fingerprint() const;

private:
    std::vector<Domain> domains_;
    std::vector<std::vector<std::int64_t>> held_out_starts_;  // [domain][sequence]
    bool generated_ = false;
    std::int64_t sequence_;
    std::uint64_t seed_;
};

/// The index for `Corpus::train` of row `row` in a rank's micro-batch. Micro-step by micro-step, rank by
/// rank: the first ranks × micro_batch sequences of a step are what the ranks see at the same time.
[[nodiscard]] inline std::int64_t sequence_index(const Settings& settings, std::int64_t step, std::int64_t micro_step,
                                                 int rank, int row) {
    return step * settings.global_batch() + (micro_step * settings.ranks + rank) * settings.micro_batch + row;
}

/// The built-in languages: arithmetic, brackets, prose, program, runes. The same bytes on every machine.
[[nodiscard]] std::vector<Domain> synthetic_domains(std::int64_t bytes_each);

/// Bytes of each synthetic language in a run without `--text`.
inline constexpr std::int64_t synthetic_bytes = 1'000'000;

}  // namespace pretrain
