// What a layer refuses at its boundary: each refusal names the tensor, what was expected and what came, and leaves
// everything of the caller's as it was.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{.tokens = 9, .width = 5, .experts = 4, .sequences = 3, .micro_steps = 2};

using Layer = MoE<double, TopK, Mlp, AllOf<BufferedLoss, LossFree>>;
using Forward = Layer::ForwardArgs;
using Backward = Layer::BackwardArgs;

const Layer::Config config{.shape = shape, .router = {.k = 2}, .expert = {.hidden = 3}};

template <class T>
std::vector<std::byte> bytes_of_vector(const std::vector<T>& values) {
    const auto* data = reinterpret_cast<const std::byte*>(values.data());
    return {data, data + values.size() * sizeof(T)};
}

/// A layer that has run once, poisoned outputs, and calls that break one thing each.
struct Boundary {
    Rig<Layer> rig{config};
    Batch<double> batch{9, 5, 1};
    std::vector<double> spare = std::vector<double>(200);
    std::vector<index_t> offsets{0, 2, 5, 9};
    std::vector<std::uint8_t> mask = std::vector<std::uint8_t>(9, 1);

    Boundary() {
        REQUIRE(rig.forward(batch).ok());
        REQUIRE(rig.backward(batch).ok());
    }

    /// All that belongs to the caller but context and workspace.
    std::vector<std::byte> callers() {
        std::vector<std::byte> all = bytes_of_vector(rig.y);
        const auto append = [&](const std::vector<std::byte>& more) {
            all.insert(all.end(), more.begin(), more.end());
        };
        append(bytes_of_vector(rig.dx));
        append(bytes_of_vector(batch.x));
        append(bytes_of_vector(batch.dy));
        append({rig.param_memory.data(), rig.param_memory.data() + rig.param_memory.size()});
        append({rig.grad_memory.data(), rig.grad_memory.data() + rig.grad_memory.size()});
        append(rig.state_bytes());
        return all;
    }
    void poison() {
        std::fill(rig.y.begin(), rig.y.end(), 77.0);
        std::fill(rig.dx.begin(), rig.dx.end(), 78.0);
        for (double& g : rig.grad_values()) g = 79.0;
    }

    std::string forward(const std::function<void(Forward&)>& breaks) {
        auto args = rig.forward_args(batch);
        breaks(args);
        poison();
        const auto before = callers();
        const std::string message = rig.layer.forward({}, args).message();
        CHECK(callers() == before);
        return message;
    }
    std::string backward(const std::function<void(Backward&)>& breaks) {
        REQUIRE(rig.forward(batch).ok());
        auto args = rig.backward_args(batch);
        breaks(args);
        poison();
        const auto before = callers();
        const std::string message = rig.layer.backward(args).message();
        CHECK(callers() == before);
        return message;
    }
};

std::string number(index_t value) { return std::to_string(value); }

}  // namespace

TEST_CASE("forward refuses tensors of other sizes, absent ones, and outputs over inputs") {
    Boundary b;
    CHECK(b.forward([&](Forward& a) { a.x = {b.spare.data(), 10, 5}; }) ==
          "steelyard: layer.forward: x: expected at most shape.tokens = 9 rows, came 10");
    CHECK(b.forward([&](Forward& a) { a.x = {b.spare.data(), 9, 4}; }) ==
          "steelyard: layer.forward: x: expected [9, 5], came [9, 4]");
    CHECK(b.forward([&](Forward& a) { a.x.data = nullptr; }) ==
          "steelyard: layer.forward: x: expected a tensor of [9, 5], came a null pointer");
    CHECK(b.forward([&](Forward& a) { a.x.strides[1] = 2; }) ==
          "steelyard: layer.forward: x: expected contiguous rows that do not overlap, came strides [5, 2]");
    CHECK(b.forward([&](Forward& a) { a.y = a.y.slice(0, 8); }) ==
          "steelyard: layer.forward: y: expected [9, 5], came [8, 5]");
    CHECK(b.forward([&](Forward& a) { a.y.data = nullptr; }) ==
          "steelyard: layer.forward: y: expected a tensor of [9, 5], came a null pointer");
    CHECK(b.forward([&](Forward& a) { a.y.strides[0] = 4; }) ==
          "steelyard: layer.forward: y: expected contiguous rows that do not overlap, came strides [4, 1]");
    CHECK(b.forward([&](Forward& a) { a.y.data = const_cast<double*>(a.x.data) + 44; }) ==
          "steelyard: layer.forward: y: expected memory apart from x, came memory that overlaps it");
    CHECK(b.forward([&](Forward& a) { a.params.router.weight.data = nullptr; }) ==
          "steelyard: layer.forward: params.router.weight: expected a tensor of [4, 5], came a null pointer");
    CHECK(b.forward([&](Forward& a) { a.params.experts.down.extents[0] = 3; }) ==
          "steelyard: layer.forward: params.experts.down: expected [4, 5, 3], came [3, 5, 3]");
}

