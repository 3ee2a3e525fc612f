// One global batch, and the ways in which it can be split over ranks and micro-steps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "support/rig.hpp"

namespace steelyard::testing::contract {

inline constexpr index_t tokens = 48, width = 6, experts = 8, sequence_length = 6, hidden = 4;
inline constexpr int top_k = 2, most_ranks = 4, most_micro_steps = 6;

/// Sizes that every split fits into.
inline constexpr LayerShape shape{.tokens = 64, .width = width, .experts = experts, .sequences = 10,
                                  .micro_steps = most_micro_steps, .ranks = most_ranks};

/// The tokens of one optimizer step, in their global order.
inline Batch<double> global_batch(std::int64_t step) {
    return Batch<double>(tokens, width, 500 + static_cast<std::uint64_t>(step));
}

/// A load: choices of each expert, then the tokens that made them.
using Counts = std::vector<std::int64_t>;  // [E + 1]

/// One call's tokens, as places in the global batch; -1 is padding.
using Cell = std::vector<index_t>;

struct Split {
    std::string name;
    std::vector<std::vector<Cell>> cells;  // [A][R]

    [[nodiscard]] int ranks() const { return static_cast<int>(cells.front().size()); }
    [[nodiscard]] std::int64_t micro_steps() const { return static_cast<std::int64_t>(cells.size()); }
    [[nodiscard]] const Cell& at(std::int64_t m, int r) const {
        return cells[static_cast<std::size_t>(m)][static_cast<std::size_t>(r)];
    }
};

/// The global order cut at the given places: a cell for each (micro-step, rank), micro-step by micro-step.
inline Split cut(std::string name, int micro_steps, int ranks, const std::vector<index_t>& cuts) {
    Split split{std::move(name), {}};
    std::size_t c = 0;
    index_t next = 0;
    for (int m = 0; m < micro_steps; ++m) {
        split.cells.emplace_back();
        for (int r = 0; r < ranks; ++r) {
            const index_t end = c < cuts.size() ? cuts[c++] : tokens;
            split.cells.back().emplace_back();
            while (next < end) split.cells.back().back().push_back(next++);
        }
    }
    return split;
}

inline Split even(int micro_steps, int ranks) {
    std::vector<index_t> cuts;
    for (index_t c = 1; c < micro_steps * ranks; ++c) cuts.push_back(c * tokens / (micro_steps * ranks));
    return cut(std::to_string(micro_steps) + " micro-steps of " + std::to_string(ranks) + " equal ranks", micro_steps,
               ranks, cuts);
}

/// Random cuts at multiples of `unit`, so that cells differ in size and may be empty.
inline Split uneven(int micro_steps, int ranks, std::uint64_t seed, index_t unit = 1) {
    const Philox random(seed, Stream::user);
    std::vector<index_t> cuts;
    for (int c = 1; c < micro_steps * ranks; ++c)
        cuts.push_back(unit *
                       random.below(static_cast<std::uint64_t>(c), static_cast<std::uint32_t>(tokens / unit + 1)));
    std::sort(cuts.begin(), cuts.end());
    return cut(std::to_string(micro_steps) + " micro-steps of " + std::to_string(ranks) + " unequal ranks, seed " +
                   std::to_string(seed),
               micro_steps, ranks, cuts);
}

/// The same tokens, with padding before, between and after them; cells without tokens get nothing but padding.
inline Split padded(Split split, std::uint64_t seed) {
    const Philox random(seed, Stream::user, 1);
    std::uint64_t draw = 0;
    for (auto& ranks : split.cells)
        for (Cell& cell : ranks) {
            const index_t most = std::min<index_t>(6, shape.tokens - static_cast<index_t>(cell.size()));
            for (index_t n = 0; n < most; ++n)
                cell.insert(cell.begin() + random.below(draw++, static_cast<std::uint32_t>(cell.size() + 1)), -1);
        }
    split.name += ", padded";
    return split;
}

/// The batch of one call. Padding holds NaN in x and dy: nothing may read it.
inline Batch<double> batch_of(const Cell& cell, const Batch<double>& global, const StepInfo& at) {
    Batch<double> batch;
    batch.width = width;
    batch.step = at;
    batch.sequences = {0};
    index_t sequence = -1, row = 0;
    bool padding = false;
    for (const index_t g : cell) {
        for (index_t j = 0; j < width; ++j) {
            const auto from = static_cast<std::size_t>(g * width + j);
            batch.x.push_back(g < 0 ? std::numeric_limits<double>::quiet_NaN() : global.x[from]);
            batch.dy.push_back(g < 0 ? std::numeric_limits<double>::quiet_NaN() : global.dy[from]);
        }
        batch.mask.push_back(g >= 0);
        padding = padding || g < 0;
        if (g >= 0 && g / sequence_length != sequence) {
            if (sequence >= 0) batch.sequences.push_back(row);
            sequence = g / sequence_length;
        }
        ++row;
    }
    batch.sequences.push_back(row);
    if (!padding) batch.mask.clear();
    return batch;
}

/// Where a token went.
struct Place {
    std::int64_t step = 0, micro_step = 0;
    int rank = 0;
    index_t token = 0;
};

/// The place of each token of the global batch.
inline std::vector<Place> places(const Split& split, std::int64_t step) {
    std::vector<Place> result(static_cast<std::size_t>(tokens));
    for (std::int64_t m = 0; m < split.micro_steps(); ++m)
        for (int r = 0; r < split.ranks(); ++r)
            for (const index_t g : split.at(m, r))
                if (g >= 0) result[static_cast<std::size_t>(g)] = {step, m, r, g};
    return result;
}

}  // namespace steelyard::testing::contract
