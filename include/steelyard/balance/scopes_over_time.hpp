// Scopes that reach beyond one micro-step: buffered, windowed, shuffled.
#pragma once

#include "steelyard/balance/scope.hpp"

namespace steelyard {

/// How much of the optimizer step a buffer shows to each micro-step.
enum class Extent {
    prefix,  ///< micro-steps 0 .. m: the paper's algorithm 1. Only the last micro-step sees the whole batch
    whole,   ///< all micro-steps: exact, for a caller who passes over the batch twice (counts first, then trains)
};

namespace detail {

template <class Inner>
constexpr bool can_be_buffered() {
    static_assert(Inner::counts && !Inner::per_sequence,
                  "steelyard: Buffered takes a scope with one load for each call, such as Synchronized or MicroBatch");
    return true;
}

template <index_t Steps>
constexpr index_t steps_of_window() {
    static_assert(Steps >= 1, "steelyard: Windowed needs at least one step");
    return Steps;
}

}  // namespace detail

/// f over the accumulation steps so far (2501.11873, algorithm 1): c_i += (summed) counts, f from c.
///
/// `Inner` says how each micro-step counts. With one micro-step it equals `Inner`. Under `Extent::whole` the caller
/// runs every micro-step's forward once, then forward and backward again: the second pass is a replay that finds all
/// loads in the log, communicates nothing, and gives each token the gradient of the global batch.
template <Scope Inner = Synchronized, Extent extent = Extent::prefix>
struct Buffered : Inner {
    static constexpr bool remembers = detail::can_be_buffered<Inner>();

    template <class Space>
    constexpr void resolve(const StepInfo& at, const LoadLog<Space>& log, view<const std::int64_t, 1, Space>,
                           view<std::int64_t, 1, Space> load) const {
        log.sum(at.step, extent == Extent::prefix ? at.micro_step + 1 : log.step.extents[0], load);
    }
    friend bool operator==(const Buffered&, const Buffered&) = default;
};

/// f pooled over the last `Steps` optimizer steps of all ranks, one step stale: no communication while the layer runs.
///
/// Since f is fixed during a step, the gradient is the same however the step's batch is split. The first step has no
/// past: its load is empty and the loss is 0.
template <index_t Steps>
struct Windowed : ScopeDefaults {
    static constexpr bool remembers = true;
    static constexpr bool sums_step = true;
    static constexpr index_t window = detail::steps_of_window<Steps>();

    template <class Space>
    constexpr void resolve(const StepInfo&, const LoadLog<Space>&, view<const std::int64_t, 1, Space> past,
                           view<std::int64_t, 1, Space> load) const {
        for (index_t w = 0; w < load.extents[0]; ++w) load[w] = past[w];
    }
    friend bool operator==(const Windowed&, const Windowed&) = default;
};

/// f over a random sample of the micro-step's tokens of all ranks, as many as one rank has on average (2501.11873's
/// ablation): the token count of `MicroBatch` with the distribution of `Synchronized`.
///
/// Drawn without replacement, the same on every rank, anew for each (step, micro-step, layer).
struct Shuffled : ScopeDefaults {
    static constexpr bool communicates = true;
    static constexpr bool remembers = true;
    static constexpr bool needs_rank_tokens = true;
    std::uint64_t seed = 0;

    constexpr Shuffled() = default;
    constexpr explicit Shuffled(std::uint64_t stream_seed) : seed(stream_seed) {}

    template <class T, class Space>
    [[nodiscard]] TokenDraw draw(const Observation<T, Space>& seen) const {
        const StepInfo& at = seen.tokens.step;
        const index_t ranks = seen.tokens_of_rank.extents[0];
        // 2^20 micro-steps to a step: the two share one counter word of the stream.
        const auto when = (static_cast<std::uint64_t>(at.step) << 20) | static_cast<std::uint64_t>(at.micro_step);
        TokenDraw draw{Philox(seed, Stream::shuffle, when, seen.layer)};
        for (index_t r = 0; r < ranks; ++r) {
            if (r < seen.rank) draw.first += seen.tokens_of_rank[r];
            draw.population += seen.tokens_of_rank[r];
        }
        draw.drawn = (draw.population + ranks - 1) / ranks;
        return draw;
    }
    friend bool operator==(const Shuffled&, const Shuffled&) = default;
};

static_assert(Scope<Buffered<>> && Scope<Buffered<MicroBatch>> && Scope<Windowed<4>> && Scope<Shuffled>);

}  // namespace steelyard
