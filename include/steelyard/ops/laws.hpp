// The laws of a device: its operations against plain arithmetic in double, as a test that anyone can run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/core/random.hpp"
#include "steelyard/ops/device.hpp"

namespace steelyard {

namespace detail::device_laws {

struct Sizes {
    index_t tokens = 37, width = 19, hidden = 23, experts = 5, top_k = 2;
    [[nodiscard]] index_t rows() const { return tokens * top_k; }
    [[nodiscard]] LayerShape shape() const { return {.tokens = tokens, .width = width, .experts = experts}; }
};

/// One gated expert layer, forward and backward: what goes in, then what each operation writes.
template <class T>
struct Trial {
    view<T, 2> x, dy, router;  // [T, d], [T, d], [E, d]
    view<T, 3> gate, up, down;  // [E, h, d], [E, h, d], [E, d, h]
    Routing<T> routing;
    Plan<> plan;
    view<std::int64_t, 2> load;  // [1, E + 1]
    view<double, 2> prob_sums;   // [1, E]
    view<std::int64_t, 1> own;   // [1]
    view<T, 2> kept_gate, kept_up, rows, y;  // [N, h], [N, h], [N, d], [T, d]
    RoutingGrad<T> grad;
    view<T, 2> work_gate, work_up, work_inner, drows;  // [N, h] three times, [N, d]
    view<T, 2> dx, drouter;                            // [T, d], [E, d]
    view<T, 3> dgate, dup, ddown;

    template <class Field>
    void fields(Field&& field, const Sizes& n) {
        field("x", x, n.tokens, n.width), field("dy", dy, n.tokens, n.width);
        field("router", router, n.experts, n.width);
        field("gate", gate, n.experts, n.hidden, n.width), field("up", up, n.experts, n.hidden, n.width);
        field("down", down, n.experts, n.width, n.hidden);
        field.group("routing", routing, n.tokens, n.experts, n.top_k);
        field.group("plan", plan, n.tokens, n.experts, n.top_k);
        field("load", load, index_t{1}, n.experts + 1), field("prob_sums", prob_sums, index_t{1}, n.experts);
        field("own", own, index_t{1});
        field("kept_gate", kept_gate, n.rows(), n.hidden), field("kept_up", kept_up, n.rows(), n.hidden);
        field("rows", rows, n.rows(), n.width), field("y", y, n.tokens, n.width);
        field.group("grad", grad, n.tokens, n.experts, n.top_k);
        field("work_gate", work_gate, n.rows(), n.hidden), field("work_up", work_up, n.rows(), n.hidden);
        field("work_inner", work_inner, n.rows(), n.hidden), field("drows", drows, n.rows(), n.width);
        field("dx", dx, n.tokens, n.width), field("drouter", drouter, n.experts, n.width);
        field("dgate", dgate, n.experts, n.hidden, n.width), field("dup", dup, n.experts, n.hidden, n.width);
        field("ddown", ddown, n.experts, n.width, n.hidden);
    }
};

/// Normal values for the inputs, keyed by the tensor; the rest is left as it is.
template <class T>
void fill_inputs(const Trial<T>& t) {
    std::uint64_t seed = 1;
    const auto fill = [&](const auto& tensor) {
        const Philox random(seed++, Stream::user);
        for (index_t i = 0; i < tensor.size(); ++i)
            tensor.data[i] = static_cast<T>(0.5 * random.normal(static_cast<std::uint64_t>(i)));
    };
    fill(t.x), fill(t.dy), fill(t.router), fill(t.gate), fill(t.up), fill(t.down);
}

/// Every operation once, in a layer's order, by the device.
template <class T, class D>
void run(const D& device, const Sizes& n, const Trial<T>& t) {
    const LayerShape shape = n.shape();
    const SelectionRule rule{.top_k = static_cast<int>(n.top_k)};
    const Bytes scratch(std::max({router_ops<D>::template scratch_bytes<T>(device, shape),
                                  plan_ops<D>::scratch_bytes(device, shape, rule.top_k),
                                  expert_ops<D>::template scratch_bytes<T>(device, n.tokens * n.top_k, n.width, n.hidden),
                                  balance_ops<D>::scratch_bytes(device, shape)}));
    const view<const T, 2> x = t.x, dy = t.dy, router = t.router, rows = t.rows, drows = t.drows;
    const view<const T, 2> weight = t.routing.weight, dlogits = t.grad.logits, none;
    const view<const std::uint8_t, 1> no_mask;
    router_ops<D>::template logits<T>(device, x, router, RouterNoise{}, t.routing.logits, scratch.data());
    (void)router_ops<D>::template select<T>(device, rule, view<const float, 1>{}, no_mask, t.routing, scratch.data());

    Observation<T> seen;
    seen.routing = t.routing;
    seen.valid_tokens = n.tokens;
    balance_ops<D>::template count<T>(device, seen, t.load);
    balance_ops<D>::template sum_quantity<T, Quantity::probs>(device, seen, t.prob_sums, t.own, scratch.data());

    plan_ops<D>::make_plan(device, view<const expert_t, 2>(t.routing.expert), t.plan, scratch.data());
    const FfnWeights<const T> weights{t.gate, t.up, t.down, {}, {}};
    const FfnKept<T> kept{t.kept_gate, t.kept_up};
    expert_ops<D>::template ffn_forward<T>(device, Activation::silu, weights, x, t.plan, kept, t.rows, scratch.data());
    plan_ops<D>::template combine<T>(device, t.plan, rows, weight, t.y, Write::assign);

    for (const auto& tensor : {t.grad.weight, t.grad.probs, t.grad.logits, t.drouter})
        std::fill_n(tensor.data, tensor.size(), T(0));
    for (const auto& tensor : {t.dgate, t.dup, t.ddown}) std::fill_n(tensor.data, tensor.size(), T(0));
    expert_ops<D>::template ffn_backward<T>(device, Activation::silu, weights, x, t.plan,
                                            FfnKept<const T>{t.kept_gate, t.kept_up}, weight, dy,
                                            FfnGradRows<T>{t.work_gate, t.work_up, t.work_inner}, t.drows,
                                            t.grad.weight, FfnWeights<T>{t.dgate, t.dup, t.ddown, {}, {}},
                                            scratch.data());
    plan_ops<D>::template combine<T>(device, t.plan, drows, none, t.dx, Write::assign);
    router_ops<D>::template select_backward<T>(device, rule, no_mask, t.routing, t.grad);
    router_ops<D>::template logits_backward<T>(device, x, no_mask, router, RouterNoise{}, dlogits, t.dx, t.drouter,
                                               scratch.data());
}

/// The same layer in plain loops: y, the load, the sums of probabilities, and every gradient.
template <class T>
struct Reference {
    std::vector<double> y, prob_sums, dx, drouter, dgate, dup, ddown;
    std::vector<std::int64_t> load;