TEST_CASE("forward refuses masks, offsets and steps that do not fit") {
    Boundary b;
    CHECK(b.forward([&](Forward& a) { a.tokens.mask = {b.mask.data(), 8}; }) ==
          "steelyard: layer.forward: mask: expected [9], came [8]");
    const auto offsets = [&](std::vector<index_t> values) {
        b.offsets = std::move(values);
        return b.forward([&](Forward& a) {
            a.tokens.sequences = {b.offsets.data(), static_cast<index_t>(b.offsets.size())};
        });
    };
    CHECK(offsets({0, 2, 5, 7, 9}) ==
          "steelyard: layer.forward: sequences: expected 2 to shape.sequences + 1 = 4 offsets, came 5");
    CHECK(offsets({0}) == "steelyard: layer.forward: sequences: expected 2 to shape.sequences + 1 = 4 offsets, came 1");
    CHECK(offsets({1, 9}) ==
          "steelyard: layer.forward: sequences: expected ascending offsets from 0 to 9, came offsets from 1 to 9");
    CHECK(offsets({0, 4, 8}) ==
          "steelyard: layer.forward: sequences: expected ascending offsets from 0 to 9, came offsets from 0 to 8");
    CHECK(offsets({0, 7, 4, 9}) ==
          "steelyard: layer.forward: sequences: expected ascending offsets from 0 to 9, came 7 before 4");
    CHECK(b.forward([&](Forward& a) {
        a.tokens.sequences = {b.offsets.data(), 2};
        a.tokens.sequences.strides[0] = 3;
    }) == "steelyard: layer.forward: sequences: expected contiguous offsets, came a stride");
    CHECK(b.forward([](Forward& a) { a.tokens.step.step = -1; }) ==
          "steelyard: layer.forward: step.step: expected at least 0, came -1");
    for (const std::int64_t m : {-1, 2, 1000})
        CHECK(b.forward([&](Forward& a) { a.tokens.step.micro_step = m; }) ==
              "steelyard: layer.forward: step.micro_step: expected below shape.micro_steps = 2, came " + number(m));
    CHECK(b.forward([](Forward& a) { a.tokens.step.total_tokens = 8; }) ==
          "steelyard: layer.forward: step.total_tokens: expected 0, or at least this call's 9 valid tokens, came 8");
    b.mask[3] = 0;
    CHECK(b.forward([&](Forward& a) {
        a.tokens.mask = {b.mask.data(), 9};
        a.tokens.step.total_tokens = 7;
    }) == "steelyard: layer.forward: step.total_tokens: expected 0, or at least this call's 8 valid tokens, came 7");
}

TEST_CASE("forward refuses memory that is missing, too small or misaligned") {
    Boundary b;
    const auto& layer = b.rig.layer;
    using Block = std::span<std::byte> Forward::*;
    const auto check_block = [&](const std::string& name, Block block, index_t bytes) {
        const std::string start = "steelyard: layer.forward: " + name + ": expected ";
        CHECK(b.forward([&](Forward& a) { a.*block = {}; }) == start + "at least " + number(bytes) + " bytes, came 0");
        CHECK(b.forward([&](Forward& a) { a.*block = (a.*block).first(static_cast<std::size_t>(bytes - 1)); }) ==
              start + "at least " + number(bytes) + " bytes, came " + number(bytes - 1));
        const Bytes larger(bytes + 64);
        CHECK(b.forward([&](Forward& a) { a.*block = larger.span().subspan(8); }) ==
              start + "memory aligned to 64 bytes, came a misaligned pointer");
    };
    check_block("context", &Forward::context, layer.context_bytes());
    check_block("workspace", &Forward::workspace, layer.workspace_bytes());
    check_block("state", &Forward::state, layer.state_bytes());
}

TEST_CASE("a NaN or an infinity in a valid token is refused by the router, before anything is counted") {
    Boundary b;
    b.batch.x[3 * 5 + 1] = std::nan("");
    CHECK(b.forward([](Forward&) {}) ==
          "steelyard: router: logits of token 3: expected finite numbers, came nan for expert 0");
    b.batch.x[3 * 5 + 1] = HUGE_VAL;
    CHECK(b.forward([](Forward& a) { a.tokens.step = {.step = 5}; }).find("steelyard: router: logits of token 3") == 0);
    b.mask[3] = 0;
    b.batch.mask = b.mask;
    CHECK(b.rig.forward(b.batch).message() == "ok");
}

