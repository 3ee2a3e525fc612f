// Layers on a device that has memory of its own and works in its own time: the bits of the CPU.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "support/far_rig.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

/// Everything that a rank knows after two steps.
struct RankResult {
    std::vector<Outcome> outcomes;
    std::vector<std::byte> grads, state;
    bool operator==(const RankResult&) const = default;
};

template <class Layer>
RankResult on_cpu(const typename Layer::Config& config, const typename Layer::Comm& comm, bool masked) {
    Rig<Layer> rig(config);
    RankResult result;
    for (std::int64_t step = 0; step < 2; ++step) {
        for (const Call& call : script_of(step, comm.rank(), masked)) {
            std::fill_n(rig.context.data(), rig.context.size(), std::byte{0});  // one of its own, as over there
            const Status forward = rig.layer.forward(comm, rig.forward_args(call.batch, call.mode));
            REQUIRE_MESSAGE(forward.ok(), forward.message());
            Outcome& one = result.outcomes.emplace_back();
            if (call.mode == Mode::train) one.record = bytes_of_tensors(rig.record(), config.balance, shape);
            one.loss = rig.balance_loss();
            one.dx.resize(call.batch.x.size());
            if (call.backward) {
                rig.write_grads = call.write_grads;
                REQUIRE(rig.backward(call.batch).ok());
                one.dx.assign(rig.dx.data(), rig.dx.data() + call.batch.x.size());
            }
            one.y.assign(rig.y.data(), rig.y.data() + call.batch.x.size());
        }
        REQUIRE(rig.end_step(comm, step).ok());
    }
    const auto* grads = rig.grad_memory.data();
    result.grads.assign(grads, grads + rig.grad_memory.size());
    result.state = bytes_of_tensors(rig.balance_state(), config.balance, shape);
    return result;
}

template <class Layer>
RankResult on_far(const typename Layer::Config& config, const typename Layer::Comm& comm, FarMachine& machine,
                  std::span<const std::byte> params, bool masked) {
    FarRig<Layer> rig(config, comm, machine);
    rig.set_params(params);
    for (std::int64_t step = 0; step < 2; ++step) {
        for (const Call& call : script_of(step, comm.rank(), masked)) {
            const long waits = machine.waits;
            const Status s = rig.call(call);
            REQUIRE_MESSAGE(s.ok(), s.message());
            if (StreamOrderedComm<typename Layer::Comm> && (!Layer::Balance::needs_rank_tokens || comm.size() == 1))
                CHECK(machine.waits == waits);
        }
        REQUIRE(rig.end_step(step).ok());
    }
    RankResult result{rig.outcomes(), rig.grad_bytes(), bytes_of_tensors(rig.balance_state(), config.balance, shape)};
    // The side line runs beside the experts.
    for (const auto* scratch : machine.scratch_of[1]) CHECK(machine.scratch_of[0].count(scratch) == 0);
    return result;
}

/// Compares a layer on the CPU with the same on `Far`; says whether every bit is the same.
template <class ExpertT, class RetentionT = KeepActivations, class BalanceT>
void check_same(const BalanceT& balance, const ExpertT& expert, const TopK& router) {
    using OnCpu = LayerOn<ExpertT, BalanceT, SelfComm, RetentionT, Cpu>;
    using OnFar = LayerOn<ExpertT, BalanceT, SelfComm, RetentionT, Far>;
    for (const bool masked : {false, true})
        for (const auto side : {FarMachine::Side::early, FarMachine::Side::late}) {
            CAPTURE(masked);
            const typename OnCpu::Config config{
                .shape = shape, .router = router, .expert = expert, .balance = balance, .layer = 3};
            const Rig<OnCpu> initial(config);
            FarMachine machine(side);
            const RankResult want = on_cpu<OnCpu>(config, {}, masked);
            const RankResult came = on_far<OnFar>(
                {.shape = shape,
                 .router = router,
                 .expert = expert,
                 .balance = balance,
                 .device = {&machine},
                 .layer = 3},
                {}, machine, {initial.param_memory.data(), static_cast<std::size_t>(initial.param_memory.size())},
                masked);
            REQUIRE(came.outcomes.size() == want.outcomes.size());
            for (std::size_t i = 0; i < want.outcomes.size(); ++i) {
                CAPTURE(i);
                CHECK(came.outcomes[i] == want.outcomes[i]);
            }
            CHECK(came.grads == want.grads);
            CHECK(came.state == want.state);
        }
}

