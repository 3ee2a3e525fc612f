// The laws of a balance policy, as a test that anyone can run on a policy, scope or objective of their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "steelyard/balance/policy.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/core/random.hpp"

namespace steelyard {

namespace detail {

/// One rank's made-up routing, with everything a policy needs around it.
template <class Device, class B>
class BalanceTrial {
public:
    BalanceTrial(const Device& device, const B& policy, const LayerShape& shape, int top_k, std::uint64_t seed)
        : device_(device),
          policy_(policy),
          shape_(shape),
          top_k_(top_k),
          routing_memory_(bytes_of<Routing<double>>(shape.tokens, shape.experts, index_t{top_k}, smooth)),
          grad_memory_(bytes_of<RoutingGrad<double>>(shape.tokens, shape.experts, index_t{top_k}, smooth)),
          state_memory_(bytes_of<State>(policy, shape)),
          record_memory_(bytes_of<Record>(policy, shape)),
          scratch_(balance_ops<Device>::scratch_bytes(device, shape)),
          mask_(static_cast<std::size_t>(shape.tokens), 1),
          ids_(static_cast<std::size_t>(shape.tokens)),
          words_(static_cast<std::size_t>(std::max(policy.wire_words(shape), policy.step_words(shape)) + 1)) {
        seen.routing =
            place<Routing<double>>(routing_memory_.data(), shape.tokens, shape.experts, index_t{top_k}, smooth);
        grad = place<RoutingGrad<double>>(grad_memory_.data(), shape.tokens, shape.experts, index_t{top_k}, smooth);
        for (std::size_t t = 0; t < ids_.size(); ++t) ids_[t] = static_cast<std::int32_t>(t % 2);
        seen.tokens.ids = view<const std::int32_t, 1>(ids_.data(), shape.tokens);
        state = place<State>(state_memory_.data(), policy, shape);
        record = place<Record>(record_memory_.data(), policy, shape);
        route(seed);
        policy.init(state);
    }

    /// Random logits, their softmax, the top_k of them with renormalised weights, and a smooth load of any kind.
    void route(std::uint64_t seed) {
        const Philox random(seed, Stream::user);
        const auto logits = seen.routing.logits, probs = seen.routing.probs;  // [T, E]
        const auto expert = seen.routing.expert;                              // [T, K]
        const auto weight = seen.routing.weight;                              // [T, K]
        const auto smooth_load = seen.routing.smooth_load;                    // [T, E] or nothing
        for (index_t i = 0; i < logits.size(); ++i) logits.data[i] = random.normal(static_cast<std::uint64_t>(i));
        for (index_t i = 0; i < smooth_load.size(); ++i)
            smooth_load.data[i] = random.uniform(static_cast<std::uint64_t>(logits.size() + i));
        std::vector<expert_t> order(static_cast<std::size_t>(shape_.experts));
        for (index_t t = 0; t < shape_.tokens; ++t) {
            double sum = 0.0;
            for (index_t e = 0; e < shape_.experts; ++e) sum += std::exp(logits(t, e));
            for (index_t e = 0; e < shape_.experts; ++e) {
                probs(t, e) = std::exp(logits(t, e)) / sum;
                order[static_cast<std::size_t>(e)] = static_cast<expert_t>(e);
            }
            std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return probs(t, a) > probs(t, b); });
            double chosen = 0.0;
            for (index_t k = 0; k < top_k_; ++k) chosen += probs(t, order[static_cast<std::size_t>(k)]);
            for (index_t k = 0; k < top_k_; ++k) {
                expert(t, k) = order[static_cast<std::size_t>(k)];
                weight(t, k) = probs(t, expert(t, k)) / chosen;
            }
        }
        seen.valid_tokens = shape_.tokens;
        tokens_of_rank_ = seen.valid_tokens;
        seen.tokens_of_rank = view<const std::int64_t, 1>(&tokens_of_rank_, 1);
    }

    /// Every `period`-th token becomes padding.
    void pad(index_t period) {
        seen.valid_tokens = 0;
        for (index_t t = 0; t < shape_.tokens; ++t) {
            const bool valid = (t + 1) % period != 0;
            mask_[static_cast<std::size_t>(t)] = valid;
            seen.valid_tokens += valid;
            for (index_t k = 0; k < top_k_ && !valid; ++k) seen.routing.expert(t, k) = -1;
        }
        seen.tokens.mask = view<const std::uint8_t, 1>(mask_.data(), shape_.tokens);
        tokens_of_rank_ = seen.valid_tokens;
    }

