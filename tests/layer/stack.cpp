#include <doctest/doctest.h>

#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

/// A backend of one rank that counts its sums, or refuses them.
struct OneRank {
    int* sums;
    bool refuses = false;
    int rank() const { return 0; }
    int size() const { return 1; }
    Status begin_sum(std::span<std::int64_t>) const { return ++*sums, Status{}; }
    Status end_sum(std::span<std::int64_t>) const {
        if (!refuses) return {};
        return Status::refuse(Code::comm_failure, "OneRank", "sum", "a sum", "a refusal");
    }
};

using Layer = MoE<double, TopK, SwiGlu, AllOf<SynchronizedLoss, WindowedLoss<2>>, OneRank>;

const Layer::Config config{
    .shape = {.tokens = 9, .width = 5, .experts = 4, .micro_steps = 2}, .router = {.k = 2}, .expert = {.hidden = 3}};

}  // namespace

TEST_CASE("a stack's rows are a block of [layers, words], zero until something is posted") {
    std::vector<std::int64_t> memory(6, 9);
    Stack stack(memory, 2, 3);
    CHECK(memory == std::vector<std::int64_t>(6, 0));
    stack.row(1)[2] = 5;
    CHECK(memory[5] == 5);
    CHECK(stack.layers() == 2);
    CHECK(stack.words() == 3);
    stack.clear();
    CHECK(memory[5] == 0);
}

TEST_CASE("a stack that nothing was posted to sums nothing: replays cost no communication") {
    int sums = 0;
    const OneRank comm{&sums};
    Rig<Layer> rig(config);
    const Batch<double> batch(9, 5, 1);
    std::vector<std::int64_t> memory(9);
    Stack stack(memory, 1, 9);
    auto args = rig.forward_args(batch);
    args.stack = &stack;
    for (const int expected : {1, 1, 1}) {
        stack.clear();
        REQUIRE(rig.layer.forward(comm, args).ok());
        CHECK(stack.begin(comm).ok());
        CHECK(stack.end(comm).ok());
        CHECK(rig.layer.conclude(stack, 0, rig.context, rig.workspace, rig.state).message() == "ok");
        CHECK(sums == expected);
    }
}

TEST_CASE("conclude and end_step refuse a stack that was not summed, or whose sum was refused") {
    int sums = 0;
    Rig<Layer> rig(config);
    const Batch<double> batch(9, 5, 1);
    std::vector<std::int64_t> memory(9);
    Stack stack(memory, 1, 9);
    auto args = rig.forward_args(batch);
    args.stack = &stack;
    REQUIRE(rig.layer.forward(OneRank{&sums}, args).ok());
    const auto state = rig.state_bytes();
    const auto conclude = [&] {
        return rig.layer.conclude(stack, 0, rig.context, rig.workspace, rig.state).message();
    };
    const std::string not_summed =
        ": stack: expected the sum of what was posted: begin, then end, came a stack that was not summed";
    CHECK(conclude() == "steelyard: layer.conclude" + not_summed);
    const OneRank refusing{&sums, true};
    CHECK(stack.begin(refusing).ok());
    CHECK_FALSE(stack.end(refusing).ok());
    CHECK(conclude() == "steelyard: layer.conclude" + not_summed);
    CHECK(rig.state_bytes() == state);
    CHECK(stack.end(OneRank{&sums}).ok());
    CHECK(conclude() == "ok");

    const auto before = rig.state_bytes();
    stack.clear();
    REQUIRE(rig.layer.post_step(stack, 0, 0, rig.state).ok());
    CHECK(rig.layer.end_step(stack, 0, 0, rig.state).message() == "steelyard: layer.end_step" + not_summed);
    CHECK(rig.state_bytes() == before);
    CHECK(stack.begin(OneRank{&sums}).ok());
    CHECK(stack.end(OneRank{&sums}).ok());
    CHECK(rig.layer.end_step(stack, 0, 0, rig.state).message() == "ok");
}
