// Trains a layer on one split of the global batch, and brings the ranks' results together.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "contract/splits.hpp"

namespace steelyard::testing::contract {

using SharedSwiGlu = WithShared<SwiGlu>;
template <class BalanceT, class CommT>
using Layer = MoE<double, TopK, SharedSwiGlu, BalanceT, CommT>;

struct Options {
    TopK router{.k = top_k};
    std::int64_t steps = 1;
    bool two_passes = false;  ///< every micro-step's forward first, then forward and backward: for whole buffers
};

/// What one rank saw.
struct RankResult {
    int rank = 0;
    std::string message = "ok";             ///< the first refusal
    std::vector<Counts> loads;              ///< [A]  the load that the objective met in each micro-step
    std::vector<std::int64_t> step_load;    ///< [E + 1]  after the end of the step
    std::vector<float> bias;                ///< [E]      likewise
};

/// Sums over ranks and micro-steps of the last step; and what each rank of this process saw.
struct SplitResult {
    std::vector<double> sums;       ///< gradients of the parameters, then dx [48, d], then the balance loss
    std::vector<std::int64_t> choices = std::vector<std::int64_t>(static_cast<std::size_t>(experts));
    std::vector<RankResult> ranks;

    [[nodiscard]] std::span<const double> grads() const { return std::span(sums).first(grad_count()); }
    [[nodiscard]] std::span<const double> dx() const { return std::span(sums).subspan(grad_count(), tokens * width); }
    [[nodiscard]] double loss() const { return sums.back(); }

private:
    [[nodiscard]] std::size_t grad_count() const { return sums.size() - static_cast<std::size_t>(tokens * width) - 1; }
};

template <class BalanceT, class CommT>
Rig<Layer<BalanceT, CommT>> make_rig(const BalanceT& balance, const Options& options) {
    return Rig<Layer<BalanceT, CommT>>({.shape = shape, .router = options.router,
                                        .expert = {SwiGlu{hidden}, SwiGlu{3}}, .balance = balance, .layer = 2});
}

/// One rank's part. `result.sums` and `choices` are this rank's; the team adds them up.
template <class BalanceT, class CommT>
SplitResult run_rank(const CommT& comm, const BalanceT& balance, const Split& split, const Options& options) {
    auto rig = make_rig<BalanceT, CommT>(balance, options);
    SplitResult result;
    RankResult own;
    own.rank = comm.rank();
    const auto keep = [&](Status status) {
        if (!status && own.message == "ok") own.message = status.message();
        return status.ok();
    };
    std::vector<double> dx(static_cast<std::size_t>(tokens * width));
    double loss = 0;
    for (std::int64_t step = 0; step < options.steps; ++step) {
        const auto global = global_batch(step);
        rig.clear_grads();
        loss = 0;
        own.loads.clear();
        std::fill(result.choices.begin(), result.choices.end(), 0);
        for (const bool backward : {false, true}) {
            if (!backward && !options.two_passes) continue;
            for (std::int64_t m = 0; m < split.micro_steps(); ++m) {
                const Cell& cell = split.at(m, comm.rank());
                const auto first = std::find_if(cell.begin(), cell.end(), [](index_t g) { return g >= 0; });
                const auto batch = batch_of(cell, global,
                                            {.step = step, .micro_step = m, .total_tokens = tokens,
                                             .token_offset = first == cell.end() ? 0 : *first});
                if (!keep(rig.forward(comm, batch))) break;
                if (!backward) continue;
                if (!keep(rig.backward(batch))) break;
                loss += rig.balance_loss();
                count_choices(rig.routing(), std::span(result.choices));
                for (std::size_t t = 0; t < cell.size(); ++t)
                    for (std::size_t j = 0; cell[t] >= 0 && j < width; ++j)
                        dx[static_cast<std::size_t>(cell[t]) * width + j] = rig.dx[t * width + j];
                if constexpr (requires { rig.record().load; }) {
                    const auto load = rig.record().load;
                    if (load.present()) own.loads.emplace_back(load.data, load.data + experts + 1);
                }
            }
        }
        keep(rig.end_step(comm, step));
    }
    if constexpr (requires { rig.balance_state().bias; }) {
        const auto state = rig.balance_state();
        own.step_load.assign(state.step_load.data, state.step_load.data + state.step_load.size());
        own.bias.assign(state.bias.data, state.bias.data + state.bias.size());
    }
    const auto grads = rig.grad_values();
    result.sums.assign(grads.begin(), grads.end());
    result.sums.insert(result.sums.end(), dx.begin(), dx.end());
    result.sums.push_back(loss);
    result.ranks.push_back(own);
    return result;
}

}  // namespace steelyard::testing::contract
