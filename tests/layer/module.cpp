#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

using Layer = MoE<double, TopK, SwiGlu, AllOf<BufferedLoss, LossFree>>;

const Layer::Config config{
    .shape = {.tokens = 9, .width = 5, .experts = 4, .micro_steps = 2}, .router = {.k = 2}, .expert = {.hidden = 3}};

struct Tensors {
    Batch<double> batch{9, 5, 1};
    std::vector<double> y = std::vector<double>(45), dx = std::vector<double>(45);
    view<const double, 2> x() { return {batch.x.data(), 9, 5}; }
    view<const double, 2> dy() { return {batch.dy.data(), 9, 5}; }
    view<double, 2> out() { return {y.data(), 9, 5}; }
    view<double, 2> gradient() { return {dx.data(), 9, 5}; }
};

template <class Call>
std::string thrown(Call&& call) {
    try {
        call();
    } catch (const Error& error) {
        CHECK(error.status().message() == error.what());
        return error.what();
    }
    return "nothing";
}

}  // namespace

TEST_CASE("a module does what its layer does") {
    Module<Layer> module{Layer(config)};
    Rig<Layer> rig(config);
    rig.params.router.weight = module.params.router.weight;
    rig.params.experts = module.params.experts;
    Tensors t;
    for (std::int64_t step = 0; step < 2; ++step) {
        rig.clear_grads();
        for (std::int64_t m = 0; m < 2; ++m) {
            t.batch.step = {.step = step, .micro_step = m, .total_tokens = 100};
            module.forward(t.x(), t.out(), {.step = t.batch.step});
            REQUIRE(rig.forward(t.batch).ok());
            CHECK(same_bits(t.y, rig.y));
            CHECK(module.balance_loss() == rig.balance_loss());
            CHECK(module.routing().expert(3, 0) == rig.routing().expert(3, 0));
            module.backward(t.x(), t.dy(), t.gradient());
            REQUIRE(rig.backward(t.batch).ok());
            CHECK(same_bits(t.dx, rig.dx));
        }
        const auto grads = module.grads.experts.down;
        CHECK(std::memcmp(grads.data, rig.grads.experts.down.data, sizeof(double) * 4 * 5 * 3) == 0);
        CHECK(module.step() == step);
        module.end_step();
        REQUIRE(rig.end_step(step).ok());
        for (index_t i = 0; i < grads.size(); ++i) CHECK(grads.data[i] == 0.0);
        CHECK(std::equal(module.state().begin(), module.state().end(), rig.state.data()));
    }
    module.evaluate(t.x(), t.out());
    t.batch.step = {.step = 2};
    REQUIRE(rig.forward(t.batch, Mode::evaluate).ok());
    CHECK(same_bits(t.y, rig.y));
    CHECK(std::equal(module.state().begin(), module.state().end(), rig.state.data()));
}

TEST_CASE("a module's parameters follow its seed, and lie within 1 / sqrt(columns)") {
    const auto weights = [](std::uint64_t seed) {
        Module<Layer> module(Layer(config), {}, seed);
        const auto down = module.params.experts.down;
        for (index_t i = 0; i < down.size(); ++i) CHECK(std::abs(down.data[i]) <= 1 / std::sqrt(3.0));
        return std::vector<double>(down.data, down.data + down.size());
    };
    CHECK(weights(1) == weights(1));
    CHECK(weights(1) != weights(2));
}

TEST_CASE("a module throws what its layer answers") {
    Layer::Config broken = config;
    broken.router.k = 9;
    CHECK(thrown([&] { Module<Layer> module{Layer(broken)}; }) ==
          "steelyard: router: top_k: expected 1 to 4 (the number of experts), came 9");

    Module<Layer> module{Layer(config)};
    Tensors t;
    CHECK(thrown([&] { module.backward(t.x(), t.dy(), t.gradient()); }) ==
          "steelyard: layer.backward: context: expected the context of a training forward, came a context that no "
          "forward has written");
    CHECK(thrown([&] { module.forward(t.x().slice(0, 8), t.out()); }) ==
          "steelyard: layer.forward: y: expected [8, 5], came [9, 5]");
    CHECK(thrown([&] { module.forward(t.x(), t.out()); }) == "nothing");
    module.evaluate(t.x(), t.out());
    CHECK(thrown([&] { module.backward(t.x(), t.dy(), t.gradient()); }) ==
          "steelyard: layer.backward: context: expected the context of a training forward, came the context of an "
          "evaluation");
}

TEST_CASE("a module goes on from a checkpoint, and refuses one that is none") {
    Module<Layer> first{Layer(config)}, second{Layer(config)};
    Tensors t;
    first.forward(t.x(), t.out());
    first.backward(t.x(), t.dy(), t.gradient());
    first.end_step();
    std::copy(first.state().begin(), first.state().end(), second.state().begin());
    second.resume(first.step());
    std::vector<double> expected;
    first.forward(t.x(), t.out());
    expected = t.y;
    second.forward(t.x(), t.out());
    CHECK(same_bits(t.y, expected));
    CHECK(first.balance_loss() == second.balance_loss());

    std::fill(second.state().begin(), second.state().end(), std::byte{0});
    CHECK(thrown([&] { second.resume(1); }).find(
              "steelyard: module.resume: state: expected version 1, 4 experts") == 0);
}