    Reference(const Sizes& n, const Trial<T>& t) {
        const auto zeros = [](index_t count) { return std::vector<double>(static_cast<std::size_t>(count)); };
        y = dx = zeros(n.tokens * n.width);
        prob_sums = zeros(n.experts);
        drouter = zeros(n.experts * n.width);
        dgate = dup = ddown = zeros(n.experts * n.hidden * n.width);
        load.assign(static_cast<std::size_t>(n.experts + 1), 0);
        for (index_t token = 0; token < n.tokens; ++token) add_token(n, t, token);
    }

private:
    static double& at(std::vector<double>& values, index_t i) { return values[static_cast<std::size_t>(i)]; }

    void add_token(const Sizes& n, const Trial<T>& t, index_t token) {
        std::vector<double> p(static_cast<std::size_t>(n.experts));
        double total = 0;
        for (index_t e = 0; e < n.experts; ++e) {
            double z = 0;
            for (index_t j = 0; j < n.width; ++j) z += double(t.router(e, j)) * double(t.x(token, j));
            total += at(p, e) = std::exp(z);
        }
        for (index_t e = 0; e < n.experts; ++e) at(prob_sums, e) += at(p, e) /= total;
        ++load[static_cast<std::size_t>(n.experts)];
        std::vector<double> dp(p.size());
        std::vector<bool> taken(p.size());
        for (index_t k = 0; k < n.top_k; ++k) {
            index_t best = -1;
            for (index_t e = 0; e < n.experts; ++e)
                if (!taken[static_cast<std::size_t>(e)] && (best < 0 || at(p, e) > at(p, best))) best = e;
            taken[static_cast<std::size_t>(best)] = true;
            ++load[static_cast<std::size_t>(best)];
            at(dp, best) = add_expert(n, t, token, best, at(p, best));
        }
        double mean = 0;
        for (index_t e = 0; e < n.experts; ++e) mean += at(dp, e) * at(p, e);
        for (index_t e = 0; e < n.experts; ++e) {
            const double dz = at(p, e) * (at(dp, e) - mean);
            for (index_t j = 0; j < n.width; ++j) {
                at(drouter, e * n.width + j) += dz * double(t.x(token, j));
                at(dx, token * n.width + j) += dz * double(t.router(e, j));
            }
        }
    }

