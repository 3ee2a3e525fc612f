// check_balance_laws on every policy, and on policies that break one law each.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include "steelyard/balance/laws.hpp"
#include "steelyard/cpu/balance.hpp"

namespace {

using namespace steelyard;

constexpr LayerShape shape{.tokens = 11, .width = 1, .experts = 5, .sequences = 3, .micro_steps = 2, .ranks = 1};

template <class B>
std::string broken(const B& policy) {
    return check_balance_laws(Cpu{}, policy, shape, 2).message();
}

/// The number of the first law that a policy breaks.
template <class B>
std::string first_broken(const B& policy) {
    const Status status = check_balance_laws(Cpu{}, policy, shape, 2);
    return status.ok() ? "none" : status.tensor();
}

struct DriftingBias {
    void update(view<const std::int64_t, 1>, view<float, 1> bias) const { bias[0] += 0.25f; }
};

struct WrongSlope : LoadBalancingLoss {
    double loss(const SegmentLoad& segment, view<double, 1> gradient) const {
        const double value = LoadBalancingLoss::loss(segment, gradient);
        for (index_t i = 0; i < gradient.extents[0]; ++i) gradient[i] *= 1.01;
        return value;
    }
};

struct WrongTokenGradient : ZLoss {
    template <class T>
    void gradient(view<const T, 1> logits, double factor, view<T, 1> dlogits) const {
        ZLoss::gradient(logits, -factor, dlogits);
    }
};

struct WrongMeanSlope : Importance {
    double loss(const SegmentMean& segment, view<double, 1> gradient) const {
        const double value = Importance::loss(segment, gradient);
        gradient[0] += 0.001;
        return value;
    }
};

struct IgnoresScale : MicroBatchLoss {
    template <class Device, class T, class Space>
    void gradient(const Device& device, Observation<T, Space> seen, const Record<>& record,
                  const RoutingGrad<T, Space>& grad, std::byte* scratch) const {
        seen.tokens.step.grad_scale = 1.0;
        MicroBatchLoss::gradient(device, seen, record, grad, scratch);
    }
};

struct CountsAgain : SynchronizedLoss {
    template <class T, class Space>
    void conclude(const Observation<T, Space>& seen, const State<>& state, const Record<>& record, Wire<>& wire) const {
        SynchronizedLoss::conclude(seen, state, record, wire);
        ++state.log.load(seen.tokens.step.micro_step, 0);
    }
};

struct EndsAgain : LossFree {
    template <class Space>
    void end_step(const State<Space>& state, std::int64_t step, Wire<Space>& wire) const {
        state.ended[0] = -1;
        LossFree::end_step(state, step, wire);
    }
};

struct PullsAtPadding : MicroBatchLoss {
    template <class Device, class T, class Space>
    void gradient(const Device& device, Observation<T, Space> seen, const Record<>& record,
                  const RoutingGrad<T, Space>& grad, std::byte* scratch) const {
        seen.tokens.mask = {};
        MicroBatchLoss::gradient(device, seen, record, grad, scratch);
    }
};

struct DividesByOwnTokens : MicroBatchLoss {
    template <class Space>
    double loss(const Record<Space>& record, const StepInfo&) const {
        const auto own = static_cast<double>(record.own[0]);
        return record.loss[0] / own * own;
    }
};

struct SilentTalker : MicroBatchLoss {
    index_t wire_words(const LayerShape&) const { return 3; }
};

struct InfiniteBias {
    void update(view<const std::int64_t, 1> counts, view<float, 1> bias) const {
        for (index_t i = 0; i < counts.extents[0]; ++i)
            if (counts[i] > 0) bias[i] = std::numeric_limits<float>::infinity();
    }
};

}  // namespace

