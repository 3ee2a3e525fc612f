#include "steelyard/cuda/balance.hpp"

#include <doctest/doctest.h>

#include <algorithm>

#include "cuda/device_memory.hpp"
#include "steelyard/balance/entropy.hpp"
#include "steelyard/balance/z_loss.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/balance.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::Pinned;
using gpu::Tensor;
using ops = balance_ops<Cuda>;

namespace {

/// A routing of random numbers with its tokens, seen from either side.
struct Seen {
    index_t tokens, experts, top_k, segments;
    Host<float> logits, probs, weight, smooth;
    Host<expert_t> expert;
    Host<std::uint8_t> mask;
    Host<std::int32_t> ids;
    Host<index_t> sequences;
    Tensor<float> gpu_logits, gpu_probs, gpu_weight, gpu_smooth;
    Tensor<expert_t> gpu_expert;
    Tensor<std::uint8_t> gpu_mask;
    Tensor<std::int32_t> gpu_ids;
    Tensor<index_t> gpu_sequences;
    bool masked, with_ids;
    std::int64_t valid = 0;

    Seen(index_t t, index_t e, index_t k, index_t s, bool is_masked, bool is_labelled)
        : tokens(t),
          experts(e),
          top_k(k),
          segments(s),
          logits(gpu::random<float>(t, e, 1, 3.0)),
          probs(gpu::random<float>(t, e, 2, 0.1)),
          weight(gpu::random<float>(t, k, 3)),
          smooth(gpu::random<float>(t, e, 4)),
          expert(chosen(t, e, k)),
          mask(flags(t)),
          ids(labels(t)),
          sequences(cuts(t, s)),
          gpu_logits(logits, 2),
          gpu_probs(probs, 1),
          gpu_weight(weight),
          gpu_smooth(smooth, 3),
          gpu_expert(expert, 1),
          gpu_mask(mask),
          gpu_ids(ids),
          gpu_sequences(sequences),
          masked(is_masked),
          with_ids(is_labelled) {
        for (index_t i = 0; i < t; ++i) valid += !masked || mask(0, i) != 0;
    }

