// One sum for several layers on a device that works in its own time: the bits of the CPU's.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "support/far_rig.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

constexpr std::size_t layers = 2;

template <class BalanceT, class CommT, class DeviceT>
using LayerOf = MoE<float, TopK, SwiGlu, BalanceT, CommT, Dropless, KeepActivations, DeviceT>;

template <class Layer>
typename Layer::Config config_of(std::size_t which, const typename Layer::Balance& balance) {
    return {.shape = shape, .expert = {.hidden = 4}, .balance = balance, .layer = static_cast<std::uint32_t>(which)};
}
template <class Layer>
index_t words_of(const Layer& layer) {
    return std::max(layer.wire_words(), layer.step_words());
}

/// What a rank knows of each layer in the end.
struct Told {
    std::vector<Outcome> outcomes[layers];
    std::vector<std::byte> grads[layers], state[layers];
    bool operator==(const Told&) const = default;
};

template <class BalanceT, class CommT>
Told on_cpu(const BalanceT& balance, const CommT& comm, bool masked) {
    using Layer = LayerOf<BalanceT, CommT, Cpu>;
    Rig<Layer> rigs[layers] = {Rig<Layer>(config_of<Layer>(0, balance)), Rig<Layer>(config_of<Layer>(1, balance), 8)};
    const index_t words = words_of(rigs[0].layer);
    std::vector<std::int64_t> memory(layers * static_cast<std::size_t>(words));
    Stack stack(memory, layers, words);
    Told told;
    for (std::int64_t step = 0; step < 2; ++step) {
        for (const Call& call : script_of(step, comm.rank(), masked)) {
            stack.clear();
            for (std::size_t l = 0; l < layers; ++l) {
                std::fill_n(rigs[l].context.data(), rigs[l].context.size(), std::byte{0});
                auto args = rigs[l].forward_args(call.batch, call.mode);
                args.stack = &stack, args.row = static_cast<index_t>(l);
                REQUIRE(rigs[l].layer.forward(comm, args).ok());
            }
            REQUIRE(stack.begin(comm).ok());
            REQUIRE(stack.end(comm).ok());
            for (std::size_t l = 0; l < layers; ++l) {
                Rig<Layer>& rig = rigs[l];
                Outcome& one = told.outcomes[l].emplace_back();
                one.y.assign(rig.y.data(), rig.y.data() + call.batch.x.size());
                one.dx.resize(call.batch.x.size());
                if (call.mode != Mode::train) continue;
                REQUIRE(rig.layer.conclude(stack, static_cast<index_t>(l), rig.context, rig.workspace, rig.state).ok());
                one.record = bytes_of_tensors(rig.record(), balance, shape);
                one.loss = rig.balance_loss();
                rig.write_grads = call.write_grads;
                REQUIRE(rig.backward(call.batch).ok());
                one.dx.assign(rig.dx.data(), rig.dx.data() + call.batch.x.size());
            }
        }
        stack.clear();
        for (std::size_t l = 0; l < layers; ++l)
            REQUIRE(rigs[l].layer.post_step(stack, static_cast<index_t>(l), step, rigs[l].state).ok());
        REQUIRE(stack.begin(comm).ok());
        REQUIRE(stack.end(comm).ok());
        for (std::size_t l = 0; l < layers; ++l)
            REQUIRE(rigs[l].layer.end_step(stack, static_cast<index_t>(l), step, rigs[l].state).ok());
    }
    for (std::size_t l = 0; l < layers; ++l) {
        const auto* grads = rigs[l].grad_memory.data();
        told.grads[l].assign(grads, grads + rigs[l].grad_memory.size());
        told.state[l] = bytes_of_tensors(rigs[l].balance_state(), balance, shape);
    }
    return told;
}