TEST_CASE("every balance policy of the library keeps the laws") {
    CHECK(broken(NoBalance{}) == "ok");
    CHECK(broken(MicroBatchLoss{}) == "ok");
    CHECK(broken(MicroBatchLoss{{}, {1.0, LoadNormalization::by_token}}) == "ok");
    CHECK(broken(SequenceLoss{}) == "ok");
    CHECK(broken(SynchronizedLoss{}) == "ok");
    CHECK(broken(BufferedLoss{}) == "ok");
    CHECK(broken(Balance<Buffered<MicroBatch, Extent::whole>, LoadBalancingLoss>{}) == "ok");
    CHECK(broken(ShuffledLoss{Shuffled{3}, {}}) == "ok");
    CHECK(broken(Balance<Buffered<Shuffled>, LoadBalancingLoss>{}) == "ok");
    CHECK(broken(WindowedLoss<3>{}) == "ok");
    CHECK(broken(LossFree{}) == "ok");
    CHECK(broken(LossFree{{}, {.rate = 0.1, .centred = true}}) == "ok");
    CHECK(broken(Balance<MicroBatch, LossFreeBias>{}) == "ok");
    CHECK(broken(RouterZLoss{}) == "ok");
    CHECK(broken(hybrid_loss()) == "ok");
    CHECK(broken(AllOf{SynchronizedLoss{}, RouterZLoss{}, LossFree{}}) == "ok");
    CHECK(broken(Scheduled<MicroBatchLoss, BufferedLoss>{2, {}, {}}) == "ok");
    CHECK(broken(Scheduled<WindowedLoss<2>, AllOf<LossFree, RouterZLoss>>{3, {}, {}}) == "ok");
}

TEST_CASE("every policy on means, entropies and shortfalls keeps the laws") {
    CHECK(broken(ImportanceLoss{{}, {1.0, Variance::sample}}) == "ok");
    CHECK(broken(Balance<Sequence, ProbImportance>{}) == "ok");
    CHECK(broken(Balance<Synchronized, SmoothLoad>{}) == "ok");
    CHECK(broken(Balance<Buffered<>, Importance>{}) == "ok");
    CHECK(broken(Balance<Windowed<2>, GlobalEntropy>{{}, {1.0, 1.55}}) == "ok");
    CHECK(broken(Balance<Shuffled, GlobalEntropy>{Shuffled{3}, {}}) == "ok");
    CHECK(broken(AllOf{Balance<OfId<PerToken>, LocalEntropy>{OfId<PerToken>(1), {}},
                       Balance<OfId<Sequence>, GlobalEntropy>{OfId<Sequence>(1), {}},
                       Balance<OfId<Synchronized>, LoadBalancingLoss>{OfId<Synchronized>(0), {}}}) == "ok");
    CHECK(broken(mutual_information_loss<MicroBatch>(0.5)) == "ok");
    CHECK(broken(QuantileBalance{}) == "ok");
    CHECK(broken(Scheduled<QuantileBalance, SmoothLoadLoss>{3, {{}, {.score = Score::softmax, .memory = 0.5}}, {}}) ==
          "ok");
}

TEST_CASE("a policy that breaks a law is told which") {
    CHECK(first_broken(Balance<Synchronized, DriftingBias>{}) == "law 1");
    CHECK(first_broken(Balance<MicroBatch, WrongSlope>{}) == "law 2");
    CHECK(first_broken(Balance<PerToken, WrongTokenGradient>{}) == "law 2");
    CHECK(first_broken(Balance<MicroBatch, WrongMeanSlope>{{}, {{1.0}}}) == "law 2");
    CHECK(first_broken(Balance<Synchronized, WrongMeanSlope>{{}, {{1.0}}}) == "law 2");
    CHECK(first_broken(IgnoresScale{}) == "law 3");
    CHECK(first_broken(CountsAgain{}) == "law 4");
    CHECK(first_broken(EndsAgain{}) == "law 5");
    CHECK(first_broken(PullsAtPadding{}) == "law 6");
    CHECK(first_broken(DividesByOwnTokens{}) == "law 7");
    CHECK(first_broken(SilentTalker{}) == "law 8");
    CHECK(first_broken(Balance<Synchronized, InfiniteBias>{}) == "law 9");
}

TEST_CASE("a broken law inside a composition is found as well") {
    CHECK(first_broken(AllOf{MicroBatchLoss{}, EndsAgain{}}) == "law 5");
    CHECK(first_broken(Scheduled<MicroBatchLoss, CountsAgain>{2, {}, {}}) == "law 4");
}