/// The same on two ranks, with sums of threads: waited for, or work of the side line.
template <bool queued, class BalanceT>
void check_same_on_ranks(const BalanceT& balance) {
    using FarComm = std::conditional_t<queued, QueuedComm<ThreadComm>, ThreadComm>;
    using OnCpu = LayerOn<SwiGlu, BalanceT, ThreadComm, KeepActivations, Cpu>;
    using OnFar = LayerOn<SwiGlu, BalanceT, FarComm, KeepActivations, Far>;
    const typename OnCpu::Config config{.shape = shape, .expert = {.hidden = 4}, .balance = balance};
    const Rig<OnCpu> initial(config);
    for (const bool masked : {false, true}) {
        CAPTURE(masked);
        std::vector<RankResult> want(2), came(2);
        ThreadGroup on_cpus(2), on_fars(2);
        run_ranks(on_cpus, [&](const ThreadComm& comm) {
            want[static_cast<std::size_t>(comm.rank())] = on_cpu<OnCpu>(config, comm, masked);
        });
        run_ranks(on_fars, [&](const ThreadComm& comm) {
            FarMachine machine;
            FarComm far_comm = [&] {
                if constexpr (queued)
                    return FarComm{&comm, &machine};
                else
                    return comm;
            }();
            came[static_cast<std::size_t>(comm.rank())] = on_far<OnFar>(
                {.shape = shape, .expert = {.hidden = 4}, .balance = balance, .device = {&machine}}, far_comm, machine,
                {initial.param_memory.data(), static_cast<std::size_t>(initial.param_memory.size())}, masked);
        });
        for (std::size_t r = 0; r < 2; ++r) {
            for (std::size_t i = 0; i < want[r].outcomes.size(); ++i) {
                CAPTURE(i);
                CHECK(came[r].outcomes[i] == want[r].outcomes[i]);
            }
            CHECK(came[r] == want[r]);
        }
    }
}

}  // namespace

TEST_CASE("a layer on a device of its own memory gives the bits of the CPU, and waits in no forward or backward") {
    const SwiGlu swiglu{.hidden = 4};
    check_same(NoBalance{}, swiglu, {});
    check_same(MicroBatchLoss{}, swiglu, {});
    check_same(SequenceLoss{}, swiglu, {.k = 1, .score = Score::sigmoid, .bias = true});
    check_same(SynchronizedLoss{}, swiglu, {.jitter = 0.1, .noise = 0.2});
    check_same(RouterZLoss{}, Mlp{.hidden = 4}, {});
    check_same<SwiGlu, RecomputeActivations>(BufferedLoss{}, swiglu, {});
    check_same(LossFree{{}, {.rate = 0.1}}, swiglu, {});
    check_same(QuantileBalance{}, swiglu, {.score = Score::sigmoid});
    check_same(ImportanceLoss{}, swiglu, {});
    check_same(WindowedLoss<2>{}, swiglu, {});
    check_same(ShuffledLoss{}, swiglu, {});
    check_same(Balance<OfId<Synchronized>, LoadBalancingLoss>{OfId<Synchronized>(1), {}}, swiglu, {});
    check_same(Scheduled<MicroBatchLoss, SynchronizedLoss>{1, {}, {}}, swiglu, {});
    check_same(AllOf{SynchronizedLoss{}, LossFree{}, RouterZLoss{}}, swiglu, {.score = Score::sigmoid});
    check_same<WithShared<SwiGlu, SwiGlu>, RecomputeActivations>(AllOf{MicroBatchLoss{}, RouterZLoss{}},
                                                                 WithShared<SwiGlu, SwiGlu>{{4}, {3}}, {});
}

TEST_CASE("sums over ranks on such a device, waited for or enqueued") {
    check_same_on_ranks<false>(SynchronizedLoss{});
    check_same_on_ranks<true>(SynchronizedLoss{});
    check_same_on_ranks<false>(ShuffledLoss{});
    check_same_on_ranks<true>(AllOf{ShuffledLoss{}, SynchronizedLoss{}});
    check_same_on_ranks<true>(AllOf{BufferedLoss{}, LossFree{}, WindowedLoss<2>{}, RouterZLoss{}});
}

