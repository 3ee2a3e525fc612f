#include "cpu/ffn_run.hpp"

#include <algorithm>
#include <cmath>

#include "steelyard/cpu/expert.hpp"

namespace steelyard::testing {

std::string text(const FfnCase& c) {
    std::string s = "rows";
    for (std::size_t e = 0; e < std::min<std::size_t>(c.rows.size(), 8); ++e) s += " " + std::to_string(c.rows[e]);
    s += ", width " + std::to_string(c.width) + ", hidden " + std::to_string(c.hidden);
    s += c.function.clamped ? ", clamped" : ", activation " + std::to_string(static_cast<int>(c.function.activation));
    return s + (c.gated ? ", gated" : "") + (c.bias ? ", bias" : "");
}

namespace {

/// Uniform, of mean 0 and variance 1 (splitmix64).
double number(std::uint64_t seed, index_t at) {
    std::uint64_t z = (seed << 40) + static_cast<std::uint64_t>(at) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1) * 1.7320508;
}

}  // namespace

template <class T>
FfnRun<T>::FfnRun(const FfnCase& of) : c(of) {
    const index_t tokens = c.tokens(), n = c.first_row + tokens * c.top_k, E = c.experts(), p = c.padding;
    // Experts take their tokens from all over, in ascending order.
    std::vector<index_t> left = c.rows, expert_of(static_cast<std::size_t>(tokens * c.top_k), -1);
    for (index_t placed = 0, e = 0, at = 0; placed < c.filled(); e = (e + 1) % E) {
        if (left[static_cast<std::size_t>(e)] == 0) continue;
        expert_of[static_cast<std::size_t>(at++)] = e;
        --left[static_cast<std::size_t>(e)], ++placed;
    }
    std::rotate(expert_of.begin(), expert_of.begin() + c.dropped / 2, expert_of.end());
    offsets.assign(static_cast<std::size_t>(E + 1), 0);
    choice.assign(static_cast<std::size_t>(n), -7), row.assign(static_cast<std::size_t>(tokens * c.top_k), -1);
    plan = {{offsets.data(), E + 1}, {choice.data(), n}, {row.data(), tokens, c.top_k}};
    index_t r = c.first_row;
    for (index_t e = 0; e < E; ++e) {
        plan.offsets(e) = r;
        for (std::size_t i = 0; i < expert_of.size(); ++i)
            if (expert_of[i] == e)
                row[i] = static_cast<std::int32_t>(r), plan.choice(r++) = static_cast<std::int32_t>(i);
    }
    plan.offsets(E) = r;

    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (auto* t : {&x, &dy}) t->make(p, 0, tokens, c.width);
    for (auto* t : {&kept_gate, &kept_up, &work_gate, &work_up, &inner}) t->make(p, nan, n, c.hidden);
    for (auto* t : {&rows, &drows}) t->make(p, nan, n, c.width);
    for (auto* t : {&weight, &dweight}) t->make(p, 2, tokens, c.top_k);
    for (auto* t : {&gate, &up, &dgate, &dup}) t->make(p, 1, E, c.hidden, c.width);
    for (auto* t : {&down, &ddown}) t->make(p, 1, E, c.width, c.hidden);
    for (auto* t : {&up_bias, &gate_bias, &dup_bias, &dgate_bias}) t->make(p, 1, E, c.hidden);
    for (auto* t : {&down_bias, &ddown_bias}) t->make(p, 1, E, c.width);
    std::uint64_t seed = 0;
    const auto fill = [&](auto& tensor, double size) {
        ++seed;
        tensor.set([&](index_t at) { return size * number(seed, at); });
    };
    const double in = 1 / std::sqrt(double(c.width)), out = 1 / std::sqrt(double(c.hidden));
    fill(gate, in), fill(up, in), fill(down, out), fill(gate_bias, 0.5), fill(up_bias, 0.5), fill(down_bias, 0.5);
    fill(x, 1), fill(dy, 1), fill(weight, 1);
    fill(dgate, 1), fill(dup, 1), fill(ddown, 1), fill(dgate_bias, 1), fill(dup_bias, 1), fill(ddown_bias, 1);
}

