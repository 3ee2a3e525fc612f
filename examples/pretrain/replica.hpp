// One rank: its copy of the model's activations, its gradient, and its share of every batch.
#pragma once

#include <cstring>
#include <memory>
#include <utility>

#include "corpus.hpp"
#include "step_totals.hpp"
#include "transformer.hpp"

namespace pretrain {

[[nodiscard]] inline ModelShape model_shape(const Settings& settings) {
    return {.vocabulary = 256,
            .width = settings.dim,
            .layers = settings.layers,
            .heads = settings.heads,
            .sequences = settings.micro_batch,
            .length = settings.sequence,
            .handed_on = hears_prior(settings.router) ? settings.experts : 0};
}

template <class T, class Device = Threads>
class Replica {
    using Model = Transformer<T, Device>;
    using Params = typename Model::Params;

public:
    Replica(const Settings& settings, int rank, typename Model::Blocks blocks, Device device)
        : settings_(settings), rank_(rank), model_(model_shape(settings), std::move(blocks), std::move(device)),
          gradient_(model_.param_bytes()), grads_(model_.place_params(gradient_.data())),
          tokens_(model_.shape().tokens()), targets_(tokens_.size()),
          ids_(static_cast<std::size_t>(tokens_.size())) {}

    [[nodiscard]] Model& model() { return model_; }
    [[nodiscard]] typename Device::Memory& gradient() { return gradient_; }

    /// Forward and backward of all of this rank's micro-batches of a step. Adds to the gradient and the totals.
    [[nodiscard]] Status micro_steps(const Params& params, const Corpus& corpus, std::int64_t step,
                                     StepTotals& totals) {
        const int sequences = settings_.micro_batch;
        for (int micro = 0; micro < settings_.accumulate; ++micro) {
            for (int r = 0; r < sequences; ++r) put(r, corpus.train(sequence_index(settings_, step, micro, rank_, r)));
            const steelyard::StepInfo info{
                .step = step,
                .micro_step = micro,
                .total_tokens = settings_.tokens_per_step(),
                .token_offset = (std::int64_t{micro} * settings_.ranks + rank_) * sequences * settings_.sequence};
            if (Status s = model_.forward(params, given(sequences), wanted(sequences), ids(sequences), info,
                                          steelyard::Mode::train);
                !s)
                return s;
            const T weight = T(1) / static_cast<T>(settings_.tokens_per_step());
            if (Status s = model_.backward(params, weight, info, grads_); !s) return s;
            // For the forward alone: a GPU works on the backward while the next batch is prepared.
            if (Status s = model_.await(); !s) return s;
            observe(totals);
        }
        return {};
    }

    /// The first `count` sequences that the model was last given.
    [[nodiscard]] view<const std::uint8_t, 1> given(int count) const { return batch(tokens_, count); }

    /// Losses of held-out sequences: `sample(i)` for i below `count`, which is at most the micro-batch.
    template <class Sample>
    [[nodiscard]] Status evaluate(const Params& params, int count, const Sample& sample, double& loss_sum) {
        for (int i = 0; i < count; ++i) put(i, sample(i));
        if (Status s = model_.forward(params, given(count), wanted(count), ids(count), {}, steelyard::Mode::evaluate);
            !s)
            return s;
        if (Status s = model_.await(); !s) return s;
        loss_sum += sum_of_losses();
        return {};
    }

private:
    using HostMemory = typename Device::HostMemory;

    void put(int at, const Sample& sample) {
        const std::size_t length = static_cast<std::size_t>(settings_.sequence);
        const std::size_t begin = static_cast<std::size_t>(at) * length;
        std::memcpy(tokens_.data() + begin, sample.bytes.data(), length);
        std::memcpy(targets_.data() + begin, sample.bytes.data() + 1, length);
        for (std::size_t i = 0; i < length; ++i)
            ids_[begin + i] = reads_domains(settings_.router) ? sample.domain : sample.bytes[i];
    }
    [[nodiscard]] view<const std::uint8_t, 1> batch(const HostMemory& bytes, int sequences) const {
        return {reinterpret_cast<const std::uint8_t*>(bytes.data()), index_t{sequences} * settings_.sequence};
    }
    [[nodiscard]] view<const std::uint8_t, 1> wanted(int sequences) const { return batch(targets_, sequences); }
    [[nodiscard]] view<const std::int32_t, 1> ids(int sequences) const {
        return {ids_.data(), index_t{sequences} * settings_.sequence};
    }
    [[nodiscard]] double sum_of_losses() const {
        double sum = 0;
        const auto losses = model_.losses();
        for (index_t t = 0; t < losses.extents[0]; ++t) sum += static_cast<double>(losses(t));
        return sum;
    }
    void observe(StepTotals& totals) {
        totals.add_loss(sum_of_losses());
        totals.add_micro_batch();
        for (index_t l = 0; l < settings_.layers; ++l) {
            totals.add_balance_loss(model_.block(l).balance_loss() / settings_.layers);
            totals.add_load(l, model_.block(l).tokens_per_expert());
        }
    }

    Settings settings_;
    int rank_;
    Model model_;
    typename Device::Memory gradient_;
    Params grads_;
    HostMemory tokens_, targets_;    // [S·L]
    std::vector<std::int32_t> ids_;  // [S·L]  what the router reads
};

}  // namespace pretrain