    /// One forward of one rank: the sum over the data group is the rank's own words.
    double observe() {
        Wire<> out(words()), in(words());
        policy_.observe(device_, seen, state, record, scratch_.data());
        policy_.post(seen, state, record, out);
        policy_.conclude(seen, state, record, in);
        return policy_.loss(record, seen.tokens.step);
    }

    void differentiate() {
        std::fill_n(grad_memory_.data(), grad_memory_.size(), std::byte{0});
        policy_.gradient(device_, seen, record, grad, scratch_.data());
    }

    void end_step(std::int64_t step) {
        Wire<> out(words()), in(words());
        policy_.collect_step(state, step, out);
        policy_.end_step(state, step, in);
    }

    /// body(name, a tensor of the routing, its gradient) for everything that a loss may depend on.
    template <class Body>
    void each_tensor(Body&& body) const {
        body("probs", seen.routing.probs, grad.probs);
        body("logits", seen.routing.logits, grad.logits);
        body("weight", seen.routing.weight, grad.weight);
        body("smooth_load", seen.routing.smooth_load, grad.smooth_load);
    }
    /// All gradients in one run.
    [[nodiscard]] std::vector<double> gradient() const {
        std::vector<double> all;
        each_tensor([&](const char*, const auto&, const auto& g) { all.insert(all.end(), g.data, g.data + g.size()); });
        return all;
    }

    [[nodiscard]] std::vector<std::byte> state_bytes() const { return copy(state_memory_); }
    void restore(const std::vector<std::byte>& bytes) { std::copy(bytes.begin(), bytes.end(), state_memory_.data()); }
    [[nodiscard]] std::vector<std::byte> record_bytes() const { return copy(record_memory_); }

    using State = typename B::template State<>;
    using Record = typename B::template Record<>;
    static constexpr bool smooth = BalanceTraits<B>::needs_smooth_load;
    Observation<double> seen;
    RoutingGrad<double> grad;
    State state;
    Record record;

private:
    view<std::int64_t, 1> words() { return {words_.data(), static_cast<index_t>(words_.size())}; }
    static std::vector<std::byte> copy(const Bytes& bytes) { return {bytes.data(), bytes.data() + bytes.size()}; }

    Device device_;
    B policy_;
    LayerShape shape_;
    int top_k_;
    Bytes routing_memory_, grad_memory_, state_memory_, record_memory_, scratch_;
    std::vector<std::uint8_t> mask_;
    std::vector<std::int32_t> ids_;
    std::vector<std::int64_t> words_;
    std::int64_t tokens_of_rank_ = 0;
};

inline Status broken_law(int law, std::string expected, std::string came) {
    return Status::refuse(Code::invalid_argument, "balance.laws", "law " + std::to_string(law), std::move(expected),
                          std::move(came));
}

}  // namespace detail