template <class T>
FfnWeights<const T> FfnRun<T>::weights() const {
    FfnWeights<const T> w{{}, up.v, down.v, {}, {}};
    if (c.gated) w.gate = gate.v;
    if (c.bias) w.up_bias = up_bias.v, w.down_bias = down_bias.v;
    if (c.bias && c.gated) w.gate_bias = gate_bias.v;
    return w;
}

template <class T>
FfnWeights<T> FfnRun<T>::grads() const {
    FfnWeights<T> w{{}, dup.v, ddown.v, {}, {}};
    if (c.gated) w.gate = dgate.v;
    if (c.bias) w.up_bias = dup_bias.v, w.down_bias = ddown_bias.v;
    if (c.bias && c.gated) w.gate_bias = dgate_bias.v;
    return w;
}

template <class T>
FfnKept<T> FfnRun<T>::kept() const {
    return {c.gated ? kept_gate.v : view<T, 2>(), kept_up.v};
}

template <class T>
std::byte* FfnRun<T>::scratch(const Cpu& device) {
    scratch_ = Bytes(expert_ops<Cpu>::scratch_bytes<T>(device, c.filled(), c.width, c.hidden));
    std::fill_n(scratch_.data(), scratch_.size(), std::byte{0xFF});
    return scratch_.data();
}

template <class T>
void FfnRun<T>::forward(const Cpu& device, const FfnWeights<const T>& with, const FfnKept<T>& keep, view<T, 2> to) {
    expert_ops<Cpu>::ffn_forward<T>(device, c.function, with, x.v, plan, keep, to, scratch(device));
}

template <class T>
void FfnRun<T>::backward(const Cpu& device, const FfnWeights<const T>& with, view<const T, 2> combine,
                         view<T, 2> dcombine, const FfnWeights<T>& to) {
    const view<T, 2> absent;
    expert_ops<Cpu>::ffn_backward<T>(
        device, c.function, with, x.v, plan, FfnKept<const T>{c.gated ? kept_gate.v : absent, kept_up.v}, combine, dy.v,
        {c.gated ? work_gate.v : absent, work_up.v, inner.v}, drows.v, dcombine, to, scratch(device));
}

template <class T>
FfnWeights<const T> FfnRun<T>::pack(const Cpu& device, PackedFor purpose, bool matrices, PackedFormat format) {
    packed = Bytes(expert_ops<Cpu>::ffn_packed_bytes<T>(device, format, purpose, c.experts(), c.width, c.hidden,
                                                        c.gated));
    std::fill_n(packed.data(), packed.size(), std::byte{0xFF});
    expert_ops<Cpu>::ffn_pack<T>(device, format, purpose, weights(), packed.data());
    FfnWeights<const T> with = weights();
    if (!matrices) with.gate = with.up = with.down = {};
    with.packed = {packed.data(), packed.size()};
    return with;
}

template <class T>
Status FfnRun<T>::check_packed(const Cpu& device, const FfnCase& of) const {
    return expert_ops<Cpu>::ffn_check_packed<T>(device, "experts", "params.packed", {packed.data(), packed.size()},
                                                of.experts(), of.width, of.hidden, of.gated);
}

template struct FfnRun<float>;
template struct FfnRun<double>;

namespace {

/// a(u), or a(g, u), and its derivatives.
struct Value {
    double a, by_gate, by_up;
};

Value function(const FfnCase& c, double g, double u) {
    const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
    if (c.function.clamped) {
        const auto [limit, alpha] = c.function.clamp;
        const double gate = std::min(g, limit), up = std::clamp(u, -limit, limit), s = sigmoid(alpha * gate);
        return {(up + 1) * gate * s, g > limit ? 0 : (up + 1) * (s + gate * alpha * s * (1 - s)),
                std::abs(u) > limit ? 0 : gate * s};
    }
    const double z = c.gated ? g : u;
    double f = z, slope = 1;
    switch (c.function.activation) {
        case Activation::identity:
            break;
        case Activation::relu:
            f = std::max(z, 0.0), slope = z > 0;
            break;
        case Activation::relu2:
            f = z > 0 ? z * z : 0, slope = z > 0 ? 2 * z : 0;
            break;
        case Activation::gelu: {
            const double cdf = 0.5 * std::erfc(-z / std::sqrt(2.0));
            f = z * cdf, slope = cdf + z * std::exp(-z * z / 2) / std::sqrt(2 * 3.14159265358979323846);
            break;
        }
        case Activation::silu:
            f = z * sigmoid(z), slope = sigmoid(z) * (1 + z * (1 - sigmoid(z)));
            break;
        case Activation::gelu_tanh: {
            const double scale = std::sqrt(2 / 3.14159265358979323846);
            const double t = std::tanh(scale * (z + 0.044715 * z * z * z));
            f = 0.5 * z * (1 + t);
            slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z * z);
            break;
        }
    }
    if (c.gated) return {f * u, slope * u, f};
    return {c.function.factor * f, 0, c.function.factor * slope};
}

