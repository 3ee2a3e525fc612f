// The formulas of docs/embedding.md for the memory of a layer.
#include <doctest/doctest.h>

#include "steelyard/steelyard.hpp"

namespace {

using namespace steelyard;

constexpr index_t d = 32, h = 48, E = 16;
constexpr int K = 4;

struct BytesPerToken {
    index_t context, workspace;
};

/// Bytes that one more token costs, from two sizes at which nothing is lost to alignment.
template <class Layer>
BytesPerToken per_token(const typename Layer::Config& config) {
    constexpr index_t few = 4096, many = 8192;
    typename Layer::Config large = config;
    large.shape.tokens = many;
    typename Layer::Config small = config;
    small.shape.tokens = few;
    const Layer a(small), b(large);
    return {(b.context_bytes() - a.context_bytes()) / (many - few),
            (b.workspace_bytes() - a.workspace_bytes()) / (many - few)};
}

template <class T, class RetentionT>
void check_swiglu() {
    const auto s = static_cast<index_t>(sizeof(T));
    const BytesPerToken came = per_token<MoE<T, TopK, SwiGlu, MicroBatchLoss, SelfComm, Dropless, RetentionT>>(
        {.shape = {.width = d, .experts = E}, .router = {.k = K}, .expert = {.hidden = h}});
    const index_t inner = 2 * h * K * s;
    CHECK(came.context == 1 + 2 * E * s + K * (12 + s) + (RetentionT::keeps ? inner : 0));
    CHECK(came.workspace == (2 * E + K) * s + K * (d + 3 * h) * s + (RetentionT::keeps ? 0 : inner));
}

}  // namespace

TEST_CASE("context and workspace grow by the documented bytes for each token") {
    check_swiglu<float, KeepActivations>();
    check_swiglu<double, KeepActivations>();
    check_swiglu<float, RecomputeActivations>();
    const BytesPerToken mlp = per_token<MoE<float, TopK, Mlp>>(
        {.shape = {.width = d, .experts = E}, .router = {.k = K}, .expert = {.hidden = h}});
    CHECK(mlp.context == 1 + 2 * E * 4 + K * (12 + 4) + h * K * 4);
    CHECK(mlp.workspace == (2 * E + K) * 4 + K * (d + 2 * h) * 4);
    const BytesPerToken shared = per_token<MoE<float, TopK, WithShared<SwiGlu, SwiGlu>>>(
        {.shape = {.width = d, .experts = E}, .router = {.k = K}, .expert = {.routed = {h}, .shared = {h}}});
    CHECK(shared.context == 1 + 2 * E * 4 + K * (12 + 4) + 2 * h * K * 4 + (12 + 3 * 4 + 2 * h * 4));
    CHECK(shared.workspace == (2 * E + K) * 4 + K * (d + 3 * h) * 4 + (3 * 4 + d * 4 + 3 * h * 4));
}

TEST_CASE("the state has the documented tensors, each rounded up to 64 bytes") {
    const auto up = [](index_t bytes) { return (bytes + 63) / 64 * 64; };
    const LayerShape shape{.tokens = 8, .width = d, .experts = E, .micro_steps = 3};
    const index_t log = up(3 * 8) + up(3 * (E + 1) * 8), row = up((E + 1) * 8), sums = up(3 * 8);
    const auto bytes = [&]<class Policy>(const Policy&) {
        return MoE<float, TopK, SwiGlu, Policy>({.shape = shape, .expert = {.hidden = h}}).state_bytes();
    };
    CHECK(bytes(MicroBatchLoss{}) == 0);
    CHECK(bytes(SequenceLoss{}) == 0);
    CHECK(bytes(RouterZLoss{}) == 0);
    CHECK(bytes(SynchronizedLoss{}) == 64 + sums + log + 64 + row);
    CHECK(bytes(BufferedLoss{}) == 64 + sums + log + 64 + row);
    CHECK(bytes(ShuffledLoss{}) == 64 + sums + log + 64 + row);
    CHECK(bytes(WindowedLoss<5>{}) == 64 + log + 64 + row + up(5 * (E + 1) * 8) + row);
    CHECK(bytes(LossFree{}) == 64 + sums + log + 64 + row + up(E * 4));
}

TEST_CASE("a bias that is moved by a window of one step needs one sum a step, and none in a forward") {
    using Quiet = Balance<Windowed<1>, LossFreeBias>;
    static_assert(!Quiet::communicates && Quiet::communicates_at_step_end && Quiet::has_bias);
    CHECK(Quiet{}.wire_words({.experts = E}) == 0);
    CHECK(Quiet{}.step_words({.experts = E}) == E + 1);
}