TEST_CASE("forward refuses a row that the stack does not have, or rows that are too short") {
    using Sync = MoE<double, TopK, Mlp, SynchronizedLoss>;
    Rig<Sync> rig({.shape = shape, .router = {.k = 2}, .expert = {.hidden = 3}});
    const Batch<double> batch(9, 5, 1);
    std::vector<std::int64_t> memory(18);
    Stack stack(memory, 2, 9), short_rows(memory, 2, 8);
    auto args = rig.forward_args(batch);
    args.stack = &stack;
    for (const index_t row : {-1, 2}) {
        args.row = row;
        CHECK(rig.layer.forward({}, args).message() ==
              "steelyard: layer.forward: row: expected a row of the stack's 2, came " + number(row));
    }
    args.stack = &short_rows;
    args.row = 0;
    CHECK(rig.layer.forward({}, args).message() ==
          "steelyard: layer.forward: stack: expected rows of at least 9 words, came 8");
}

TEST_CASE("a scope that draws over ranks refuses token numbers that cannot be") {
    using Drawn = MoE<double, TopK, Mlp, ShuffledLoss>;
    Rig<Drawn> rig({.shape = shape, .router = {.k = 2}, .expert = {.hidden = 3}});
    const Batch<double> batch(9, 5, 1);
    const std::vector<std::int64_t> tokens{8, 9};
    auto args = rig.forward_args(batch);
    args.tokens_of_rank = {tokens.data(), 2};
    CHECK(rig.layer.forward({}, args).message() == "steelyard: layer.forward: tokens_of_rank: expected [1], came [2]");
    args.tokens_of_rank = {tokens.data(), 1};
    CHECK(rig.layer.forward({}, args).message() ==
          "steelyard: layer.forward: tokens_of_rank[0]: expected this call's 9 valid tokens, came 8");
    args.tokens_of_rank = {tokens.data() + 1, 1};
    CHECK(rig.layer.forward({}, args).message() == "ok");
}

TEST_CASE("backward refuses contexts of another phase") {
    Boundary b;
    const std::string start = "steelyard: layer.backward: context: expected the context of a training forward, came ";
    Bytes fresh(b.rig.layer.context_bytes());
    CHECK(b.backward([&](Backward& a) { a.context = fresh; }) == start + "a context that no forward has written");
    CHECK(b.backward([&](Backward&) { REQUIRE(b.rig.forward(b.batch, Mode::evaluate).ok()); }) ==
          start + "the context of an evaluation");
    std::vector<std::int64_t> memory(20);
    Stack enough(memory, 1, 20);
    CHECK(b.backward([&](Backward&) {
        auto args = b.rig.forward_args(b.batch);
        args.stack = &enough;
        args.tokens.step.step = 1;  // not a replay of the first forward
        REQUIRE(b.rig.layer.forward({}, args).ok());
    }) == start + "a deferred forward that was not concluded");
    CHECK(b.backward([&](Backward&) {
        Batch<double> bad = b.batch;
        bad.x[0] = std::nan("");
        REQUIRE_FALSE(b.rig.forward(bad).ok());
    }) == start + "the context of a forward that was refused");
    CHECK(b.backward([&](Backward& a) { REQUIRE(b.rig.layer.backward(a).ok()); }) ==
          start + "a context that backward has used already");
    CHECK(b.backward([&](Backward& a) { a.context = a.context.first(64); }) ==
          "steelyard: layer.backward: context: expected at least " + number(b.rig.layer.context_bytes()) +
              " bytes, came 64");
    CHECK(b.backward([&](Backward& a) { a.workspace = {}; }) ==
          "steelyard: layer.backward: workspace: expected at least " + number(b.rig.layer.workspace_bytes()) +
              " bytes, came 0");
}