/// Calls body(row, expert, token, place among the token's choices).
template <class Body>
void each_row(const FfnRun<double>& run, Body&& body) {
    for (index_t e = 0; e < run.c.experts(); ++e)
        for (index_t r = run.plan.offsets[e]; r < run.plan.offsets[e + 1]; ++r)
            body(r, e, run.plan.choice[r] / run.c.top_k, run.plan.choice[r] % run.c.top_k);
}

}  // namespace

void plain_forward(FfnRun<double>& run) {
    const FfnCase& c = run.c;
    std::vector<double> a(static_cast<std::size_t>(c.hidden));
    each_row(run, [&](index_t r, index_t e, index_t t, index_t) {
        for (index_t i = 0; i < c.hidden; ++i) {
            double g = c.bias ? run.gate_bias.v(e, i) : 0, u = c.bias ? run.up_bias.v(e, i) : 0;
            for (index_t j = 0; j < c.width; ++j) u += run.up.v(e, i, j) * run.x.v(t, j);
            for (index_t j = 0; c.gated && j < c.width; ++j) g += run.gate.v(e, i, j) * run.x.v(t, j);
            run.kept_up.v(r, i) = u;
            if (c.gated) run.kept_gate.v(r, i) = g;
            a[static_cast<std::size_t>(i)] = function(c, g, u).a;
        }
        for (index_t j = 0; j < c.width; ++j) {
            double y = c.bias ? run.down_bias.v(e, j) : 0;
            for (index_t i = 0; i < c.hidden; ++i) y += run.down.v(e, j, i) * a[static_cast<std::size_t>(i)];
            run.rows.v(r, j) = y;
        }
    });
}

void plain_backward(FfnRun<double>& run) {
    const FfnCase& c = run.c;
    std::vector<double> dinner(static_cast<std::size_t>(c.hidden));
    each_row(run, [&](index_t r, index_t e, index_t t, index_t k) {
        const double weight = c.weighted ? run.weight.v(t, k) : 1;
        std::fill(dinner.begin(), dinner.end(), 0.0);
        for (index_t j = 0; j < c.width; ++j) {
            const double dy = run.dy.v(t, j);
            if (c.bias) run.dweight.v(t, k) += dy * run.down_bias.v(e, j), run.ddown_bias.v(e, j) += weight * dy;
            for (index_t i = 0; i < c.hidden; ++i) dinner[static_cast<std::size_t>(i)] += dy * run.down.v(e, j, i);
            run.drows.v(r, j) = 0;
        }
        for (index_t i = 0; i < c.hidden; ++i) {
            const Value f = function(c, c.gated ? run.kept_gate.v(r, i) : 0, run.kept_up.v(r, i));
            const double da = dinner[static_cast<std::size_t>(i)], dgate = weight * da * f.by_gate,
                         dup = weight * da * f.by_up;
            run.dweight.v(t, k) += da * f.a;
            if (c.bias) run.dup_bias.v(e, i) += dup;
            if (c.bias && c.gated) run.dgate_bias.v(e, i) += dgate;
            for (index_t j = 0; j < c.width; ++j) {
                run.drows.v(r, j) += dup * run.up.v(e, i, j);
                run.dup.v(e, i, j) += dup * run.x.v(t, j);
                run.ddown.v(e, j, i) += weight * f.a * run.dy.v(t, j);
            }
            for (index_t j = 0; c.gated && j < c.width; ++j) {
                run.drows.v(r, j) += dgate * run.gate.v(e, i, j);
                run.dgate.v(e, i, j) += dgate * run.x.v(t, j);
            }
        }
    });
}

}  // namespace steelyard::testing