template <class BalanceT, class CommT>
Told on_far(const BalanceT& balance, const CommT& comm, FarMachine& machine, bool masked) {
    using Layer = LayerOf<BalanceT, CommT, Far>;
    using Source = LayerOf<BalanceT, SelfComm, Cpu>;
    std::vector<std::unique_ptr<FarRig<Layer>>> rigs;
    for (std::size_t l = 0; l < layers; ++l) {
        auto config = config_of<Layer>(l, balance);
        config.device = {&machine};
        rigs.push_back(std::make_unique<FarRig<Layer>>(config, comm, machine));
        const Rig<Source> source(config_of<Source>(l, balance), 7 + l);
        rigs[l]->set_params({source.param_memory.data(), static_cast<std::size_t>(source.param_memory.size())});
    }
    const index_t words = words_of(rigs[0]->layer);
    std::vector<std::int64_t> memory(layers * static_cast<std::size_t>(words));
    typename Layer::Stack stack(memory, layers, words, {&machine});
    for (std::int64_t step = 0; step < 2; ++step) {
        for (const Call& call : script_of(step, comm.rank(), masked)) {
            const long waits = machine.waits;
            stack.clear();
            for (std::size_t l = 0; l < layers; ++l)
                REQUIRE(rigs[l]->forward(call, &stack, static_cast<index_t>(l)).message() == "ok");
            REQUIRE(stack.begin(comm).message() == "ok");
            REQUIRE(stack.end(comm).message() == "ok");
            for (std::size_t l = 0; call.mode == Mode::train && l < layers; ++l) {
                REQUIRE(rigs[l]->conclude(stack, static_cast<index_t>(l)).message() == "ok");
                REQUIRE(rigs[l]->backward().message() == "ok");
            }
            CHECK(machine.waits <= waits + (StreamOrderedComm<CommT> ? 0 : 1));
        }
        stack.clear();
        for (std::size_t l = 0; l < layers; ++l)
            REQUIRE(rigs[l]->post_step(stack, static_cast<index_t>(l), step).message() == "ok");
        REQUIRE(stack.begin(comm).message() == "ok");
        REQUIRE(stack.end(comm).message() == "ok");
        for (std::size_t l = 0; l < layers; ++l)
            REQUIRE(rigs[l]->end_step(stack, static_cast<index_t>(l), step).message() == "ok");
    }
    Told told;
    for (std::size_t l = 0; l < layers; ++l) {
        told.outcomes[l] = rigs[l]->outcomes();
        told.grads[l] = rigs[l]->grad_bytes();
        told.state[l] = bytes_of_tensors(rigs[l]->balance_state(), balance, shape);
    }
    return told;
}

void check_same(const Told& came, const Told& want) {
    for (std::size_t l = 0; l < layers; ++l) {
        CAPTURE(l);
        REQUIRE(came.outcomes[l].size() == want.outcomes[l].size());
        for (std::size_t i = 0; i < want.outcomes[l].size(); ++i) {
            CAPTURE(i);
            CHECK(came.outcomes[l][i] == want.outcomes[l][i]);
        }
        CHECK(came.grads[l] == want.grads[l]);
        CHECK(came.state[l] == want.state[l]);
    }
}

template <class BalanceT>
void check_alone(const BalanceT& balance) {
    for (const bool masked : {false, true})
        for (const auto side : {FarMachine::Side::early, FarMachine::Side::late}) {
            CAPTURE(masked);
            FarMachine machine(side);
            check_same(on_far(balance, SelfComm{}, machine, masked), on_cpu(balance, SelfComm{}, masked));
        }
}

/// The handle of a rank: sums that the host waits for, or that are work of the side line.
template <bool queued>
auto far_comm(const ThreadComm& comm, FarMachine& machine) {
    if constexpr (queued)
        return QueuedComm<ThreadComm>{&comm, &machine};
    else
        return comm;
}

template <bool queued, class BalanceT>
void check_on_ranks(const BalanceT& balance) {
    std::vector<Told> want(2), came(2);
    ThreadGroup on_cpus(2), on_fars(2);
    run_ranks(on_cpus, [&](const ThreadComm& comm) {
        want[static_cast<std::size_t>(comm.rank())] = on_cpu(balance, comm, true);
    });
    run_ranks(on_fars, [&](const ThreadComm& comm) {
        FarMachine machine;
        came[static_cast<std::size_t>(comm.rank())] = on_far(balance, far_comm<queued>(comm, machine), machine, true);
    });
    for (std::size_t r = 0; r < 2; ++r) check_same(came[r], want[r]);
}

}  // namespace