TEST_CASE("backward refuses tensors that do not fit the forward, and dx over its inputs") {
    Boundary b;
    CHECK(b.backward([](Backward& a) { a.x = a.x.slice(0, 8); }) ==
          "steelyard: layer.backward: x: expected [9, 5], came [8, 5]");
    CHECK(b.backward([](Backward& a) { a.dy.data = nullptr; }) ==
          "steelyard: layer.backward: dy: expected a tensor of [9, 5], came a null pointer");
    CHECK(b.backward([](Backward& a) { a.dx = {}; }) == "steelyard: layer.backward: dx: expected [9, 5], came [0, 0]");
    CHECK(b.backward([](Backward& a) { a.dx.data = const_cast<double*>(a.x.data); }) ==
          "steelyard: layer.backward: dx: expected memory apart from x, came memory that overlaps it");
    CHECK(b.backward([](Backward& a) { a.dx.data = const_cast<double*>(a.dy.data) + 1; }) ==
          "steelyard: layer.backward: dx: expected memory apart from dy, came memory that overlaps it");
    CHECK(b.backward([](Backward& a) { a.params.experts.up = {}; }) ==
          "steelyard: layer.backward: params.experts.up: expected [4, 3, 5], came [0, 0, 0]");
    CHECK(b.backward([](Backward& a) { a.grads.experts.up.extents[1] = 2; }) ==
          "steelyard: layer.backward: grads.experts.up: expected [4, 3, 5], came [4, 2, 5]");
}

TEST_CASE("absent gradients are frozen, the others stay what they are") {
    Boundary b;
    b.rig.clear_grads();
    REQUIRE(b.rig.forward(b.batch).ok());
    REQUIRE(b.rig.backward(b.batch).ok());
    const std::vector<double> all(b.rig.grad_values().begin(), b.rig.grad_values().end());
    const std::vector<double> dx = b.rig.dx;
    b.rig.clear_grads();
    REQUIRE(b.rig.forward(b.batch).ok());  // a replay: backward uses its context up
    auto args = b.rig.backward_args(b.batch);
    const auto frozen = args.grads.experts.up;
    args.grads.experts.up = {};
    REQUIRE(b.rig.layer.backward(args).ok());
    CHECK(same_bits(b.rig.dx, dx));
    std::vector<double> expected = all;
    const auto at = frozen.data - b.rig.grad_values().data();
    std::fill_n(expected.begin() + at, frozen.size(), 0.0);
    CHECK(same_bits(std::span<const double>(b.rig.grad_values()), std::span<const double>(expected)));
}

TEST_CASE("conclude refuses contexts and stacks that do not belong to a deferred forward") {
    Boundary b;
    std::vector<std::int64_t> memory(40);
    Stack stack(memory, 2, 20);
    const auto conclude = [&](std::span<std::byte> context, index_t row = 0) {
        return b.rig.layer.conclude(stack, row, context, b.rig.workspace, b.rig.state).message();
    };
    const std::string start = "steelyard: layer.conclude: context: expected the context of a deferred forward, came ";
    Bytes fresh(b.rig.layer.context_bytes());
    CHECK(conclude(fresh) == start + "a context that no forward has written");
    reinterpret_cast<CallInfo*>(fresh.data())->phase = CallInfo::Phase::ready;  // bytes that happen to say so
    CHECK(conclude(fresh) == start + "a context that no forward has written");
    REQUIRE(b.rig.forward(b.batch, Mode::evaluate).ok());
    CHECK(conclude(b.rig.context) == start + "the context of an evaluation");
    auto args = b.rig.forward_args(b.batch);
    args.stack = &stack;
    args.tokens.step.step = 1;  // not a replay of the first forward
    REQUIRE(b.rig.layer.forward({}, args).ok());
    CHECK(conclude(b.rig.context, 2) == "steelyard: layer.conclude: row: expected a row of the stack's 2, came 2");
    CHECK(conclude(b.rig.context.span().first(10)) ==
          "steelyard: layer.conclude: context: expected at least " + number(b.rig.layer.context_bytes()) +
              " bytes, came 10");
    REQUIRE(stack.begin(SelfComm{}).ok());
    REQUIRE(stack.end(SelfComm{}).ok());
    CHECK(conclude(b.rig.context) == "ok");
    CHECK(b.rig.backward(b.batch).message() == "ok");
}

TEST_CASE("init_state and end_step refuse memory that cannot be the state") {
    Boundary b;
    const auto& layer = b.rig.layer;
    CHECK(layer.init_state(std::span<std::byte>{}).message() ==
          "steelyard: layer.init_state: state: expected at least " + number(layer.state_bytes()) + " bytes, came 0");
    const Bytes larger(layer.state_bytes() + 64);
    CHECK(layer.init_state(larger.span().subspan(4)).message() ==
          "steelyard: layer.init_state: state: expected memory aligned to 64 bytes, came a misaligned pointer");
    CHECK(layer.end_step({}, 0, larger, b.rig.workspace).message().find(
              "steelyard: layer.end_step: state: expected version 1, 4 experts") == 0);
    CHECK(layer.end_step({}, 0, b.rig.state, {}).message() ==
          "steelyard: layer.end_step: workspace: expected at least " + number(layer.workspace_bytes()) +
              " bytes, came 0");
}

