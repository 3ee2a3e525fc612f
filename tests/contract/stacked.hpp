// One stacked reduction for all layers of a model, against a reduction for each.
#pragma once

#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "contract/cases.hpp"

namespace steelyard::testing::contract {

/// A rank's handle that counts its sums.
template <CommBackend CommT>
struct Counted {
    CommT comm;
    int* sums;

    [[nodiscard]] int rank() const { return comm.rank(); }
    [[nodiscard]] int size() const { return comm.size(); }
    Status begin_sum(std::span<std::int64_t> words) const {
        ++*sums;
        return comm.begin_sum(words);
    }
    Status end_sum(std::span<std::int64_t> words) const { return comm.end_sum(words); }
};

inline constexpr int layers = 3;

/// Two steps of a model of three layers on one rank, each micro-step's statistics summed at once or layer by layer.
/// Returns how many sums it took; gradients, dx, losses and states of all layers go to `bits`.
template <class CommT, class BalanceT>
int train_layers(const CommT& plain, const BalanceT& balance, const Split& split, bool stacked,
                 std::vector<std::byte>& bits, std::string& message) {
    using Layer = MoE<double, TopK, SwiGlu, BalanceT, Counted<CommT>>;
    int sums = 0;
    const Counted<CommT> comm{plain, &sums};
    std::vector<std::unique_ptr<Rig<Layer>>> rigs;
    for (std::uint32_t l = 0; l < layers; ++l)
        rigs.push_back(std::make_unique<Rig<Layer>>(
            typename Layer::Config{
                .shape = shape, .router = {.k = top_k}, .expert = {hidden}, .balance = balance, .layer = l},
            l));
    const index_t words = std::max(rigs[0]->layer.wire_words(), rigs[0]->layer.step_words());
    std::vector<std::int64_t> memory(static_cast<std::size_t>(layers * words));
    Stack stack(memory, layers, words);

    const auto keep = [&](Status status) {
        if (!status && message == "ok") message = status.message();
    };
    const auto append = [&](const void* from, std::size_t size) {
        const auto* bytes = static_cast<const std::byte*>(from);
        bits.insert(bits.end(), bytes, bytes + size);
    };
    for (std::int64_t step = 0; step < 2; ++step) {
        for (std::int64_t m = 0; m < split.micro_steps(); ++m) {
            const auto batch = batch_of(split.at(m, comm.rank()), global_batch(step),
                                        {.step = step, .micro_step = m, .total_tokens = tokens});
            if (stacked) {
                stack.clear();
                for (index_t l = 0; l < layers; ++l) {
                    auto& rig = *rigs[static_cast<std::size_t>(l)];
                    auto args = rig.forward_args(batch);
                    args.stack = &stack;
                    args.row = l;
                    keep(rig.layer.forward(comm, args));
                }
                keep(stack.begin(comm));
                keep(stack.end(comm));
                for (index_t l = 0; l < layers; ++l) {
                    auto& rig = *rigs[static_cast<std::size_t>(l)];
                    keep(rig.layer.conclude(stack, l, rig.context, rig.workspace, rig.state));
                }
            } else {
                for (auto& rig : rigs) keep(rig->forward(comm, batch));
            }
            for (auto& rig : rigs) {
                keep(rig->backward(batch));
                const double loss = rig->balance_loss();
                append(&loss, sizeof loss);
                append(rig->dx.data(), batch.x.size() * sizeof(double));
            }
        }
        if (stacked) {
            stack.clear();
            for (index_t l = 0; l < layers; ++l) {
                auto& rig = *rigs[static_cast<std::size_t>(l)];
                keep(rig.layer.post_step(stack, l, step, rig.state));
            }
            keep(stack.begin(comm));
            keep(stack.end(comm));
            for (index_t l = 0; l < layers; ++l) {
                auto& rig = *rigs[static_cast<std::size_t>(l)];
                keep(rig.layer.end_step(stack, l, step, rig.state));
            }
        } else {
            for (auto& rig : rigs) keep(rig->end_step(comm, step));
        }
    }
    for (auto& rig : rigs) {
        append(rig->grad_memory.data(), static_cast<std::size_t>(rig->grad_memory.size()));
        append(rig->state.data(), static_cast<std::size_t>(rig->state.size()));
    }
    return sums;
}

/// What stacking must show on every rank.
struct StackOutcome {
    bool same_bits = false;
    int stacked_sums = 0, single_sums = 0;
    std::string message = "ok";
};

template <class CommT>
StackOutcome compare_stacked(const CommT& comm, const Split& split) {
    const AllOf balance{SynchronizedLoss{{}, strong}, WindowedLoss<2>{{}, strong}, LossFree{{}, {.rate = 0.05}}};
    std::vector<std::byte> single, stacked;
    StackOutcome outcome;
    outcome.single_sums = train_layers(comm, balance, split, false, single, outcome.message);
    outcome.stacked_sums = train_layers(comm, balance, split, true, stacked, outcome.message);
    outcome.same_bits = single == stacked;
    return outcome;
}

/// Two steps of two micro-steps: a sum for each micro-step and one for each step's end; unstacked, for each layer.
inline void check_stacked(const StackOutcome& outcome) {
    CHECK(outcome.message == "ok");
    CHECK(outcome.same_bits);
    CHECK(outcome.stacked_sums == 2 * (2 + 1));
    CHECK(outcome.single_sums == layers * 2 * (2 + 1));
}

}  // namespace steelyard::testing::contract
