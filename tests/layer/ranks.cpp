#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/rig.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

using Layer = MoE<double, TopK, Mlp, SynchronizedLoss, ThreadComm>;

Layer::Config config() {
    return {.shape = {.tokens = 6, .width = 4, .experts = 3, .micro_steps = 3}, .router = {.k = 1}, .expert = {2}};
}

/// Drops every choice while training, none while evaluating.
struct DropInTraining {
    static constexpr bool drops = true;
    [[nodiscard]] Status check(const LayerShape&, int) const { return {}; }
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device&, const LayerShape&, int) const {
        return 0;
    }
    template <class T, class Device>
    void admit(const Device&, const Routing<T>&, const TokenInfo<>& tokens, view<expert_t, 2> choices,
               std::byte*) const {
        if (tokens.mode == Mode::train) std::fill_n(choices.data, choices.size(), expert_t{-1});
    }
    [[maybe_unused]] friend bool operator==(const DropInTraining&, const DropInTraining&) = default;
};

}  // namespace

TEST_CASE("a rank that refuses its call takes the others with it at once, and the group goes on") {
    for (const bool stacked : {false, true}) {
        CAPTURE(stacked);
        ThreadGroup group(3, {.timeout = 20});
        std::vector<Code> first(3), second(3);
        std::vector<int> kept(3);
        run_ranks(group, [&](const ThreadComm& comm) {
            const auto r = static_cast<std::size_t>(comm.rank());
            Rig<Layer> rig(config());
            const auto state = rig.state_bytes();
            Batch<double> batch(6, 4, 1, {.total_tokens = 36});
            if (r == 1) batch.x[5] = std::nan("");
            std::fill(rig.y.begin(), rig.y.end(), 7.0);
            std::vector<std::int64_t> words(static_cast<std::size_t>(rig.layer.wire_words()));
            Stack stack(words, 1, rig.layer.wire_words());
            const auto step = [&] {
                auto args = rig.forward_args(batch);
                if (!stacked) return rig.layer.forward(comm, args);
                args.stack = &stack;
                stack.clear();
                Status mine = rig.layer.forward(comm, args);
                Status begun = stack.begin(comm), ended = stack.end(comm);
                REQUIRE(begun.ok());
                REQUIRE(ended.ok());
                return mine ? rig.layer.conclude(stack, 0, rig.context, rig.workspace, rig.state) : mine;
            };
            first[r] = step().code();
            kept[r] = rig.state_bytes() == state && (stacked || rig.y == std::vector<double>(rig.y.size(), 7.0));
            batch = Batch<double>(6, 4, 1, {.micro_step = 1, .total_tokens = 36});
            second[r] = step().code();
        });
        CHECK(first == std::vector{Code::rank_refused, Code::not_finite, Code::rank_refused});
        CHECK(kept == std::vector<int>{1, 1, 1});
        CHECK(second == std::vector{Code::ok, Code::ok, Code::ok});
    }
}

TEST_CASE("ranks at different micro-steps, steps or layers are told so instead of getting each other's counts") {
    for (const int what : {0, 1, 2}) {
        CAPTURE(what);
        ThreadGroup group(2, {.timeout = 20});
        std::vector<Code> codes(2);
        run_ranks(group, [&](const ThreadComm& comm) {
            const std::int64_t off = comm.rank();
            auto of_rank = config();
            of_rank.layer = what == 2 ? static_cast<std::uint32_t>(off) : 0;
            Rig<Layer> rig(of_rank);
            const StepInfo at{.step = what == 1 ? off : 0, .micro_step = what == 0 ? off : 0, .total_tokens = 36};
            const auto state = rig.state_bytes();
            codes[static_cast<std::size_t>(off)] = rig.forward(comm, Batch<double>(6, 4, 1, at)).code();
            CHECK(rig.state_bytes() == state);
        });
        CHECK(codes == std::vector{Code::comm_mismatch, Code::comm_mismatch});
    }
}