TEST_CASE("a context whose call is under way may be given again: forward waits for it") {
    using Layer = LayerOn<SwiGlu, MicroBatchLoss, SelfComm, KeepActivations, Far>;
    FarMachine machine;
    FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {}, machine);
    const auto script = script_of(0, 0, true);
    REQUIRE(rig.call(script[0]).ok());
    const long waits = machine.waits;
    REQUIRE(rig.call(script[1], 0).ok());
    CHECK(machine.waits == waits + 1);
    CHECK(rig.summed(1).ok());
    REQUIRE(rig.call(script[2], 0).ok());  // nothing is under way
    CHECK(machine.waits == waits + 2);
}

TEST_CASE("an enqueued sum that a rank refuses is found out, spoils loss and gradient, and may be tried again") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, QueuedComm<ThreadComm>, KeepActivations, Far>;
    ThreadGroup group(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        FarMachine machine;
        FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {&comm, &machine}, machine);
        auto script = script_of(0, 0, false);
        Call refused = script[0];
        if (comm.rank() == 1) refused.batch.step.token_offset = -1;
        const Status first = rig.call(refused);
        CHECK(first.ok() == (comm.rank() == 0));
        if (comm.rank() == 0) {
            memory_ops<Far>::wait({&machine});
            CHECK(rig.summed(0).code() == Code::rank_refused);
            CHECK(std::isnan(rig.loss(0)));
        }
        REQUIRE(rig.call(script[0]).ok());
        REQUIRE(rig.call(script[1]).ok());
        memory_ops<Far>::wait({&machine});
        for (const std::size_t call : {std::size_t{1}, std::size_t{2}}) {
            CHECK(rig.summed(call).message() == "ok");
            CHECK(std::isfinite(rig.loss(call)));
        }
    });
}

TEST_CASE("a sum that the host waits for and a rank refuses is refused at once, and leaves y as it was") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, ThreadComm, KeepActivations, Far>;
    ThreadGroup group(2, {.timeout = 20});
    run_ranks(group, [&](const ThreadComm& comm) {
        FarMachine machine;
        FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, comm, machine);
        Call call = script_of(0, comm.rank(), false)[0], refused = call;
        if (comm.rank() == 1) refused.batch.step.token_offset = -1;
        CHECK(rig.call(refused).code() == (comm.rank() == 0 ? Code::rank_refused : Code::invalid_argument));
        CHECK(rig.outcomes()[0].y == std::vector<float>(call.batch.x.size(), 7.0f));
        CHECK(rig.balance_state().log.step[0] == -1);
        CHECK(rig.call(call).message() == "ok");
        CHECK(rig.outcomes()[1].loss >= 0.0);
        CHECK(rig.summed(1).message() == "ok");
        CHECK(rig.balance_state().log.step[0] == 0);
    });
}

namespace {

template <bool queued>
void check_refusal_among_draws() {
    using Comm = std::conditional_t<queued, QueuedComm<ThreadComm>, ThreadComm>;
    using Layer = LayerOn<SwiGlu, ShuffledLoss, Comm, KeepActivations, Far>;
    ThreadGroup group(2, {.timeout = 20});
    run_ranks(group, [&](const ThreadComm& threads) {
        FarMachine machine;
        const auto comm = [&] {
            if constexpr (queued)
                return Comm{&threads, &machine};
            else
                return threads;
        }();
        FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, comm, machine);
        Call call = script_of(0, threads.rank(), false)[0], refused = call;
        if (threads.rank() == 1) refused.batch.step.token_offset = -1;
        const Status first = rig.call(refused);
        rig.rest();
        if (threads.rank() == 1)
            CHECK(first.code() == Code::invalid_argument);
        else
            CHECK((queued ? rig.summed(0) : first).code() == Code::rank_refused);
        CHECK(rig.call(call).message() == "ok");
        rig.rest();
        CHECK(rig.summed(1).message() == "ok");
        CHECK(rig.balance_state().log.step[0] == 0);
    });
}

}  // namespace

