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
        : model(model_shape(s), blocks_of(s, strategy, alone.comm(0)), Threads(1)), weights(model.param_bytes()),
          gradient(model.param_bytes()), params(model.place_params(weights.data())),
          grads(model.place_params(gradient.data())) {
        initialise(model.tensors(weights.data()), s.layers, 3);
        const steelyard::Philox philox(5, steelyard::Stream::user);
        for (index_t t = 0; t <= model.shape().tokens(); ++t)
            bytes.push_back(static_cast<std::uint8_t>(philox.below(static_cast<std::uint64_t>(t), 16)));
        id.resize(bytes.size());
        domains = reads_domains(s.router);
    }
    view<const std::uint8_t, 1> tokens() const { return {bytes.data(), model.shape().tokens()}; }
    view<const std::uint8_t, 1> targets() const { return {bytes.data() + 1, model.shape().tokens()}; }
    /// Of each token: its byte, or its sequence's domain.
    view<const std::int32_t, 1> ids() {
        for (std::size_t t = 0; t + 1 < bytes.size(); ++t)
            id[t] = domains ? static_cast<int>(t) / static_cast<int>(model.shape().length) : int{bytes[t]};
        return {id.data(), model.shape().tokens()};
    }

    double loss(Mode mode = Mode::train) {
        REQUIRE(model.forward(params, tokens(), targets(), ids(), StepInfo{}, mode));
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
    std::vector<std::int32_t> id;
    bool domains = false;
};

/// Largest relative error of the gradient of any tensor.
void check_gradients(Model& m) {
    m.loss();
    const double weight = 1.0 / static_cast<double>(m.tokens().extents[0]);
    REQUIRE(m.model.backward(m.params, weight, StepInfo{}, m.grads));
    const auto tensors = m.model.tensors(m.weights.data()), grads = m.model.tensors(m.gradient.data());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        CAPTURE(tensors[i].name);
        const auto size = static_cast<std::size_t>(tensors[i].size());
        CHECK(test::gradient_error(tensors[i].data, grads[i].data, size, [&] { return m.loss(); }) <= 1e-6);
    }
}

TEST_CASE("pretrain transformer: every parameter's gradient matches finite differences under every strategy") {
    for (const Strategy strategy : all_strategies) {
        CAPTURE(name_of(strategy));
        Model m(tiny(), strategy);
        CHECK(m.model.tensors(m.weights.data()).size() == 3 + 2 * (4 + 4));
        check_gradients(m);
    }
}

TEST_CASE("pretrain transformer: every parameter's gradient matches finite differences under every router" *
          doctest::test_suite("slow")) {
    for (const RouterKind router : all_routers) {
        CAPTURE(name_of(router));
        Settings s = tiny();
        s.router = router;
        s.router_groups = 2;
        s.text = {{"a", "a"}, {"b", "b"}};  // two domains, for routers that go by them
        s.segment = 3;
        Model m(s, router == RouterKind::merge ? Strategy::none : Strategy::sync);
        // What starts at 0 gets values of its own, so that nothing is right by chance.
        const steelyard::Philox philox(9, steelyard::Stream::user);
        for (const auto& tensor : m.model.tensors(m.weights.data()))
            for (index_t i = 0; i < tensor.size() && tensor.name.find("router") != std::string::npos; ++i)
                tensor.data[i] += 0.05 * philox.normal(static_cast<std::uint64_t>(i));
        check_gradients(m);
        if (router == RouterKind::residual) {  // the first layer hears nothing, the second does
            const auto grads = m.model.tensors(m.gradient.data());
            for (const auto& tensor : grads)
                if (tensor.name.ends_with("router.residual"))
                    CHECK((tensor.data[0] != 0) == (tensor.name == "1.moe.router.residual"));
        }
    }
}

TEST_CASE("pretrain transformer: the gradient is that of what a capacity lets pass") {
    Settings s = tiny();
    s.capacity_factor = 0.5;
    Model m(s, Strategy::sync);
    check_gradients(m);
    m.loss();
    index_t dropped = 0;
    const auto taken = m.model.block(1).taken();  // [T, K]
    for (index_t i = 0; i < taken.size(); ++i) dropped += taken.data[i] < 0;
    CHECK(dropped > 0);
    std::int64_t counted = 0;  // by balance: dropped ones included
    for (const std::int64_t load : m.model.block(1).tokens_per_expert()) counted += load;
    CHECK(counted == taken.size());
}

TEST_CASE("pretrain transformer: what comes later changes no earlier loss, whatever the router and the capacity") {
    for (const RouterKind router : all_routers)
        for (const double capacity : {0.0, 0.7})
            for (const Mode mode : {Mode::train, Mode::evaluate}) {
                CAPTURE(name_of(router));
                CAPTURE(capacity);
                Settings s = tiny();
                s.router = router;
                s.router_groups = 2;
                s.capacity_factor = capacity;
                s.segment = 3;
                s.text = {{"a", "a"}, {"b", "b"}};
                Model m(s, Strategy::none);
                m.loss(mode);
                const auto losses = m.model.losses();
                const std::vector<double> kept(losses.data, losses.data + losses.extents[0]);
                m.bytes[9] ^= 3;  // an input of position 2 of the second sequence of 7, and the target before it
                m.loss(mode);
                for (index_t t = 0; t < 8; ++t) {
                    CAPTURE(t);
                    CHECK(m.model.losses()(t) == kept[static_cast<std::size_t>(t)]);
                }
                for (index_t t = 8; t < 10; ++t) CHECK(m.model.losses()(t) != kept[static_cast<std::size_t>(t)]);
            }
}

TEST_CASE("pretrain transformer: another sequence changes nothing where all experts have room") {
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
        Replica<double> replica(s, comm.rank(), blocks_of(s, strategy, comm), Threads(1));
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