/// Runs a balance policy on made-up routings and answers with the first law that it breaks:
///
/// 1. a step that nothing was observed in can be ended, and changes no bias;
/// 2. the gradient by every probability, logit, weight and smooth load is the derivative of the loss, the choices and
///    the loads of the past held fixed;
/// 3. the gradient is linear in `StepInfo::grad_scale`, and inversely so in `total_tokens`;
/// 4. observing one (step, micro_step) again leaves state and record as they are;
/// 5. ending a step again leaves the state as it is;
/// 6. padding takes no part: its probabilities have no gradient and change no loss;
/// 7. a call without valid tokens has loss 0 and a finite gradient of 0;
/// 8. a policy that does not communicate has no words for the wire;
/// 9. a selection bias, where the step has one, is finite and has one value for each expert.
///
/// `shape` should be small (tokens * experts gradients are taken by differences), with at least two steps' memory of
/// micro-steps if the policy uses them. Tokens have the ids 0 and 1 in turn. Needs the device's balance operations,
/// e.g. steelyard/cpu/balance.hpp.
template <class Device, BalancePolicy B>
Status check_balance_laws(const Device& device, const B& policy, const LayerShape& shape, int top_k,
                          double tolerance = 1e-6) {
    using detail::broken_law;
    using Trial = detail::BalanceTrial<Device, B>;
    if (!B::communicates && policy.wire_words(shape) != 0)
        return broken_law(8, "no words on the wire", std::to_string(policy.wire_words(shape)));

    Trial trial(device, policy, shape, top_k, 1);
    trial.end_step(0);
    if constexpr (B::has_bias) {
        const auto bias = policy.selection_bias(trial.state, {});
        for (index_t e = 0; bias.present() && e < bias.extents[0]; ++e)
            if (bias[e] != 0.0f) return broken_law(1, "a bias of 0 after an empty step", std::to_string(bias[e]));
    }

    // A step of the past, so that windows have something to show; then the step that is looked at.
    StepInfo& at = trial.seen.tokens.step;
    at.step = 1;
    trial.route(2);
    trial.observe();
    trial.end_step(1);
    const auto ended = trial.state_bytes();
    trial.end_step(1);
    if (trial.state_bytes() != ended) return broken_law(5, "the same state after ending a step again", "another state");
    if constexpr (B::has_bias) {
        const auto bias = policy.selection_bias(trial.state, at);
        if (bias.present() && bias.extents[0] != shape.experts)
            return broken_law(9, "a bias for each of " + std::to_string(shape.experts) + " experts",
                              std::to_string(bias.extents[0]));
        for (index_t e = 0; bias.present() && e < shape.experts; ++e)
            if (!std::isfinite(bias[e])) return broken_law(9, "finite biases", std::to_string(bias[e]));
    }

    at.step = 2;
    trial.route(3);
    const auto before = trial.state_bytes();
    trial.observe();
    const auto state = trial.state_bytes(), record = trial.record_bytes();
    trial.observe();
    if (trial.state_bytes() != state || trial.record_bytes() != record)
        return broken_law(4, "the same state and record after observing again", "others");

    trial.differentiate();
    const std::vector<double> gradient = trial.gradient();
    std::size_t tensor_begin = 0;
    Status derivative;
    trial.each_tensor([&](const char* name, const auto& values, const auto&) {
        constexpr double h = 1e-5;
        for (index_t i = 0; derivative.ok() && i < values.size(); ++i) {
            const double kept = values.data[i];
            const auto loss_at = [&](double value) {
                trial.restore(before);  // what a scope remembers of this very call moves along
                values.data[i] = value;
                return trial.observe();
            };
            const double above = loss_at(kept + h), below = loss_at(kept - h);
            values.data[i] = kept;
            const double difference = (above - below) / (2 * h);
            const double given = gradient[tensor_begin + static_cast<std::size_t>(i)];
            if (!(std::abs(difference - given) <= tolerance * (1.0 + std::abs(difference))))
                derivative = broken_law(
                    2,
                    std::string("d loss / d ") + name + "[" + std::to_string(i) + "] = " + std::to_string(difference),
                    std::to_string(given));
        }
        tensor_begin += static_cast<std::size_t>(values.size());
    });
    if (!derivative) return derivative;

    trial.restore(before);
    trial.observe();
    for (const double factor : {2.0, 0.25}) {
        at.grad_scale = factor >= 1 ? factor : 1.0;
        at.total_tokens = factor >= 1 ? 0 : static_cast<std::int64_t>(static_cast<double>(shape.tokens) / factor);
        trial.observe();
        trial.differentiate();
        const std::vector<double> scaled = trial.gradient();
        for (std::size_t i = 0; i < scaled.size(); ++i)
            if (!(std::abs(scaled[i] - factor * gradient[i]) <= 1e-12 * (1.0 + std::abs(gradient[i]))))
                return broken_law(3, std::to_string(factor * gradient[i]), std::to_string(scaled[i]));
    }
    at.grad_scale = 1.0;
    at.total_tokens = 0;

    at.step = 3;
    trial.pad(3);
    const double padded = trial.observe();
    trial.differentiate();
    Status padding;
    trial.each_tensor([&](const char*, const auto& values, const auto& g) {
        for (index_t t = 2; t < values.extents[0]; t += 3)
            for (index_t i = 0; i < values.extents[1]; ++i) {
                if (g(t, i) != 0.0) padding = broken_law(6, "no gradient for padding", std::to_string(g(t, i)));
                values(t, i) = 100.0;
            }
    });
    if (!padding) return padding;
    if (trial.observe() != padded) return broken_law(6, "a loss that padding does not change", "another loss");

    at.step = 4;
    trial.pad(1);
    const double nothing = trial.observe();
    trial.differentiate();
    bool zero = nothing == 0.0;
    for (const double g : trial.gradient()) zero = zero && g == 0.0;
    if (!zero) return broken_law(7, "loss and gradient 0 without tokens", std::to_string(nothing));
    return {};
}

}  // namespace steelyard