TEST_CASE("layers whose sums are one, on a device of its own time: the bits of the CPU") {
    check_alone(SynchronizedLoss{});
    check_alone(MicroBatchLoss{});
    check_alone(AllOf{BufferedLoss{}, LossFree{}, WindowedLoss<2>{}, RouterZLoss{}});
    check_alone(Scheduled<MicroBatchLoss, SynchronizedLoss>{1, {}, {}});
}

TEST_CASE("the same on two ranks, with sums that the host waits for or that are enqueued") {
    check_on_ranks<false>(SynchronizedLoss{});
    check_on_ranks<true>(SynchronizedLoss{});
    check_on_ranks<false>(AllOf{BufferedLoss{}, LossFree{}, WindowedLoss<2>{}, RouterZLoss{}});
    check_on_ranks<true>(AllOf{BufferedLoss{}, LossFree{}, WindowedLoss<2>{}, RouterZLoss{}});
}

namespace {

using Alone = LayerOf<SynchronizedLoss, SelfComm, Far>;

/// One layer and its stack, on one rank.
struct One {
    FarMachine machine;
    FarRig<Alone> rig;
    std::vector<std::int64_t> memory;
    Alone::Stack stack;
    Call call = script_of(0, 0, false)[0];

    explicit One(index_t rows = 1, index_t more_words = 0, FarMachine::Side side = FarMachine::Side::late)
        : machine(side),
          rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {}, machine),
          memory(static_cast<std::size_t>(rows * (rig.layer.wire_words() + more_words))),
          stack(memory, rows, rig.layer.wire_words() + more_words, {&machine}) {
        using Source = LayerOf<SynchronizedLoss, SelfComm, Cpu>;
        const Rig<Source> source(config_of<Source>(0, {}));
        rig.set_params({source.param_memory.data(), static_cast<std::size_t>(source.param_memory.size())});
    }
};

}  // namespace

TEST_CASE("what a stack's layers refuse on such a device is what they refuse on the CPU") {
    One one;
    const std::string not_summed =
        "steelyard: layer.conclude: stack: expected the sum of what was posted: begin, then end, came a stack that was "
        "not summed";
    REQUIRE(one.rig.forward(one.call, &one.stack).ok());
    CHECK(one.rig.loss(0) == 0.0);
    CHECK(
        one.rig.backward().message() ==
        "steelyard: layer.backward: context: expected the context of a training forward, came a deferred forward that "
        "was not concluded");
    CHECK(one.rig.conclude(one.stack, 0).message() == not_summed);
    REQUIRE(one.stack.begin(SelfComm{}).ok());
    REQUIRE(one.stack.end(SelfComm{}).ok());
    CHECK(one.rig.conclude(one.stack, 1).message() ==
          "steelyard: layer.conclude: row: expected a row of the stack's 1, came 1");
    CHECK(one.rig.conclude(one.stack, 0).message() == "ok");
    CHECK(one.rig.conclude(one.stack, 0).message() == "ok");  // concluded already: nothing to do
    CHECK(one.rig.backward().message() == "ok");
    CHECK(
        one.rig.conclude(one.stack, 0).message() ==
        "steelyard: layer.conclude: context: expected the context of a deferred forward, came a context that backward "
        "has used already");
    one.rig.rest();
    CHECK(one.rig.loss(0) > 0.0);
    const Call next = script_of(0, 0, false)[1];
    REQUIRE(one.rig.forward(next, &one.stack, 0, 0).ok());
    CHECK(one.rig.loss(0) == 0.0);  // not the last call's
    CHECK(one.rig.forward(one.call, &one.stack, 2).message() ==
          "steelyard: layer.forward: row: expected a row of the stack's 1, came 2");
    One narrow(1, -1);
    CHECK(narrow.rig.forward(narrow.call, &narrow.stack).message() ==
          "steelyard: layer.forward: stack: expected rows of at least 10 words, came 9");
}

