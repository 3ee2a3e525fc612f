// The contract of a Router as a test that anyone can run on their own router.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "steelyard/router/law_trial.hpp"

namespace steelyard {

namespace detail::router_laws {

inline Status broken(const std::string& law, std::string expected, std::string came) {
    return Status::refuse(Code::invalid_argument, "check_router_laws", law, std::move(expected), std::move(came));
}

inline std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    return text;
}

/// Contract 5: choices, masks, probabilities, ties.
template <class R, class Device>
Status check_choices(Trial<R, Device>& trial, const Outcome& out, bool noise_free) {
    const index_t E = trial.E, K = trial.K;
    for (index_t t = 0; t < trial.T; ++t) {
        const std::string token = " of token " + std::to_string(t);
        const expert_t* const expert = &out.expert[Outcome::size(t, K)];
        const double* const weight = &out.weight[Outcome::size(t, K)];
        const double* const probs = &out.probs[Outcome::size(t, E)];
        const double* const logits = &out.logits[Outcome::size(t, E)];
        double sum = 0.0;
        for (index_t e = 0; e < E; ++e) sum += probs[e];
        if (!trial.valid(t)) {
            for (index_t k = 0; k < K; ++k) {
                if (expert[k] != -1) return broken("choices" + token, "-1: it is masked", std::to_string(expert[k]));
                if (weight[k] != 0.0) return broken("weights" + token, "0: it is masked", number(weight[k]));
            }
            for (index_t e = 0; e < E; ++e)
                if (probs[e] != 0.0) return broken("probs" + token, "0: it is masked", number(probs[e]));
            continue;
        }
        if (!(std::abs(sum - 1.0) <= 1e-12)) return broken("probs" + token, "a sum of 1", number(sum));
        bool tied = true;
        for (index_t e = 1; e < E; ++e) tied = tied && logits[e] == logits[0];
        for (index_t k = 0; k < K; ++k) {
            if (expert[k] == -1 && weight[k] != 0.0)
                return broken("weights" + token, "0 where no expert is taken", number(weight[k]));
            if (expert[k] == -1) continue;
            if (expert[k] < 0 || expert[k] >= E)
                return broken("choices" + token, "experts below " + std::to_string(E), std::to_string(expert[k]));
            if (std::find(expert, expert + k, expert[k]) != expert + k)
                return broken("choices" + token, "distinct experts", std::to_string(expert[k]) + " twice");
            if (!std::isfinite(weight[k])) return broken("weights" + token, "finite numbers", number(weight[k]));
            if (!Trial<R, Device>::Traits::per_token || !Trial<R, Device>::Traits::learns) continue;  // their own order
            if (k > 0 && expert[k - 1] >= 0 && logits[expert[k]] == logits[expert[k - 1]] && expert[k] < expert[k - 1])
                return broken("ties" + token, "the lower index first",
                              std::to_string(expert[k - 1]) + " before " + std::to_string(expert[k]));
            if (noise_free && tied && k == 0 && expert[0] != 0)
                return broken("ties" + token, "expert 0 first where all logits are equal", std::to_string(expert[0]));
        }
    }
    return {};
}

/// Contract 5 and 7: bias, permutation, replay, evaluation, split batches.
template <class R, class Device>
Status check_purity(Trial<R, Device>& trial, const Outcome& out) {
    const index_t T = trial.T, E = trial.E, K = trial.K, d = trial.d;

    Outcome again = trial.outcome();
    if (Status s = trial.route(trial.x, trial.info, {}, again); !s) return s;
    if (!again.same_bits(out)) return broken("replay", "the same bits", "others");

    // Large steps from expert to expert decide every choice; twice as large decide the same.
    std::vector<float> bias(Outcome::size(1, E));
    Outcome once = trial.outcome(), twice = trial.outcome();
    for (index_t e = 0; e < E; ++e) bias[static_cast<std::size_t>(e)] = static_cast<float>(8 * ((e * 7) % E));
    if (Status s = trial.route(trial.x, trial.info, bias, once); !s) return s;
    for (float& b : bias) b *= 2.0f;
    if (Status s = trial.route(trial.x, trial.info, bias, twice); !s) return s;
    if (!Outcome::equal(once.probs, out.probs)) return broken("selection bias", "probs that do not see it", "others");
    for (index_t t = 0; t < T; ++t) {
        const auto from = static_cast<std::ptrdiff_t>(t * K), to = from + K;
        if (!std::equal(once.expert.begin() + from, once.expert.begin() + to, twice.expert.begin() + from)) continue;
        if (!std::equal(once.weight.begin() + from, once.weight.begin() + to, twice.weight.begin() + from))
            return broken("selection bias", "weights that do not see it", "others for token " + std::to_string(t));
    }

    // A masked row may hold anything.
    std::vector<double> padded = trial.x;
    for (index_t t = 0; t < T; ++t)
        if (!trial.valid(t)) std::fill_n(padded.begin() + t * d, d, std::nan(""));
    if (Status s = trial.route(padded, trial.info, {}, again); !s) return s;
    if (!again.same_bits(out)) return broken("masked tokens", "no effect of what their rows hold", "another routing");

    // Evaluation knows no step and no position, so it is also where tokens may change places.
    TokenInfo<> evaluate = trial.info;
    evaluate.mode = Mode::evaluate;
    Outcome still = trial.outcome(), later = trial.outcome();
    if (Status s = trial.route(trial.x, evaluate, {}, still); !s) return s;
    evaluate.step.step += 1;
    evaluate.step.token_offset += 17;
    if (Status s = trial.route(trial.x, evaluate, {}, later); !s) return s;
    if (!later.same_bits(still)) return broken("evaluation", "no noise", "a routing that depends on the step");

    if (!Trial<R, Device>::Traits::per_token) return {};
    std::vector<double> reversed(trial.x.size()), reversed_prior(trial.prior.size());
    std::vector<std::int32_t> reversed_ids(trial.ids.rbegin(), trial.ids.rend());
    std::vector<std::uint8_t> reversed_mask(trial.mask.rbegin(), trial.mask.rend());
    for (index_t t = 0; t < T; ++t) {
        std::copy_n(trial.x.begin() + t * d, d, reversed.begin() + (T - 1 - t) * d);
        if (!trial.prior.empty())
            std::copy_n(trial.prior.begin() + t * E, E, reversed_prior.begin() + (T - 1 - t) * E);
    }
    evaluate.mask = {reversed_mask.data(), T};
    evaluate.ids = {reversed_ids.data(), T};
    RouterInput<double> mirror = trial.input(reversed, evaluate);
    if (!trial.prior.empty()) mirror.prior = {reversed_prior.data(), T, E};
    if (Status s = trial.route(mirror, later); !s) return s;
    for (index_t t = 0; t < T; ++t)
        for (index_t k = 0; k < K; ++k) {
            const std::size_t at = Outcome::size(t, K) + static_cast<std::size_t>(k);
            const std::size_t mirrored = Outcome::size(T - 1 - t, K) + static_cast<std::size_t>(k);
            if (later.expert[mirrored] != still.expert[at] ||
                !(std::abs(later.weight[mirrored] - still.weight[at]) <= 1e-12))
                return broken("permuted tokens", "the permuted routing", "another for token " + std::to_string(t));
        }

    // Two calls on the halves draw what one call on the whole draws.
    const index_t half = T / 2;
    TokenInfo<> part = trial.info;
    part.mask = trial.info.mask.slice(half, T);
    part.ids = trial.info.ids.slice(half, T);
    part.sequences = {};
    part.step.token_offset += half;
    Outcome rest(T - half, E, K, Trial<R, Device>::Traits::has_smooth_load);
    const std::vector<double> second(trial.x.begin() + half * d, trial.x.end());
    if (Status s = trial.route(trial.input(second, part, {}, half), rest); !s) return s;
    for (std::size_t i = 0; i < rest.expert.size(); ++i) {
        const std::size_t at = Outcome::size(half, K) + i;
        if (rest.expert[i] != out.expert[at] || !(std::abs(rest.weight[i] - out.weight[at]) <= 1e-12))
            return broken("split batch", "the routing of the whole", "another in the second half");
    }
    return {};
}

/// Contract 9: finite differences of sum a.weight + b.probs + c.logits + s.smooth_load, and what accumulates.
template <class R, class Device>
Status check_gradient(Trial<R, Device>& trial, const Outcome& out) {
    const index_t T = trial.T, E = trial.E, K = trial.K, d = trial.d;
    const Philox stream(99, Stream::user);
    std::uint64_t at = 0;
    std::vector<double> a(Outcome::size(T, K)), b(Outcome::size(T, E)), c(b.size()), s(out.smooth_load.size());
    for (auto* of : {&a, &b, &c, &s})
        for (double& value : *of) value = 2.0 * stream.uniform(at++) - 1.0;
    for (index_t t = 0; t < T; ++t)
        if (!trial.valid(t)) std::fill_n(c.begin() + t * E, E, 0.0);

    using Params = typename Trial<R, Device>::Params;
    Outcome kept = out;
    std::vector<double> dprior(trial.prior.size());
    const Routing<double> routing = kept.routing(T, E, K);
    const auto backward = [&](const std::vector<double>& x, double start, std::vector<double>& dx,
                              const Params& grads) {
        std::vector<double> logits = c;
        const RoutingGrad<double> grad{
            {a.data(), T, K}, {b.data(), T, E}, {logits.data(), T, E}, {s.data(), s.empty() ? 0 : T, E}};
        std::fill(dx.begin(), dx.end(), start);
        RouterInputGrad<double> dinput{{dx.data(), T, d}};
        if (!dprior.empty()) dinput.prior = {dprior.data(), T, E};
        trial.router.template backward<double>(
            trial.device, read_only<typename Trial<R, Device>::ReadOnly>(trial.params, trial.router, trial.shape),
            trial.input(x, trial.info), routing, grad, dinput, grads, trial.scratch.data());
    };

    Bytes block(bytes_of<Params>(trial.router, trial.shape));
    Params grads = place<Params>(block.data(), trial.router, trial.shape);
    const auto zero = [](const std::string&, auto& tensor) { std::fill_n(tensor.data, tensor.size(), 0.0); };
    for_each_tensor(grads, zero, trial.router, trial.shape);
    std::vector<double> dx(trial.x.size()), again(trial.x.size()), padded = trial.x;
    for (index_t t = 0; t < T; ++t)
        if (!trial.valid(t)) std::fill_n(padded.begin() + t * d, d, std::nan(""));
    backward(padded, 0.0, dx, grads);
    const std::vector<double> first_dprior = dprior;
    backward(trial.x, 1.0, again, Params{});
    for (std::size_t i = 0; i < dx.size(); ++i)
        if (!(std::abs(again[i] - 1.0 - dx[i]) <= 1e-9 * (1.0 + std::abs(dx[i]))))
            return broken("backward with frozen parameters", "dx to be added to what was there", number(again[i]));
    for (index_t t = 0; t < T; ++t)
        for (index_t j = 0; j < d && !trial.valid(t); ++j)
            if (const double g = dx[Outcome::size(t, d) + static_cast<std::size_t>(j)]; g != 0.0)
                return broken("dx of masked token " + std::to_string(t), "0", number(g));

    Outcome moved = trial.outcome();
    const auto loss = [&](double* value, double from, double step, double& sum) {
        *value = from + step;
        const Status status = trial.route(trial.x, trial.info, {}, moved);
        *value = from;
        sum = 0.0;
        for (index_t t = 0; t < T; ++t) {
            if (!trial.valid(t)) continue;
            for (index_t k = 0; k < K; ++k)
                sum += a[static_cast<std::size_t>(t * K + k)] * moved.weight[static_cast<std::size_t>(t * K + k)];
            for (index_t e = 0; e < E; ++e) {
                const auto i = static_cast<std::size_t>(t * E + e);
                sum += b[i] * moved.probs[i] + c[i] * moved.logits[i];
                if (!s.empty()) sum += s[i] * moved.smooth_load[i];
            }
        }
        return status.ok() && moved.expert == out.expert;  // at a tie there is no derivative
    };
    Status found;
    const auto compare = [&](const std::string& name, double* value, const double* gradient, index_t size) {
        const double largest = std::abs(
            *std::max_element(gradient, gradient + size, [](double p, double q) { return std::abs(p) < std::abs(q); }));
        const index_t stride = 1 + size / 200;  // enough of a large tensor
        const double step = 1e-5;
        for (index_t i = 0; i < size && found; i += stride) {
            double up = 0.0, down = 0.0;
            if (!loss(value + i, value[i], step, up) || !loss(value + i, value[i], -step, down)) continue;
            const double numeric = (up - down) / (2.0 * step);
            if (!(std::abs(numeric - gradient[i]) <= 1e-6 * (largest + 1e-2)))
                found = broken("gradient of " + name + " at " + std::to_string(i), number(numeric),
                               number(gradient[i]));
        }
    };
    if (!dx.empty()) compare("x", trial.x.data(), dx.data(), T * d);
    if (!dprior.empty()) compare("prior", trial.prior.data(), first_dprior.data(), T * E);
    std::vector<std::pair<double*, index_t>> gradients;
    const auto collect = [&](const std::string&, auto& tensor) { gradients.emplace_back(tensor.data, tensor.size()); };
    for_each_tensor(grads, collect, trial.router, trial.shape);
    std::size_t which = 0;
    const auto each = [&](const std::string& name, auto& tensor) {
        const auto& [gradient, size] = gradients[which++];
        if (size != 0) compare(name, tensor.data, gradient, size);
    };
    for_each_tensor(trial.params, each, trial.router, trial.shape);
    return found;
}

}  // namespace detail::router_laws

