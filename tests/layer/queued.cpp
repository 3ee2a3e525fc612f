// Layers on a device that has memory of its own and works in its own time: the bits of the CPU.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "support/far_device.hpp"
#include "support/rig.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

constexpr LayerShape shape{.tokens = 12, .width = 6, .experts = 5, .sequences = 3, .micro_steps = 2, .ranks = 2};

template <class ExpertT, class BalanceT, class CommT, class RetentionT, class DeviceT>
using LayerOn = MoE<float, TopK, ExpertT, BalanceT, CommT, Dropless, RetentionT, DeviceT>;

/// What one call left behind, whatever the device.
struct Outcome {
    std::vector<float> y, dx;
    std::vector<std::byte> record;
    double loss = 0;
    bool operator==(const Outcome& other) const {
        return same_bits(y, other.y) && same_bits(dx, other.dx) && record == other.record &&
               std::memcmp(&loss, &other.loss, sizeof loss) == 0;
    }
};

template <class Bundle, class... Dims>
std::vector<std::byte> bytes_of_tensors(Bundle bundle, const Dims&... dims) {
    std::vector<std::byte> all;
    const auto add = [&](const auto&, const auto& tensor) {
        const auto* from = reinterpret_cast<const std::byte*>(tensor.data);
        all.insert(all.end(), from, from + static_cast<std::size_t>(tensor.size()) * sizeof(*tensor.data));
    };
    for_each_tensor(bundle, add, dims...);
    return all;
}

/// One call of a script, and what it is made with.
struct Call {
    Batch<float> batch;
    Mode mode = Mode::train;
    bool backward = true;
};

/// Two micro-steps, the second replayed, and an evaluation. Every rank has tokens of its own.
std::vector<Call> script_of(std::int64_t step, int rank, bool masked) {
    std::vector<Call> calls;
    for (const std::int64_t m : {0, 1, 1}) {
        const auto seed = static_cast<std::uint64_t>(10 * step + m + 100 * rank);
        Batch<float> batch(12 - m, shape.width, seed,
                           {.step = step, .micro_step = m, .total_tokens = 60, .token_offset = 20 * m + 10 * rank});
        if (masked) {
            batch.mask.assign(static_cast<std::size_t>(batch.tokens()), 1);
            batch.mask[1] = batch.mask[7] = 0;
            batch.sequences = {0, 4, 4, batch.tokens()};
        }
        batch.ids.resize(static_cast<std::size_t>(batch.tokens()));
        for (std::size_t t = 0; t < batch.ids.size(); ++t) batch.ids[t] = static_cast<std::int32_t>(t % 2);
        batch.dlogits.assign(static_cast<std::size_t>(batch.tokens() * shape.experts), m == 1 ? 0.25f : 0.0f);
        calls.push_back({batch});
    }
    calls.push_back({calls[0].batch, Mode::evaluate, false});
    return calls;
}

/// A rig whose layer lives on `Far`. Nothing is waited for until `outcomes`.
template <class Layer>
class FarRig {
public:
    using Comm = typename Layer::Comm;

    FarRig(const typename Layer::Config& config, const Comm& comm, FarMachine& machine)
        : layer(config),
          comm_(comm),
          machine_(machine),
          param_memory_(machine.allocate(layer.param_bytes())),
          grad_memory_(machine.allocate(layer.param_bytes())),
          state_(layer.state_bytes()),
          workspace_host_(layer.workspace_bytes().host),
          workspace_{workspace_host_, machine.allocate(layer.workspace_bytes().device)},
          params_(layer.place_params(param_memory_.data())),
          grads_(layer.place_params(grad_memory_.data())) {
        REQUIRE(layer.init_state(state_).ok());
    }

    void set_params(std::span<const std::byte> values) {
        machine_.open([&] { std::memcpy(param_memory_.data(), values.data(), values.size()); });
    }

    /// `again`: the memory of an earlier call's context, which may be under way.
    Status call(const Call& of, index_t again = -1) {
        auto& c = *calls_.emplace_back(std::make_unique<InFlight>());
        const index_t tokens = of.batch.tokens();
        c.call = of;
        if (again >= 0) {
            c.context = calls_[static_cast<std::size_t>(again)]->context;
        } else {
            c.context_host = Bytes(layer.context_bytes().host);
            c.context = {c.context_host, machine_.allocate(layer.context_bytes().device)};
        }
        const auto matrix = [&](const std::vector<float>& values) {
            return view<float, 2, FarSpace>(put(values).data, tokens, static_cast<index_t>(values.size()) / tokens);
        };
        const auto x = matrix(of.batch.x), dy = matrix(of.batch.dy);
        c.y = matrix(std::vector<float>(of.batch.x.size(), 7.0f)), c.dx = matrix(std::vector<float>(of.batch.x.size()));
        TokenInfo<FarSpace> info{.step = of.batch.step, .mode = of.mode};
        if (!of.batch.mask.empty()) info.mask = put(of.batch.mask);
        if (!of.batch.sequences.empty()) info.sequences = put(of.batch.sequences);
        if (!of.batch.ids.empty()) info.ids = put(of.batch.ids);
        if (Status s = layer.forward(comm_, {.x = x,
                                             .params = layer.read_only_params(params_),
                                             .y = c.y,
                                             .context = c.context,
                                             .workspace = workspace_,
                                             .state = state_,
                                             .tokens = info});
            !s)
            return s;
        if (!of.backward) return {};
        return layer.backward({.x = x,
                               .params = layer.read_only_params(params_),
                               .dy = dy,
                               .dx = c.dx,
                               .grads = grads_,
                               .context = c.context,
                               .workspace = workspace_,
                               .dlogits = matrix(of.batch.dlogits)});
    }