    Observation<float> host() {
        Observation<float> seen;
        seen.routing = {logits.get(), probs.get(), expert.get(), weight.get(), smooth.get()};
        if (masked) seen.tokens.mask = mask.line();
        if (with_ids) seen.tokens.ids = ids.line(), seen.only_id = 1;
        if (segments > 1) seen.tokens.sequences = sequences.line();
        seen.valid_tokens = valid;
        return seen;
    }
    [[nodiscard]] Observation<float, CudaSpace> on_gpu() const {
        Observation<float, CudaSpace> seen;
        seen.routing = {gpu_logits.get(), gpu_probs.get(), gpu_expert.get(), gpu_weight.get(), gpu_smooth.get()};
        if (masked) seen.tokens.mask = gpu_mask.line();
        if (with_ids) seen.tokens.ids = gpu_ids.line(), seen.only_id = 1;
        if (segments > 1) seen.tokens.sequences = gpu_sequences.line();
        seen.valid_tokens = valid;
        return seen;
    }
    [[nodiscard]] LayerShape shape() const {
        return {.tokens = tokens, .width = 1, .experts = experts, .sequences = segments + 1};
    }

private:
    static Host<expert_t> chosen(index_t t, index_t e, index_t k) {
        Host<expert_t> all(t, k);
        for (index_t i = 0; i < t; ++i)
            for (index_t j = 0; j < k; ++j) all(i, j) = (i + j) % 5 == 4 ? -1 : static_cast<expert_t>((i * i + j) % e);
        return all;
    }
    static Host<std::uint8_t> flags(index_t t) {
        Host<std::uint8_t> all(1, t);
        for (index_t i = 0; i < t; ++i) all(0, i) = i % 4 != 1 ? 1 : 0;
        return all;
    }
    static Host<std::int32_t> labels(index_t t) {
        Host<std::int32_t> all(1, t);
        for (index_t i = 0; i < t; ++i) all(0, i) = static_cast<std::int32_t>(i % 3);
        return all;
    }
    /// Sequences of unequal length, of which the second is empty.
    static Host<index_t> cuts(index_t t, index_t s) {
        Host<index_t> all(1, s + 1);
        for (index_t i = 0; i <= s; ++i) all(0, i) = i == 2 ? all(0, 1) : t * i * i / (s * s);
        return all;
    }
};

template <class Body>
void each_case(Body&& body) {
    struct Sizes {
        index_t experts, top_k;
    };
    for (const index_t tokens : {0, 1, 31, 33, 256, 1000})
        for (const Sizes n : {Sizes{1, 1}, {3, 2}, {8, 8}, {160, 4}, {512, 2}})
            for (const index_t segments : {1, 5})
                for (const bool masked : {false, true})
                    for (const bool labelled : {false, true}) {
                        CAPTURE(tokens);
                        CAPTURE(n.experts);
                        CAPTURE(segments);
                        CAPTURE(masked);
                        CAPTURE(labelled);
                        Seen seen(tokens, n.experts, n.top_k, segments, masked, labelled);
                        body(seen);
                    }
}

CudaBytes scratch_of(const Seen& seen) { return gpu::scratch(ops::scratch_bytes(gpu::device(), seen.shape())); }
Bytes host_scratch_of(const Seen& seen) { return Bytes(balance_ops<Cpu>::scratch_bytes(Cpu{}, seen.shape()) + 4096); }

template <class Tally>
void check_counts(Seen& seen, index_t rows) {
    const CudaBytes scratch = scratch_of(seen);
    const Bytes host_scratch = host_scratch_of(seen);
    Host<std::int64_t> want(rows, seen.experts + 1, -1);
    balance_ops<Cpu>::count<float>(Cpu{}, seen.host(), want.get(), Tally{}, host_scratch.data());
    const Pinned<std::int64_t> load(rows, seen.experts + 1);
    ops::count<float>(gpu::device(), seen.on_gpu(), load.get(), Tally{}, scratch.data());
    gpu::finish();
    REQUIRE(load.host().same(want));
}

template <class Tally>
void check_drawn(Seen& seen) {
    const CudaBytes scratch = scratch_of(seen);
    const Bytes host_scratch = host_scratch_of(seen);
    // The second of three ranks.
    const TokenDraw draw{Philox(3, Stream::shuffle, 5), 3 * seen.valid + 700, seen.valid + 300, 500};
    Host<std::int64_t> want(1, seen.experts + 1, -1);
    balance_ops<Cpu>::count_drawn<float>(Cpu{}, seen.host(), draw, want.get(), Tally{}, host_scratch.data());
    const Pinned<std::int64_t> load(1, seen.experts + 1);
    ops::count_drawn<float>(gpu::device(), seen.on_gpu(), draw, load.get(), Tally{}, scratch.data());
    gpu::finish();
    REQUIRE(load.host().same(want));
}

/// Histograms of shortfalls. Sigmoids of the two devices differ in their last bits, so that a token may fall into the
/// next bin: the histograms up to each bin are compared.
void check_shortfalls(Seen& seen, index_t rows, Score score, index_t bins) {
    const CudaBytes scratch = scratch_of(seen);
    const Bytes host_scratch = host_scratch_of(seen);
    const Pinned<float> bias(1, seen.experts);
    for (index_t e = 0; e < seen.experts; ++e) bias.get()(0, e) = 0.01f * static_cast<float>(e % 7 - 3);
    const Shortfalls<> tally{score, bias.line(), bins};
    const index_t words = seen.experts * bins + 1;
    Host<std::int64_t> want(rows, words, -1);
    balance_ops<Cpu>::count<float>(Cpu{}, seen.host(), want.get(), tally, host_scratch.data());
    const Pinned<std::int64_t> load(rows, words);
    ops::count<float>(gpu::device(), seen.on_gpu(), load.get(), tally, scratch.data());
    gpu::finish();
    const Host<std::int64_t> got = load.host();
    std::int64_t off = 0;
    for (index_t s = 0; s < rows; ++s) {
        REQUIRE(got(s, words - 1) == want(s, words - 1));  // choices
        for (index_t e = 0; e < seen.experts; ++e) {
            std::int64_t below = 0;
            for (index_t b = 0; b < bins; ++b) {
                REQUIRE(got(s, e * bins + b) >= 0);
                below += got(s, e * bins + b) - want(s, e * bins + b);
                off += std::abs(below);
            }
            REQUIRE(below == 0);  // every token is in some bin
        }
    }
    const double numbers = static_cast<double>(seen.tokens * seen.experts);
    REQUIRE(static_cast<double>(off) <= (score == Score::softmax ? 0.0 : 1e-4 * numbers + 2.0));
}

template <Quantity Q>
void check_sums(Seen& seen, index_t rows) {
    const CudaBytes scratch = scratch_of(seen);
    const Bytes host_scratch = host_scratch_of(seen);
    Host<double> want(rows, seen.experts);
    Host<std::int64_t> want_own(1, rows);
    balance_ops<Cpu>::sum_quantity<float, Q>(Cpu{}, seen.host(), want.get(), want_own.line(), host_scratch.data());
    Host<double> first(0, 0);
    for (int run = 0; run < 2; ++run) {
        const Pinned<double> sums(rows, seen.experts);
        const Pinned<std::int64_t> own(1, rows);
        ops::sum_quantity<float, Q>(gpu::device(), seen.on_gpu(), sums.get(), own.line(), scratch.data());
        gpu::finish();
        REQUIRE(own.host().same(want_own));
        const Host<double> got = sums.host();
        for (index_t s = 0; s < rows; ++s)
            for (index_t e = 0; e < seen.experts; ++e)
                REQUIRE(std::abs(got(s, e) - want(s, e)) <= 1e-12 * static_cast<double>(seen.tokens + 1));
        if (run == 0) first = got;
        REQUIRE(got.same(first));
    }

    // The gradient, with slopes that the host has written.
    const Pinned<double> slopes(rows, seen.experts);
    const Host<double> numbers = gpu::random<double>(rows, seen.experts, 11);
    std::copy_n(numbers.data.begin(), rows * seen.experts, slopes.get().data);
    const index_t columns = Q == Quantity::gates ? seen.top_k : seen.experts;
    Host<float> gradient = gpu::random<float>(seen.tokens, columns, 12);
    const Tensor<float> on_gpu(gradient, 1);
    RoutingGrad<float> grad;
    RoutingGrad<float, CudaSpace> gpu_grad;
    (Q == Quantity::probs ? grad.probs : Q == Quantity::gates ? grad.weight : grad.smooth_load) = gradient.get();
    (Q == Quantity::probs   ? gpu_grad.probs
     : Q == Quantity::gates ? gpu_grad.weight
                            : gpu_grad.smooth_load) = on_gpu.get();
    balance_ops<Cpu>::add_quantity_gradient<float, Q>(Cpu{}, seen.host(), slopes.get(), 0.37, grad,
                                                      host_scratch.data());
    ops::add_quantity_gradient<float, Q>(gpu::device(), seen.on_gpu(), slopes.get(), 0.37, gpu_grad, scratch.data());
    gpu::finish();
    REQUIRE(on_gpu.host().same(gradient));
}

template <class Objective>
void check_objective(Seen& seen, const Objective& objective) {
    const CudaBytes scratch = scratch_of(seen);
    const Bytes host_scratch = host_scratch_of(seen);
    Seen& all = seen;
    Observation<double> wide;
    Host<double> logits = all.logits.as<double>();
    const Observation<float> narrow = all.host();
    wide.routing.logits = wide.routing.probs = logits.get();
    wide.routing.expert = narrow.routing.expert;
    wide.tokens = narrow.tokens;
    wide.only_id = narrow.only_id;
    wide.valid_tokens = narrow.valid_tokens;
    Host<double> want(1, 1);
    balance_ops<Cpu>::sum_tokens<double>(Cpu{}, wide, objective, want.line(), host_scratch.data());
    for (int run = 0; run < 2; ++run) {
        const Pinned<double> sum(1, 1);
        ops::sum_tokens<float>(gpu::device(), all.on_gpu(), objective, sum.line(), scratch.data());
        gpu::finish();
        gpu::require_close(sum.host(), want, 1e-5);
    }
    const Host<float> before = gpu::random<float>(all.tokens, all.experts, 21);
    Host<double> gradient = before.as<double>();
    const Tensor<float> on_gpu(before, 2);
    balance_ops<Cpu>::add_token_gradient<double>(Cpu{}, wide, objective, 0.25, gradient.get(), host_scratch.data());
    ops::add_token_gradient<float>(gpu::device(), all.on_gpu(), objective, 0.25, on_gpu.get(), scratch.data());
    gpu::finish();
    gpu::require_close(on_gpu.host(), gradient, 2e-5);
}

}  // namespace