TEST_CASE("check and forward refuse configurations that cannot work") {
    const auto refusal = [](const std::function<void(Layer::Config&)>& breaks) {
        Layer::Config broken = config;
        breaks(broken);
        const Layer layer(broken);
        return layer.check().message();
    };
    CHECK(refusal([](auto&) {}) == "ok");
    CHECK(refusal([](auto& c) { c.shape.tokens = -1; }) ==
          "steelyard: layer.config: shape.tokens: expected at least 0, came -1");
    CHECK(refusal([](auto& c) { c.shape.width = 0; }) ==
          "steelyard: layer.config: shape.width: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.shape.experts = 0; }) ==
          "steelyard: layer.config: shape.experts: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.shape.sequences = 0; }) ==
          "steelyard: layer.config: shape.sequences: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.shape.micro_steps = 0; }) ==
          "steelyard: layer.config: shape.micro_steps: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.shape.ranks = 0; }) ==
          "steelyard: layer.config: shape.ranks: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.device.threads = 0; }) ==
          "steelyard: device: threads: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.router.k = 5; }) ==
          "steelyard: router: top_k: expected 1 to 4 (the number of experts), came 5");
    CHECK(refusal([](auto& c) { c.expert.hidden = 0; }) == "steelyard: Mlp: hidden: expected at least 1, came 0");
    CHECK(refusal([](auto& c) { c.shape.tokens = index_t{1} << 30; }) ==
          "steelyard: layer.config: shape.tokens: expected tokens * top_k below 2^31, came 1073741824");

    Rig<Layer> rig(config);
    const Batch<double> batch(9, 5, 1);
    Layer::Config broken = config;
    broken.router.k = 5;
    CHECK(Layer(broken).forward({}, rig.forward_args(batch)).message() ==
          "steelyard: router: top_k: expected 1 to 4 (the number of experts), came 5");
}

TEST_CASE("no tokens at all are fine, with pointers or without") {
    Rig<Layer> rig(config);
    Batch<double> empty;
    empty.width = 5;
    CHECK(rig.forward(empty).message() == "ok");
    CHECK(rig.balance_loss() == 0.0);
    CHECK(rig.backward(empty).message() == "ok");
    auto args = rig.forward_args(empty);
    args.x.data = nullptr, args.y.data = nullptr;
    CHECK(rig.layer.forward({}, args).message() == "ok");
    const index_t offsets[] = {0, 0, 0};
    args.tokens.sequences = {offsets, 3};
    CHECK(rig.layer.forward({}, args).message() == "ok");
    Rig<Layer> none({.shape = {.tokens = 0, .width = 5, .experts = 4}, .router = {.k = 2}, .expert = {.hidden = 3}});
    CHECK(none.forward(empty).message() == "ok");
    CHECK(none.backward(empty).message() == "ok");
}

TEST_CASE("tokens in padded rows give the same bits as dense ones") {
    Rig<Layer> dense(config), strided(config);
    const Batch<double> batch(9, 5, 1);
    REQUIRE(dense.forward(batch).ok());
    REQUIRE(dense.backward(batch).ok());
    const double poison = 1e30;
    std::vector<double> x(9 * 8, poison), dy(9 * 8, poison), y(9 * 8, poison), dx(9 * 8, poison);
    for (std::size_t t = 0; t < 9; ++t)
        for (std::size_t j = 0; j < 5; ++j) x[8 * t + j] = batch.x[5 * t + j], dy[8 * t + j] = batch.dy[5 * t + j];
    const auto rows = [](auto* data) {
        view<std::remove_reference_t<decltype(*data)>, 2> tensor(data, 9, 5);
        tensor.strides[0] = 8;
        return tensor;
    };
    auto forward = strided.forward_args(batch);
    forward.x = rows(static_cast<const double*>(x.data()));
    forward.y = rows(y.data());
    REQUIRE(strided.layer.forward({}, forward).message() == "ok");
    auto backward = strided.backward_args(batch);
    backward.x = forward.x, backward.dy = rows(static_cast<const double*>(dy.data())), backward.dx = rows(dx.data());
    REQUIRE(strided.layer.backward(backward).message() == "ok");
    for (std::size_t t = 0; t < 9; ++t)
        for (std::size_t j = 0; j < 8; ++j) {
            CHECK(y[8 * t + j] == (j < 5 ? dense.y[5 * t + j] : poison));
            CHECK(dx[8 * t + j] == (j < 5 ? dense.dx[5 * t + j] : poison));
        }
    CHECK(same_bits(std::span<const double>(strided.grad_values()), std::span<const double>(dense.grad_values())));
}