TEST_CASE("a rank that refuses takes part in the exchange of the ranks' tokens, too") {
    check_refusal_among_draws<false>();
    check_refusal_among_draws<true>();
}

namespace {

/// One rank, whose sums the host waits for: notes how much work the device had before.
struct WatchingComm {
    FarMachine* machine;
    std::size_t* issued;
    [[nodiscard]] int rank() const { return 0; }
    [[nodiscard]] int size() const { return 1; }
    Status begin_sum(std::span<std::int64_t>) const {
        *issued = machine->issued(FarMachine::main_line);
        return {};
    }
    Status end_sum(std::span<std::int64_t>) const { return {}; }
};

}  // namespace

TEST_CASE("where the host waits for a sum, the device has its experts to run") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, WatchingComm, KeepActivations, Far>;
    FarMachine machine;
    std::size_t issued = 0;
    FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {&machine, &issued}, machine);
    REQUIRE(rig.forward(script_of(0, 0, false)[0]).ok());
    CHECK(machine.issued(FarMachine::main_line) == issued + 2);  // outputs are combined, and the side line joins
    CHECK(machine.waits == 1);
}

TEST_CASE("a replay that was enqueued on a sum which comes out refused is found out, and spoiled, too") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, QueuedComm<ThreadComm>, KeepActivations, Far>;
    ThreadGroup group(2);
    run_ranks(group, [&](const ThreadComm& comm) {
        FarMachine machine;
        FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {&comm, &machine}, machine);
        const Call call = script_of(0, comm.rank(), false)[0];
        Call refused = call;
        if (comm.rank() == 1) refused.batch.step.token_offset = -1;
        CHECK(rig.call(refused).ok() == (comm.rank() == 0));
        if (comm.rank() == 0) {
            CHECK(rig.call(call).ok());  // nothing has run yet: a replay, as far as the host knows
            rig.rest();
            for (const std::size_t of : {0u, 1u}) {
                CHECK(rig.summed(of).code() == Code::rank_refused);
                CHECK(std::isnan(rig.loss(of)));
            }
            CHECK(rig.balance_state().log.step[0] == -1);
        }
        REQUIRE(rig.call(call).ok());
        REQUIRE(rig.call(call).ok());
        const std::vector<Outcome> outcomes = rig.outcomes();
        const Outcome &first = outcomes[outcomes.size() - 2], &replay = outcomes.back();
        CHECK(rig.summed(outcomes.size() - 2).message() == "ok");
        CHECK(rig.summed(outcomes.size() - 1).message() == "ok");
        CHECK(first.loss > 0.0);
        CHECK(replay == first);
    });
}

TEST_CASE("forward waits for the statistics of its context's last call, and for nothing that comes after them") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, SelfComm, KeepActivations, Far>;
    FarMachine machine;
    FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {}, machine);
    const auto script = script_of(0, 0, false);
    REQUIRE(rig.forward(script[0]).ok());
    bool ran = false;
    machine.enqueue(FarMachine::main_line, [&] { ran = true; });
    REQUIRE(rig.forward(script[1], nullptr, 0, 0).ok());
    CHECK(machine.waits == 1);
    CHECK_FALSE(ran);
    rig.rest();
    CHECK(ran);
}

TEST_CASE("what such a layer cannot know is asked of the caller") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, SelfComm, KeepActivations, Far>;
    FarMachine machine;
    FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {}, machine);
    auto masked = script_of(0, 0, true)[0];
    masked.batch.step.total_tokens = 0;
    CHECK(rig.call(masked).message() ==
          "steelyard: layer.forward: step.total_tokens: expected the valid tokens of the whole step, which the host "
          "cannot count, came 0");
    FarMachine other;
    FarRig<LayerOn<SwiGlu, ShuffledLoss, SelfComm, KeepActivations, Far>> drawing(
        {.shape = shape, .expert = {.hidden = 4}, .device = {&other}}, {}, other);
    drawing.gives_rank_tokens = false;
    CHECK(drawing.call(script_of(0, 0, true)[0]).message() ==
          "steelyard: layer.forward: tokens_of_rank: expected the valid tokens of each rank, which the host cannot "
          "count, came none");
    auto bare = script_of(0, 0, false)[0];
    bare.batch.step.total_tokens = 0;
    CHECK(rig.call(bare).message() == "ok");
}