TEST_CASE("loads are those of the CPU, integer by integer") {
    each_case([](Seen& seen) {
        // One row more than there are sequences.
        const index_t rows = seen.segments == 1 ? 1 : seen.segments + 1;
        check_counts<Choices>(seen, rows);
        check_counts<FixedSums<Quantity::probs>>(seen, rows);
        check_counts<FixedSums<Quantity::gates>>(seen, rows);
        check_counts<FixedSums<Quantity::smooth_load>>(seen, rows);
        if (seen.segments > 1) return;
        check_drawn<Choices>(seen);
        check_drawn<FixedSums<Quantity::probs>>(seen);
        check_drawn<FixedSums<Quantity::gates>>(seen);
    });
}

TEST_CASE("histograms of what experts lack to be chosen") {
    each_case([](Seen& seen) {
        if (seen.with_ids && seen.masked) return;  // few suffice
        const index_t rows = seen.segments == 1 ? 1 : seen.segments + 1;
        check_shortfalls(seen, rows, Score::sigmoid, 100);
        if (seen.segments == 1 && seen.experts < 100) check_shortfalls(seen, 1, Score::softmax, 9000);
    });
}

TEST_CASE("sums over tokens and their gradients") {
    each_case([](Seen& seen) {
        const index_t rows = seen.segments == 1 ? 1 : seen.segments + 1;
        check_sums<Quantity::probs>(seen, rows);
        check_sums<Quantity::gates>(seen, rows);
        check_sums<Quantity::smooth_load>(seen, rows);
    });
}

TEST_CASE("objectives on the logits of each token") {
    each_case([](Seen& seen) {
        if (seen.segments > 1) return;
        check_objective(seen, ZLoss{});
        check_objective(seen, LocalEntropy{});
    });
}
