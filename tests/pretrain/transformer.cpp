// The whole model: gradients, causality, and independence from how a batch is split.
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "finite_differences.hpp"
#include "pretrain/initial.hpp"
#include "pretrain/replica.hpp"
#include "pretrain/strategies_table.hpp"
#include "steelyard/comm/threads.hpp"

namespace {

using namespace pretrain;
using steelyard::Mode;
using steelyard::StepInfo;
using steelyard::ThreadComm;

Settings tiny() {
    Settings s;
    s.ranks = 1;
    s.accumulate = 1;
    s.micro_batch = 2;
    s.sequence = 7;
    s.layers = 2;
    s.dim = 8;
    s.heads = 2;
    s.experts = 4;
    s.hidden = 6;
    s.balance_coefficient = 0.5;  // large, so that an error in its gradient shows
    s.z_loss = 0.1;
    return s;
}

Transformer<double>::Blocks blocks_of(const Settings& s, Strategy strategy, const ThreadComm& comm) {
    Transformer<double>::Blocks blocks;
    for (int l = 0; l < s.layers; ++l) blocks.push_back(make_moe_block<double>(s, strategy, l, comm));
    return blocks;
}

/// A model with weights, on one batch of random bytes below 16.
struct Model {
    explicit Model(const Settings& s, Strategy strategy)
        : model(model_shape(s), blocks_of(s, strategy, alone.comm(0)), 1), weights(model.param_bytes()),
          gradient(model.param_bytes()), params(model.place_params(weights.data())),
          grads(model.place_params(gradient.data())) {
        initialise(model.tensors(weights.data()), s.layers, 3);
        const steelyard::Philox philox(5, steelyard::Stream::user);
        for (index_t t = 0; t <= model.shape().tokens(); ++t)
            bytes.push_back(static_cast<std::uint8_t>(philox.below(static_cast<std::uint64_t>(t), 16)));
    }
    view<const std::uint8_t, 1> tokens() const { return {bytes.data(), model.shape().tokens()}; }
    view<const std::uint8_t, 1> targets() const { return {bytes.data() + 1, model.shape().tokens()}; }

    double loss(Mode mode = Mode::train) {
        REQUIRE(model.forward(params, tokens(), targets(), StepInfo{}, mode));
        double sum = 0;
        for (index_t t = 0; t < tokens().extents[0]; ++t) sum += model.losses()(t);
        sum /= static_cast<double>(tokens().extents[0]);
        for (index_t l = 0; l < model.shape().layers; ++l) sum += model.block(l).total_balance_loss();
        return sum;
    }

    steelyard::ThreadGroup alone{1};
    Transformer<double> model;
    Bytes weights, gradient;
    ModelParams<double> params, grads;
    std::vector<std::uint8_t> bytes;
};

TEST_CASE("pretrain transformer: every parameter's gradient matches finite differences under every strategy") {
    for (const Strategy strategy : all_strategies) {
        CAPTURE(name_of(strategy));
        Model m(tiny(), strategy);
        m.loss();
        const double weight = 1.0 / static_cast<double>(m.tokens().extents[0]);
        REQUIRE(m.model.backward(m.params, m.tokens(), m.targets(), weight, StepInfo{}, m.grads));
        const auto tensors = m.model.tensors(m.weights.data()), grads = m.model.tensors(m.gradient.data());
        CHECK(tensors.size() == 3 + 2 * (4 + 4));
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            CAPTURE(tensors[i].name);
            const auto size = static_cast<std::size_t>(tensors[i].size());
            const double error =
                test::gradient_error(tensors[i].data, grads[i].data, size, [&] { return m.loss(); });
            CHECK(error <= 1e-6);
        }
    }
}

TEST_CASE("pretrain transformer: what comes later changes no earlier loss") {
    Model m(tiny(), Strategy::sync);
    m.loss(Mode::evaluate);
    const auto before = m.model.losses();
    const std::vector<double> kept(before.data, before.data + before.extents[0]);
    m.bytes[5] ^= 3;  // an input of position 5 and the target of position 4, in the first of two sequences of 7
    m.loss(Mode::evaluate);
    for (index_t t = 0; t < before.extents[0]; ++t) {
        CAPTURE(t);
        const bool touched = t >= 4 && t < 7;
        if (touched)
            CHECK(m.model.losses()(t) != kept[static_cast<std::size_t>(t)]);
        else
            CHECK(m.model.losses()(t) == doctest::Approx(kept[static_cast<std::size_t>(t)]).epsilon(1e-13));
    }
}

/// The gradient of one step's global batch of four sequences, split in some way and summed over ranks.
std::vector<double> split_gradient(int ranks, int micro_batch, int accumulate, Strategy strategy) {
    Settings s = tiny();
    s.ranks = ranks;
    s.micro_batch = micro_batch;
    s.accumulate = accumulate;
    static const Corpus corpus(s);
    std::vector<std::vector<double>> parts(static_cast<std::size_t>(ranks));
    steelyard::ThreadGroup group(ranks);
    steelyard::run_ranks(group, [&](const ThreadComm& comm) {
        Replica<double> replica(s, comm.rank(), blocks_of(s, strategy, comm));
        Bytes weights(replica.model().param_bytes());
        initialise(replica.model().tensors(weights.data()), s.layers, 3);
        StepTotals totals(s.layers, s.experts);
        totals.clear();
        steelyard::throw_if_refused(
            replica.micro_steps(replica.model().place_params(weights.data()), corpus, 0, totals));
        const auto numbers = replica.gradient().as<double>();
        parts[static_cast<std::size_t>(comm.rank())].assign(numbers.begin(), numbers.end());
    });
    for (std::size_t r = 1; r < parts.size(); ++r)
        for (std::size_t i = 0; i < parts[0].size(); ++i) parts[0][i] += parts[r][i];
    return parts[0];
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
    REQUIRE(a.size() == b.size());
    double error = 0, largest = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        error = std::max(error, std::abs(a[i] - b[i]));
        largest = std::max(largest, std::abs(a[i]));
    }
    return error / largest;
}

TEST_CASE("pretrain transformer: a batch's gradient is the same however ranks and micro-steps share it") {
    for (const Strategy strategy : {Strategy::none, Strategy::sequence}) {
        CAPTURE(name_of(strategy));
        const auto whole = split_gradient(1, 4, 1, strategy);
        CHECK(distance(whole, split_gradient(1, 2, 2, strategy)) <= 1e-12);
        CHECK(distance(whole, split_gradient(1, 1, 4, strategy)) <= 1e-12);
        CHECK(distance(whole, split_gradient(2, 2, 1, strategy)) <= 1e-12);
        CHECK(distance(whole, split_gradient(2, 1, 2, strategy)) <= 1e-12);
        CHECK(distance(whole, split_gradient(4, 1, 1, strategy)) <= 1e-12);
    }
}

TEST_CASE("pretrain transformer: the synchronised gradient on ranks is the micro-batch gradient of one rank") {
    const auto whole = split_gradient(1, 4, 1, Strategy::micro);
    CHECK(distance(whole, split_gradient(2, 2, 1, Strategy::sync)) <= 1e-12);
    CHECK(distance(whole, split_gradient(4, 1, 1, Strategy::sync)) <= 1e-12);
    CHECK(distance(whole, split_gradient(4, 1, 1, Strategy::micro)) > 1e-6);  // the scope matters
}

}  // namespace