/// Runs a router through its contract (5 to 9 of Router) in double, on parameters and tokens of its own; ok, or the
/// first law that fails. Depends on no test framework.
///
/// Choose a small shape: the gradient is compared with finite differences, away from ties. Shapes worth trying: one
/// expert, K = E, an odd number of experts. `device` works on host memory, for instance `Cpu{}`.
template <Router R, class Device>
Status check_router_laws(const R& router, const LayerShape& shape, const Device& device) {
    static_assert(std::is_same_v<typename Device::space, HostSpace>,
                  "steelyard: check_router_laws reads the results, so it takes a device on host memory");
    namespace laws = detail::router_laws;
    if (shape.tokens < 1) return laws::broken("shape.tokens", "at least 1", std::to_string(shape.tokens));
    if (Status s = router.check(shape); !s) return s;
    if (const int k = router.top_k(shape); k < 1 || k > shape.experts)
        return laws::broken("top_k", "1 to " + std::to_string(shape.experts), std::to_string(k));
    if (shape.sequences < 1 || shape.sequences > shape.tokens)
        return laws::broken("shape.sequences", "1 to " + std::to_string(shape.tokens), std::to_string(shape.sequences));
    if (!(R(router) == router)) return laws::broken("==", "a copy that equals the router", "one that does not");

    laws::Trial<R, Device> trial(router, shape, device);
    laws::Outcome out = trial.outcome();
    if (Status s = trial.route(trial.x, trial.info, {}, out); !s) return s;
    if (Status s = laws::check_choices(trial, out, false); !s) return s;
    TokenInfo<> evaluate = trial.info;
    evaluate.mode = Mode::evaluate;
    laws::Outcome still = trial.outcome();
    if (Status s = trial.route(trial.x, evaluate, {}, still); !s) return s;
    if (Status s = laws::check_choices(trial, still, true); !s) return s;
    if (Status s = laws::check_purity(trial, out); !s) return s;
    if (Status s = laws::check_gradient(trial, out); !s) return s;
    trial.x[0] = std::nan("");  // contract 6; token 0 is valid
    const Status refused = trial.route(trial.x, trial.info, {}, out);
    if (trial.router.template scratch_bytes<double>(device, shape) !=
        router.template scratch_bytes<double>(device, shape))
        return laws::broken("scratch_bytes", "a pure function", "another answer");
    if (bytes_of<typename laws::Trial<R, Device>::Params>(router, shape) > 0 && refused.code() != Code::not_finite &&
        !std::isfinite(out.logits[0]))
        return laws::broken("logits that are not finite", "a refusal with Code::not_finite", refused.message());
    return {};
}

}  // namespace steelyard
