// What a device does for routers. Routers are values; every kernel they need is declared here.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "steelyard/core/random.hpp"
#include "steelyard/core/routing.hpp"

namespace steelyard {

/// s = softmax(z) over all experts, or s = sigmoid(z) for each expert alone.
enum class Score { softmax, sigmoid };

/// Combine weights of the chosen experts: their scores as they are, or divided by their sum.
///
/// `renormalized` with `Score::softmax` is the softmax over the chosen logits, so "softmax after
/// selection" and "softmax, select, renormalise" are one rule, not two.
enum class GateWeight { score, renormalized };

/// How a group of experts is ranked in group-limited selection: its best expert (DeepSeek-V2), or the
/// sum of its two best (DeepSeek-V3). Both see the selection bias.
enum class GroupScore { max, top2_sum };

/// Everything that turns a row of logits into choices and weights.
struct SelectionRule {
    int top_k = 1;
    Score score = Score::softmax;
    GateWeight weight = GateWeight::score;
    double scale = 1.0;   ///< routed scaling factor: multiplies the weights
    int groups = 1;       ///< n_group: experts in equal contiguous groups
    int kept_groups = 1;  ///< topk_group: only experts of the best groups may be chosen
    GroupScore group_score = GroupScore::max;

    friend bool operator==(const SelectionRule&, const SelectionRule&) = default;
};

/// Noise on the router's input and output, a pure function of the token's position in the step.
///
/// One draw of the generator serves four neighbouring elements: element j of the token at `position`
/// takes entry j % 4 of block j / 4, for every device.
struct RouterNoise {
    double jitter = 0.0;  ///< inputs times uniform(1 - jitter, 1 + jitter), element by element (Switch)
    double noise = 0.0;   ///< logits plus noise * N(0, 1)
    std::uint64_t seed = 0;
    StepInfo step;
    std::uint32_t layer = 0;

    [[nodiscard]] bool active() const { return jitter != 0.0 || noise != 0.0; }
    [[nodiscard]] constexpr Philox jitter_stream() const {
        return {seed, Stream::jitter, static_cast<std::uint64_t>(step.step), layer};
    }
    [[nodiscard]] constexpr Philox noise_stream() const {
        return {seed, Stream::noise, static_cast<std::uint64_t>(step.step), layer};
    }

    /// Position in the step's global batch of token t of this call.
    [[nodiscard]] constexpr std::uint64_t position(index_t t) const {
        return static_cast<std::uint64_t>(step.token_offset + t);
    }

    /// Where in a stream the block of four is that begins with `element` of token t of this call.
    [[nodiscard]] constexpr std::uint64_t block(index_t t, index_t elements, index_t element) const {
        return position(t) * blocks(elements) + static_cast<std::uint64_t>(element / 4);
    }

    /// Blocks of four that a row of `elements` takes.
    [[nodiscard]] static constexpr std::uint64_t blocks(index_t elements) {
        return (static_cast<std::uint64_t>(elements) + 3) / 4;
    }

    /// The factors of inputs 4 * block to 4 * block + 3 of a token of `width` inputs.
    [[nodiscard]] constexpr std::array<double, 4> jitter_factors(const Philox& stream, std::uint64_t position,
                                                                 std::uint64_t block, index_t width) const {
        const auto words = stream.words(position * blocks(width) + block);
        std::array<double, 4> factors{};
        for (int i = 0; i < 4; ++i) {
            const double unit = (static_cast<double>(words[i]) + 0.5) * 0x1.0p-32;  // in (0, 1)
            factors[i] = 1.0 + jitter * (2.0 * unit - 1.0);
        }
        return factors;
    }

    /// What is added to logits 4 * block to 4 * block + 3 of a token of `experts` logits (Box and Muller). A template,
    /// so that it may be constexpr, and thereby every device's, although the functions of <cmath> are not.
    template <class Real = double>
    [[nodiscard]] constexpr std::array<Real, 4> logit_noise(const Philox& stream, std::uint64_t position,
                                                            std::uint64_t block, index_t experts) const {
        const auto words = stream.words(position * blocks(experts) + block);
        std::array<Real, 4> added{};
        for (int i = 0; i < 4; i += 2) {
            const Real unit = (static_cast<double>(words[i]) + 0.5) * 0x1.0p-32;  // in (0, 1): the logarithm is finite
            const Real radius = noise * std::sqrt(-2.0 * std::log(unit));
            const Real angle = 6.283185307179586476925 * 0x1.0p-32 * static_cast<double>(words[i + 1]);
            added[i] = radius * std::cos(angle);
            added[i + 1] = radius * std::sin(angle);
        }
        return added;
    }
};

/// Router kernels of a device. Specialised in the device's own folder; a specialisation provides, for
/// T in {float, double}, as static functions (all results independent of the number of threads):
///
///  index_t scratch_bytes<T>(device, shape)
///      bytes of `scratch` that the calls below need, aligned to `layout_alignment`.
///  void logits<T>(device, x[T,d], weight[E,d], noise, logits[T,E] (=), scratch)
///      logits = (x * jitter) weight^T + noise * N(0,1).
///  void add_bias<T>(device, bias[E], logits[T,E] (+=))
///      logits[t] += bias.
///  index_t select<T>(device, rule, bias[E] or absent, mask or absent, routing (logits in; rest =), scratch)
///      Chooses the top_k of s + bias (in allowed groups), value descending, then index ascending. The
///      bias never enters the weights. Masked tokens: expert -1, weight 0, probs 0. Returns the first valid
///      token whose logits are not all finite, or -1; such a row still gets distinct experts (a NaN ranks last).
///      Without a bias the order is that of the logits themselves, so scores that underflow or saturate keep
///      their order. With a bias, s + bias is rounded to T: scores closer than that rounding tie.
///  index_t weigh<T>(device, rule, mask or absent, routing (logits, expert in; probs, weight =), scratch)
///      The second half of `select`, for routers that choose in another way: probs and weights of the experts that
///      are already there, of which some may be -1 (weight 0). Masked tokens are set as in `select`. Returns as select.
///  void take_all<T>(device, mask or absent, routing (=))
///      No router at all: every valid token takes all experts with weight 1, logits 0 and probs 1 / E.
///  void select_backward<T>(device, rule, mask, routing, grad (weight, probs in, either may be absent; logits +=))
///      dlogits += d(weights)/dlogits . dweight + d(probs)/dlogits . dprobs, whoever chose the experts; a choice of -1
///      has no gradient. Masked rows of grad.logits are set to 0, whatever was in them.
///  void logits_backward<T>(device, x, mask, weight, noise, dlogits[T,E], dx[T,d] (+=) or absent,
///                          dweight[E,d] (+=) or absent, scratch)
///      dlogits is 0 in masked rows; the masked rows of x are never read, so padding may hold anything.
///  void bias_backward<T>(device, dlogits[T,E], dbias[E] (+=))
///      dbias += sum over tokens of dlogits, which is 0 in masked rows.
template <class Device>
struct router_ops;

}  // namespace steelyard