TEST_CASE("a state of another layer, or of the same policies in another order, is refused") {
    const MoE<double, TopK, Mlp, SynchronizedLoss> zero({.shape = config().shape, .router = {.k = 1}, .expert = {2}});
    const MoE<double, TopK, Mlp, SynchronizedLoss> one(
        {.shape = config().shape, .router = {.k = 1}, .expert = {2}, .layer = 1});
    Bytes state(zero.state_bytes());
    REQUIRE(zero.init_state(state).ok());
    CHECK(zero.check_state("load", state).ok());
    CHECK(one.check_state("load", state).code() == Code::bad_state);

    using There = MoE<double, TopK, Mlp, AllOf<WindowedLoss<2>, LossFree>>;
    using Back = MoE<double, TopK, Mlp, AllOf<LossFree, WindowedLoss<2>>>;
    const There there({.shape = config().shape, .router = {.k = 1}, .expert = {2}});
    const Back back({.shape = config().shape, .router = {.k = 1}, .expert = {2}});
    Bytes bytes(there.state_bytes());
    REQUIRE(there.init_state(bytes).ok());
    REQUIRE(there.state_bytes() == back.state_bytes());
    CHECK(back.check_state("load", bytes).code() == Code::bad_state);
}

TEST_CASE("an overflow rule knows training from evaluation") {
    using Dropping = MoE<double, TopK, Mlp, NoBalance, SelfComm, DropInTraining>;
    Rig<Dropping> rig({.shape = {.tokens = 6, .width = 4, .experts = 3}, .router = {.k = 1}, .expert = {2}});
    const Batch<double> batch(6, 4, 1);
    REQUIRE(rig.forward(batch).ok());
    CHECK(rig.layer.plan(rig.context).offsets(3) == 0);
    REQUIRE(rig.forward(batch, Mode::evaluate).ok());
    CHECK(rig.layer.plan(rig.context).offsets(3) == 6);
}

TEST_CASE("numbers that a balance cannot work with are refused") {
    const auto answer = [](const auto& balance, StepInfo at = {}) {
        using Policy = std::remove_cvref_t<decltype(balance)>;
        const MoE<double, TopK, Mlp, Policy> layer(
            {.shape = {.tokens = 6, .width = 4, .experts = 3, .micro_steps = 2}, .expert = {2}, .balance = balance});
        if (Status s = layer.check(); !s) return s.message();
        Rig<MoE<double, TopK, Mlp, Policy>> rig(layer.config());
        return rig.forward(Batch<double>(6, 4, 1, at)).message();
    };
    const double nan = std::numeric_limits<double>::quiet_NaN();
    CHECK(answer(MicroBatchLoss{.objective = {.coefficient = nan}}) ==
          "steelyard: balance: coefficient: expected a finite number, came nan");
    CHECK(answer(LossFree{.objective = {.rate = nan}}) == "steelyard: balance: rate: expected a finite number, came nan");
    CHECK(answer(Scheduled<MicroBatchLoss, NoBalance>{.at_step = -1}) ==
          "steelyard: balance: at_step: expected at least 0, came -1");
    CHECK(answer(MicroBatchLoss{}, {.grad_scale = nan}) ==
          "steelyard: layer.forward: step.grad_scale: expected a finite number, came nan");
    CHECK(answer(MicroBatchLoss{}, {.micro_step = 1}) ==
          "steelyard: layer.forward: step.total_tokens: expected the valid tokens of the whole step, which has several "
          "micro-steps, came 0");
    CHECK(answer(MicroBatchLoss{}, {.micro_step = 1, .total_tokens = 12}) == "ok");
    CHECK(answer(LossFree{}, {.micro_step = 1}) == "ok");
}

TEST_CASE("columns side by side in one buffer are apart") {
    std::vector<double> buffer(6 * 8);
    view<double, 2> left(buffer.data(), 6, 4), right(buffer.data() + 4, 6, 4);
    left.strides[0] = right.strides[0] = 8;
    CHECK(check_apart("test", "y", left, "x", view<const double, 2>(right)).ok());
    CHECK(check_apart("test", "y", right, "x", view<const double, 2>(left)).ok());
    view<double, 2> across(buffer.data() + 3, 5, 4);
    across.strides[0] = 8;
    CHECK_FALSE(check_apart("test", "y", across, "x", view<const double, 2>(left)).ok());
    CHECK_FALSE(check_apart("test", "y", left, "x", view<const double, 2>(left)).ok());
}
