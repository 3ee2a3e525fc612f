// The same bits for any number of threads, and for a layer that several threads share.
#include <doctest/doctest.h>

#include <thread>
#include <vector>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

using Losses = AllOf<SequenceLoss, BufferedLoss, RouterZLoss, LossFree>;
template <class T>
using Layer = MoE<T, TopK, WithShared<SwiGlu, Mlp>, Losses>;

template <class T>
typename Layer<T>::Config config(int threads) {
    return {.shape = {.tokens = 700, .width = 72, .experts = 9, .sequences = 4},
            .router = {.k = 3, .jitter = 0.1, .noise = 0.1},
            .expert = {SwiGlu{40}, Mlp{24, Activation::silu, true}},
            .balance = Losses{SequenceLoss{{}, {1.0}}, BufferedLoss{{}, {1.0}}, RouterZLoss{{}, {0.1}}, LossFree{}},
            .device = {.threads = threads}};
}

template <class T>
Batch<T> make_batch(std::uint64_t seed) {
    Batch<T> batch(700, 72, seed);
    batch.mask.assign(700, 1);
    for (std::size_t t = 0; t < 700; t += 11) batch.mask[t] = 0;
    batch.sequences = {0, 100, 377, 377, 700};
    return batch;
}

/// Everything that a forward and a backward leave.
template <class T>
struct Result {
    std::vector<T> y, dx, grads;
    double loss = 0;
    std::vector<std::byte> state;
    bool operator==(const Result& other) const {
        return same_bits(y, other.y) && same_bits(dx, other.dx) && same_bits(grads, other.grads) &&
               loss == other.loss && state == other.state;
    }
};

template <class T>
Result<T> run(Rig<Layer<T>>& rig, const Batch<T>& batch) {
    Result<T> result;
    rig.clear_grads();
    if (!rig.forward(batch) || !rig.backward(batch)) return result;
    result.loss = rig.balance_loss();
    if (!rig.end_step(0)) return result;
    result.y = rig.y, result.dx = rig.dx, result.state = rig.state_bytes();
    result.grads.assign(rig.grad_values().begin(), rig.grad_values().end());
    return result;
}

template <class T>
Result<T> run(int threads) {
    Rig<Layer<T>> rig(config<T>(threads));
    return run(rig, make_batch<T>(4));
}

template <class T>
void check_threads() {
    const Result<T> one = run<T>(1);
    REQUIRE_FALSE(one.grads.empty());
    for (const int threads : {1, 2, 3, 7}) {
        CAPTURE(threads);
        CHECK(run<T>(threads) == one);
    }
}

}  // namespace

TEST_CASE("a layer gives the same bits with 1, 2, 3 and 7 threads, and from run to run") {
    check_threads<float>();
    check_threads<double>();
}

TEST_CASE("threads share one layer, each with its own context and workspace") {
    constexpr std::uint64_t count = 3;
    const Layer<float> shared(config<float>(1));
    std::vector<Result<float>> alone(count), together(count);
    std::vector<std::unique_ptr<Rig<Layer<float>>>> rigs;
    for (std::uint64_t i = 0; i < count; ++i) {
        Rig<Layer<float>> rig(config<float>(1));
        alone[i] = run(rig, make_batch<float>(i));
        rigs.push_back(std::make_unique<Rig<Layer<float>>>(config<float>(1)));
    }
    {
        std::vector<std::jthread> threads;
        for (std::uint64_t i = 0; i < count; ++i)
            threads.emplace_back([&, i] {
                auto& rig = *rigs[i];
                const auto batch = make_batch<float>(i);
                auto forward = rig.forward_args(batch);
                forward.params = shared.read_only_params(rigs[0]->params);  // read by all
                auto backward = rig.backward_args(batch);
                backward.params = forward.params;
                auto& result = together[i];
                if (!shared.forward({}, forward) || !shared.backward(backward)) return;
                result.loss = shared.balance_loss(rig.context);
                if (!shared.end_step({}, 0, rig.state, rig.workspace)) return;
                result.y = rig.y, result.dx = rig.dx, result.state = rig.state_bytes();
                result.grads.assign(rig.grad_values().begin(), rig.grad_values().end());
            });
    }
    for (std::uint64_t i = 0; i < count; ++i) CHECK(together[i] == alone[i]);
}
