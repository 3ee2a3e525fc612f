// What the ranks tell each other about a step: losses, loads, and whether somebody wants to stop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "any_comm.hpp"
#include "moe_block.hpp"

namespace pretrain {

/// MaxVio (2408.15664): max_i c_i / mean(c) − 1; 0 when all experts have the same load.
[[nodiscard]] inline double max_vio(std::span<const std::int64_t> tokens_per_expert) {
    std::int64_t sum = 0, most = 0;
    for (const std::int64_t c : tokens_per_expert) sum += c, most = std::max(most, c);
    if (sum == 0) return 0.0;
    return static_cast<double>(most) * static_cast<double>(tokens_per_expert.size()) / static_cast<double>(sum) - 1.0;
}

/// Sums over a rank's micro-steps, then over the ranks. Sized once; no step allocates.
class StepTotals {
public:
    StepTotals(index_t layers, index_t experts)
        : experts_(static_cast<std::size_t>(experts)), real_(static_cast<std::size_t>(2 + layers)),
          whole_(static_cast<std::size_t>(2 + layers * experts)) {}

    void clear() {
        std::fill(real_.begin(), real_.end(), 0.0);
        std::fill(whole_.begin(), whole_.end(), 0);
    }

    void add_loss(double sum) { real_[0] += sum; }
    void add_balance_loss(double loss) { real_[1] += loss; }
    /// One layer's load in one micro-batch.
    void add_load(index_t layer, std::span<const std::int64_t> load) {  // [E]
        real_[2 + static_cast<std::size_t>(layer)] += max_vio(load);
        auto* to = whole_.data() + 2 + static_cast<std::size_t>(layer) * experts_;
        for (std::size_t e = 0; e < experts_; ++e) to[e] += load[e];
    }
    void add_micro_batch() { ++whole_[0]; }
    void ask_to_stop() { whole_[1] = 1; }

    /// Afterwards every rank holds the sums over all.
    [[nodiscard]] Status sum(const AnyComm& comm) {
        if (Status s = comm.begin_sum(std::span(real_)); !s) return s;
        if (Status s = comm.end_sum(std::span(real_)); !s) return s;
        if (Status s = comm.begin_sum(std::span(whole_)); !s) return s;
        return comm.end_sum(std::span(whole_));
    }

    [[nodiscard]] double loss_sum() const { return real_[0]; }
    [[nodiscard]] double balance_loss() const { return real_[1]; }
    [[nodiscard]] bool stop() const { return whole_[1] != 0; }
    /// Mean over the step's micro-batches.
    [[nodiscard]] double max_vio_micro(index_t layer) const {
        return real_[2 + static_cast<std::size_t>(layer)] / static_cast<double>(whole_[0]);
    }
    [[nodiscard]] std::span<const std::int64_t> load(index_t layer) const {
        return {whole_.data() + 2 + static_cast<std::size_t>(layer) * experts_, experts_};
    }

private:
    std::size_t experts_;
    std::vector<double> real_;          // loss, balance loss, MaxVio of each layer
    std::vector<std::int64_t> whole_;   // micro-batches, wishes to stop, [layers, E] loads
};

}  // namespace pretrain