    Status end_step(std::int64_t step) { return layer.end_step(comm_, step, state_, workspace_); }

    std::vector<Outcome> outcomes() {
        memory_ops<Far>::wait({&machine_});
        std::vector<Outcome> all;
        for (const auto& c : calls_) {
            Outcome& one = all.emplace_back();
            machine_.open([&] {
                one.y.assign(c->y.data, c->y.data + c->y.size()), one.dx.assign(c->dx.data, c->dx.data + c->dx.size());
            });
            if (c->call.mode == Mode::train)
                one.record = bytes_of_tensors(layer.balance_record(c->context), layer.config().balance, shape);
            one.loss = layer.balance_loss(c->context);
        }
        return all;
    }
    [[nodiscard]] double loss(std::size_t call) const { return layer.balance_loss(calls_[call]->context); }
    [[nodiscard]] Status summed(std::size_t call) const { return layer.summed(calls_[call]->context); }
    [[nodiscard]] std::vector<std::byte> grad_bytes() {
        std::vector<std::byte> bytes;
        memory_ops<Far>::wait({&machine_});
        machine_.open([&] { bytes.assign(grad_memory_.begin(), grad_memory_.end()); });
        return bytes;
    }
    [[nodiscard]] auto balance_state() const { return layer.balance_state(state_); }

    Layer layer;

private:
    struct InFlight {
        Call call;
        Bytes context_host;
        QueuedBlock context;
        view<float, 2, FarSpace> y, dx;
    };

    /// A copy in far memory; work may be under way, so the copy is work too.
    template <class U>
    view<U, 1, FarSpace> put(const std::vector<U>& values) {
        const auto block = machine_.allocate(static_cast<index_t>(values.size() * sizeof(U)));
        machine_.enqueue(FarMachine::main_line,
                         [block, values] { std::memcpy(block.data(), values.data(), block.size()); });
        return {reinterpret_cast<U*>(block.data()), std::ssize(values)};
    }

    Comm comm_;
    FarMachine& machine_;
    std::span<std::byte> param_memory_, grad_memory_;
    Bytes state_, workspace_host_;
    QueuedBlock workspace_;
    typename Layer::Params params_, grads_;
    std::vector<std::unique_ptr<InFlight>> calls_;
};

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
            if (!Layer::Balance::remembers) CHECK(machine.waits == waits);
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
    check_same(Balance<OfId<Synchronized>, LoadBalancingLoss>{OfId<Synchronized>(1), {}}, swiglu, {});
    check_same(Scheduled<MicroBatchLoss, SynchronizedLoss>{1, {}, {}}, swiglu, {});
    check_same(AllOf{SynchronizedLoss{}, LossFree{}, RouterZLoss{}}, swiglu, {.score = Score::sigmoid});
    check_same<WithShared<SwiGlu, SwiGlu>, RecomputeActivations>(AllOf{MicroBatchLoss{}, RouterZLoss{}},
                                                                 WithShared<SwiGlu, SwiGlu>{{4}, {3}}, {});
}

TEST_CASE("sums over ranks on such a device, waited for or enqueued") {
    check_same_on_ranks<false>(SynchronizedLoss{});
    check_same_on_ranks<true>(SynchronizedLoss{});
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

TEST_CASE("what such a layer cannot know is asked of the caller") {
    using Layer = LayerOn<SwiGlu, SynchronizedLoss, SelfComm, KeepActivations, Far>;
    FarMachine machine;
    FarRig<Layer> rig({.shape = shape, .expert = {.hidden = 4}, .device = {&machine}}, {}, machine);
    auto masked = script_of(0, 0, true)[0];
    masked.batch.step.total_tokens = 0;
    CHECK(rig.call(masked).message() ==
          "steelyard: layer.forward: step.total_tokens: expected the valid tokens of the whole step, which the host "
          "cannot count, came 0");
    auto bare = script_of(0, 0, false)[0];
    bare.batch.step.total_tokens = 0;
    CHECK(rig.call(bare).message() == "ok");
}