TEST_CASE("a forward of such a stack may be tried again when nothing was concluded") {
    One one;
    REQUIRE(one.rig.forward(one.call, &one.stack).ok());
    one.stack.clear();
    REQUIRE(one.rig.forward(one.call, &one.stack).ok());  // no replay: the first was never summed
    REQUIRE(one.stack.begin(SelfComm{}).ok());
    REQUIRE(one.stack.end(SelfComm{}).ok());
    CHECK(one.rig.conclude(one.stack, 0).message() == "ok");
    CHECK(one.rig.backward().message() == "ok");
    const auto outcomes = one.rig.outcomes();
    CHECK(one.rig.summed(1).message() == "ok");
    CHECK(outcomes[1].loss > 0.0);
    one.stack.clear();
    REQUIRE(one.rig.forward(one.call, &one.stack).ok());  // a replay: nothing is posted
    CHECK(one.rig.conclude(one.stack, 0).message() == "ok");
    CHECK(one.rig.backward().message() == "ok");
    CHECK(one.rig.outcomes()[2] == outcomes[1]);
}

TEST_CASE("backward waits, on the device, for a conclusion of its own or from a stack") {
    for (const bool stacked : {false, true}) {
        CAPTURE(stacked);
        std::vector<std::vector<Outcome>> of_side;
        for (const auto side : {FarMachine::Side::early, FarMachine::Side::late}) {
            One one(1, 0, side);
            REQUIRE(one.rig.forward(one.call, stacked ? &one.stack : nullptr).ok());
            if (stacked) {
                REQUIRE(one.stack.begin(SelfComm{}).ok());
                REQUIRE(one.stack.end(SelfComm{}).ok());
                REQUIRE(one.rig.conclude(one.stack, 0).ok());
            }
            REQUIRE(one.rig.backward().ok());
            of_side.push_back(one.rig.outcomes());
        }
        CHECK(of_side[0] == of_side[1]);
        CHECK(of_side[0][0].loss > 0.0);
    }
}

TEST_CASE("a layer may conclude from another row than its own, and from rows that are wider") {
    One one(2, 3);
    REQUIRE(one.rig.forward(one.call, &one.stack, 1).ok());
    REQUIRE(one.stack.begin(SelfComm{}).ok());
    REQUIRE(one.stack.end(SelfComm{}).ok());
    memory_ops<Far>::wait(memory_ops<Far>::beside({&one.machine}));
    for (std::size_t w = 0; w < one.memory.size() / 2; ++w)
        std::swap(one.memory[w], one.memory[one.memory.size() / 2 + w]);
    REQUIRE(one.rig.conclude(one.stack, 0).ok());
    REQUIRE(one.rig.backward().ok());
    CHECK(one.rig.outcomes()[0].loss > 0.0);
    CHECK(one.rig.summed(0).ok());
}