    /// One expert on one token, forward and backward; returns the gradient of its weight.
    double add_expert(const Sizes& n, const Trial<T>& t, index_t token, index_t e, double weight) {
        double dweight = 0;
        for (index_t i = 0; i < n.hidden; ++i) {
            double g = 0, u = 0, da = 0;
            for (index_t j = 0; j < n.width; ++j) {
                g += double(t.gate(e, i, j)) * double(t.x(token, j));
                u += double(t.up(e, i, j)) * double(t.x(token, j));
                da += double(t.down(e, j, i)) * double(t.dy(token, j));
            }
            const double s = 1 / (1 + std::exp(-g)), a = g * s * u;
            dweight += da * a;
            const double dg = weight * da * u * s * (1 + g * (1 - s)), du = weight * da * g * s;
            for (index_t j = 0; j < n.width; ++j) {
                const index_t in = (e * n.hidden + i) * n.width + j;
                at(y, token * n.width + j) += weight * double(t.down(e, j, i)) * a;
                at(dgate, in) += dg * double(t.x(token, j));
                at(dup, in) += du * double(t.x(token, j));
                at(ddown, (e * n.width + j) * n.hidden + i) += weight * double(t.dy(token, j)) * a;
                at(dx, token * n.width + j) += dg * double(t.gate(e, i, j)) + du * double(t.up(e, i, j));
            }
        }
        return dweight;
    }
};

/// The largest difference relative to the reference's largest value must stay within the tolerance.
template <class V>
Status compare(std::string_view operation, const V& came, const std::vector<double>& expected, double tolerance) {
    double scale = 1e-30, worst = 0;
    for (const double v : expected) scale = std::max(scale, std::abs(v));
    for (index_t i = 0; i < came.size(); ++i) {
        const double off = std::abs(static_cast<double>(came.data[i]) - expected[static_cast<std::size_t>(i)]) / scale;
        if (!(off <= worst)) worst = off;  // a NaN counts as the worst
    }
    if (worst <= tolerance) return {};
    return Status::refuse(Code::invalid_argument, "device.laws", operation,
                          "plain arithmetic in double to " + std::to_string(tolerance), std::to_string(worst) + " off");
}

}  // namespace detail::device_laws

/// Runs a device's operations on a small layer of made-up values, with awkward sizes, and answers with the first that
/// breaks a law:
///
/// 1. `check()` accepts the device;
/// 2. a second run gives the same bits in every tensor;
/// 3. counts are those of plain loops, exactly;
/// 4. outputs, sums and every gradient agree with plain loops in double to `tolerance`, relative to the largest value.
///
/// For devices whose memory the host can reach. T is float or double; `tolerance` fits T, e.g. 1e-5 and 1e-12.
template <class T, Device D>
    requires std::same_as<typename D::space, HostSpace>
Status check_device_laws(const D& device, double tolerance) {
    namespace laws = detail::device_laws;
    if (Status s = device.check(); !s) return s;
    const laws::Sizes sizes;
    const Bytes memory(bytes_of<laws::Trial<T>>(sizes));
    const auto trial = place<laws::Trial<T>>(memory.data(), sizes);
    laws::fill_inputs(trial);
    laws::run<T>(device, sizes, trial);
    const std::vector<std::byte> first(memory.data(), memory.data() + memory.size());
    laws::run<T>(device, sizes, trial);
    if (std::memcmp(first.data(), memory.data(), first.size()) != 0)
        return Status::refuse(Code::invalid_argument, "device.laws", "replay", "the same bits", "others");

    const laws::Reference<T> expected(sizes, trial);
    if (!std::equal(expected.load.begin(), expected.load.end(), trial.load.data))
        return Status::refuse(Code::invalid_argument, "device.laws", "count", "the counts of plain loops", "others");
    if (Status s = laws::compare("sum_probs", trial.prob_sums, expected.prob_sums, tolerance); !s) return s;
    if (Status s = laws::compare("ffn_forward, combine", trial.y, expected.y, tolerance); !s) return s;
    if (Status s = laws::compare("ffn_backward: gate", trial.dgate, expected.dgate, tolerance); !s) return s;
    if (Status s = laws::compare("ffn_backward: up", trial.dup, expected.dup, tolerance); !s) return s;
    if (Status s = laws::compare("ffn_backward: down", trial.ddown, expected.ddown, tolerance); !s) return s;
    if (Status s = laws::compare("select_backward, logits_backward", trial.drouter, expected.drouter, tolerance); !s)
        return s;
    return laws::compare("combine, logits_backward: dx", trial.dx, expected.dx, tolerance);
}

}  // namespace steelyard