namespace {

/// A layer that refuses on rank 1, in a stack of two; then the same step without a refusal.
template <bool queued>
void check_refusals() {
    using Comm = std::conditional_t<queued, QueuedComm<ThreadComm>, ThreadComm>;
    using Layer = LayerOf<SynchronizedLoss, Comm, Far>;
    ThreadGroup group(2, {.timeout = 20});
    run_ranks(group, [&](const ThreadComm& threads) {
        FarMachine machine;
        const auto comm = far_comm<queued>(threads, machine);
        FarRig<Layer> first({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}, .layer = 0}, comm, machine);
        FarRig<Layer> second({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}, .layer = 1}, comm,
                             machine);
        const index_t words = first.layer.wire_words();
        std::vector<std::int64_t> memory(2 * static_cast<std::size_t>(words));
        typename Layer::Stack stack(memory, 2, words, {&machine});
        Call call = script_of(0, threads.rank(), false)[0], bad = call;
        if (threads.rank() == 1) bad.batch.step.token_offset = -1;

        stack.clear();
        CHECK(first.forward(call, &stack, 0).ok());
        CHECK(second.forward(bad, &stack, 1).ok() == (threads.rank() == 0));
        REQUIRE(stack.begin(comm).ok());
        REQUIRE(stack.end(comm).ok());
        CHECK(first.conclude(stack, 0).message() == "ok");
        const Status refused = second.conclude(stack, 1);
        first.rest();
        CHECK(first.summed(0).message() == "ok");
        CHECK(std::isfinite(first.loss(0)));
        if (threads.rank() == 1)
            CHECK(refused.code() == Code::invalid_argument);  // the context of a forward that was refused
        else if (queued)
            CHECK(second.summed(0).code() == Code::rank_refused);  // told when the sum has come
        else
            CHECK(refused.code() == Code::rank_refused);
        if (queued && threads.rank() == 0) CHECK(std::isnan(second.loss(0)));
        CHECK(second.balance_state().log.step[0] == -1);

        // Also where nobody else has posted: every rank takes part in the sum.
        stack.clear();
        Call again = script_of(0, threads.rank(), false)[1];
        if (threads.rank() == 1) again.batch.step.token_offset = -1;
        CHECK(second.forward(again, &stack, 1).ok() == (threads.rank() == 0));
        REQUIRE(stack.begin(comm).ok());
        REQUIRE(stack.end(comm).ok());
        CHECK(stack.summed());
        second.rest();

        stack.clear();
        REQUIRE(second.forward(call, &stack, 1).ok());
        REQUIRE(stack.begin(comm).ok());
        REQUIRE(stack.end(comm).ok());
        REQUIRE(second.conclude(stack, 1).ok());
        REQUIRE(second.backward().ok());
        second.rest();
        CHECK(second.summed(2).message() == "ok");
        CHECK(std::isfinite(second.loss(2)));
        CHECK(second.balance_state().log.step[0] == 0);
    });
}

}  // namespace

TEST_CASE("a rank that refuses one layer's call tells the others by the stack's sum") {
    check_refusals<false>();
    check_refusals<true>();
}

namespace {

template <bool queued>
void check_steps_apart() {
    using Comm = std::conditional_t<queued, QueuedComm<ThreadComm>, ThreadComm>;
    using Layer = LayerOf<WindowedLoss<2>, Comm, Far>;
    ThreadGroup group(2, {.timeout = 20});
    run_ranks(group, [&](const ThreadComm& threads) {
        FarMachine machine;
        const auto comm = far_comm<queued>(threads, machine);
        FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, comm, machine);
        const index_t words = rig.layer.step_words();
        std::vector<std::int64_t> memory(static_cast<std::size_t>(words));
        typename Layer::Stack stack(memory, 1, words, {&machine});
        REQUIRE(rig.call(script_of(0, threads.rank(), false)[0]).ok());
        CHECK(rig.post_step(stack, 1, 0).message() ==
              "steelyard: layer.post_step: row: expected a row of the stack's 1, came 1");
        REQUIRE(rig.post_step(stack, 0, threads.rank()).ok());
        CHECK(
            rig.end_step(stack, 0, threads.rank()).message() ==
            "steelyard: layer.end_step: stack: expected the sum of what was posted: begin, then end, came a stack that "
            "was not summed");
        REQUIRE(stack.begin(comm).ok());
        REQUIRE(stack.end(comm).ok());
        CHECK(rig.end_step(stack, 0, threads.rank()).code() == Code::comm_mismatch);
        CHECK(rig.balance_state().ended[0] == -1);
        stack.clear();
        REQUIRE(rig.post_step(stack, 0, 0).ok());
        REQUIRE(stack.begin(comm).ok());
        REQUIRE(stack.end(comm).ok());
        CHECK(rig.end_step(stack, 0, 0).message() == "ok");
        CHECK(rig.balance_state().ended[0] == 0);
    });
}

}  // namespace

TEST_CASE("ranks that end different steps are told so by the stack's sum, and the step can be ended yet") {
    check_steps_apart<false>();
    check_steps_apart<true>();
}
