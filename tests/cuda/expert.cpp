// Feed-forward experts of the CUDA device against the CPU's in double.
#include "steelyard/cuda/expert.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/device_memory.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/expert.hpp"
#include "steelyard/cpu/plan.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::number;
using gpu::Tensor;

namespace {

/// Whose tokens go where.
enum class Crowd { spread, one_expert, dropped };

struct Case {
    index_t tokens, width, hidden, experts, top_k;
    Crowd crowd = Crowd::spread;
    bool gated = true, bias = false;
    FfnFunction function = Activation::silu;
};

template <class T>
struct Run {
    using G = gate_t<T>;
    Case c;
    index_t most = c.tokens * c.top_k, filled = 0;
    Host<expert_t> choices;
    Host<index_t> offsets;
    Host<std::int32_t> choice, row;
    Host<T> x, dy, gate, up, down, gate_bias, up_bias, down_bias, dgate, dup, ddown, dgate_bias, dup_bias, ddown_bias;
    Host<G> weight, dweight;

    explicit Run(const Case& of)
        : c(of),
          choices(c.tokens, c.top_k),
          offsets(1, c.experts + 1),
          choice(1, most),
          row(c.tokens, c.top_k),
          x(gpu::random<T>(c.tokens, c.width, 1)),
          dy(gpu::random<T>(c.tokens, c.width, 2)),
          gate(weights(c.hidden, c.width, 3)),
          up(weights(c.hidden, c.width, 4)),
          down(weights(c.width, c.hidden, 5)),
          gate_bias(gpu::random<T>(c.experts, c.hidden, 6)),
          up_bias(gpu::random<T>(c.experts, c.hidden, 7)),
          down_bias(gpu::random<T>(c.experts, c.width, 8)),
          dgate(weights(c.hidden, c.width, 9)),
          dup(weights(c.hidden, c.width, 10)),
          ddown(weights(c.width, c.hidden, 11)),
          dgate_bias(gpu::random<T>(c.experts, c.hidden, 12)),
          dup_bias(gpu::random<T>(c.experts, c.hidden, 13)),
          ddown_bias(gpu::random<T>(c.experts, c.width, 14)),
          weight(gpu::random<G>(c.tokens, c.top_k, 15)),
          dweight(gpu::random<G>(c.tokens, c.top_k, 16)) {
        std::mt19937 generator(17);
        std::vector<expert_t> all(static_cast<std::size_t>(c.experts));
        for (index_t t = 0; t < c.tokens; ++t) {
            std::iota(all.begin(), all.end(), 0);
            if (c.crowd != Crowd::one_expert) std::shuffle(all.begin(), all.end(), generator);
            for (index_t k = 0; k < c.top_k; ++k) choices(t, k) = all[static_cast<std::size_t>(k)];
            if (c.crowd == Crowd::dropped && t % 5 == 2) choices(t, 0) = -1;
        }
        const Cpu cpu;
        Bytes scratch(plan_ops<Cpu>::scratch_bytes(cpu, {.tokens = c.tokens, .width = c.width, .experts = c.experts},
                                                   static_cast<int>(c.top_k)));
        plan_ops<Cpu>::make_plan(cpu, choices.get(), plan(), scratch.data());
        filled = offsets(0, c.experts);
    }
    Host<T> weights(index_t rows, index_t columns, unsigned seed) const {
        return gpu::random<T>(c.experts * rows, columns, seed, 1.0 / std::sqrt(static_cast<double>(columns)));
    }
    Plan<> plan() { return {offsets.line(), choice.line(), row.get()}; }
    template <class U>
    static FfnWeights<U> bundle(const Case& c, Host<std::remove_const_t<U>>& g, Host<std::remove_const_t<U>>& u,
                                Host<std::remove_const_t<U>>& d, Host<std::remove_const_t<U>>& gb,
                                Host<std::remove_const_t<U>>& ub, Host<std::remove_const_t<U>>& db) {
        FfnWeights<U> of{
            {}, {u.data.data(), c.experts, c.hidden, c.width}, {d.data.data(), c.experts, c.width, c.hidden}, {}, {}};
        if (c.gated) of.gate = {g.data.data(), c.experts, c.hidden, c.width};
        if (c.bias) of.up_bias = ub.get(), of.down_bias = db.get();
        if (c.bias && c.gated) of.gate_bias = gb.get();
        return of;
    }
};

template <class T, class U>
void near(const char* name, const Host<T>& got, const Host<U>& want, index_t rows, double tolerance) {
    CAPTURE(name);
    double off = 0.0, norm = 0.0;
    for (index_t r = 0; r < rows; ++r)
        for (index_t j = 0; j < got.columns; ++j) {
            const double a = number(got(r, j)), b = number(want(r, j));
            off += (a - b) * (a - b), norm += b * b;
        }
    CHECK(off <= tolerance * tolerance * norm);
}

template <class T>
void compare(const Case& c, CudaExperts experts) {
    CAPTURE(c.tokens);
    CAPTURE(c.width);
    CAPTURE(c.hidden);
    CAPTURE(c.experts);
    CAPTURE(c.top_k);
    CAPTURE(static_cast<int>(experts));
    using G = gate_t<T>;
    // A number alone, of a token alone, may be as far off as its own roundings.
    const double tolerance = std::is_same_v<T, bf16> ? (c.tokens * c.top_k < 8 ? 1e-2 : 5e-3) : 1e-5;
    Run<T> run(c);

    // In double on the CPU.
    const auto wide = [](const Host<T>& of) { return of.template as<double>(); };
    Host<double> gate = wide(run.gate), up = wide(run.up), down = wide(run.down), gb = wide(run.gate_bias),
                 ub = wide(run.up_bias), db = wide(run.down_bias), dgate = wide(run.dgate), dup = wide(run.dup),
                 ddown = wide(run.ddown), dgb = wide(run.dgate_bias), dub = wide(run.dup_bias),
                 ddb = wide(run.ddown_bias), x = wide(run.x), dy = wide(run.dy);
    Host<double> weight = run.weight.template as<double>(), dweight = run.dweight.template as<double>();
    Host<double> kept_gate(run.most, c.hidden), kept_up(run.most, c.hidden), rows(run.most, c.width),
        work_gate(run.most, c.hidden), work_up(run.most, c.hidden), inner(run.most, c.hidden), drows(run.most, c.width);
    const Cpu cpu;
    Bytes scratch(expert_ops<Cpu>::scratch_bytes<double>(cpu, run.most, c.width, c.hidden));
    const auto weights = Run<double>::bundle<const double>(c, gate, up, down, gb, ub, db);
    const auto grads = Run<double>::bundle<double>(c, dgate, dup, ddown, dgb, dub, ddb);
    const auto if_gated = [&](const auto& tensor) { return c.gated ? tensor : std::decay_t<decltype(tensor)>{}; };
    expert_ops<Cpu>::ffn_forward<double>(cpu, c.function, weights, x.get(), run.plan(),
                                         {if_gated(kept_gate.get()), kept_up.get()}, rows.get(), scratch.data());
    expert_ops<Cpu>::ffn_backward<double>(cpu, c.function, weights, x.get(), run.plan(),
                                          {if_gated(kept_gate.get()), kept_up.get()}, weight.get(), dy.get(),
                                          {if_gated(work_gate.get()), work_up.get(), inner.get()}, drows.get(),
                                          dweight.get(), grads, scratch.data());

    // On the GPU, twice: the same bits.
    Cuda device = gpu::device();
    device.experts = experts;
    const Tensor<T> far_x(run.x), far_dy(run.dy), far_gate(run.gate), far_up(run.up), far_down(run.down),
        far_gb(run.gate_bias), far_ub(run.up_bias), far_db(run.down_bias);
    const Tensor<G> far_weight(run.weight);
    const Tensor<index_t> offsets(run.offsets);
    const Tensor<std::int32_t> choice(run.choice), row(run.row);
    const Plan<CudaSpace> plan{offsets.line(), choice.line(), row.get()};
    const auto far_bundle = [&]<class U>(const Tensor<T>& g, const Tensor<T>& u, const Tensor<T>& d,
                                         const Tensor<T>& g_b, const Tensor<T>& u_b, const Tensor<T>& d_b, U) {
        FfnWeights<U, CudaSpace> of{
            {}, {u.get().data, c.experts, c.hidden, c.width}, {d.get().data, c.experts, c.width, c.hidden}, {}, {}};
        if (c.gated) of.gate = {g.get().data, c.experts, c.hidden, c.width};
        if (c.bias) of.up_bias = u_b.get(), of.down_bias = d_b.get();
        if (c.bias && c.gated) of.gate_bias = g_b.get();
        return of;
    };
    FfnWeights<const T, CudaSpace> far_weights;
    {
        const auto of = far_bundle(far_gate, far_up, far_down, far_gb, far_ub, far_db, T{});
        far_weights = {of.gate, of.up, of.down, of.up_bias, of.down_bias, of.gate_bias};
    }
    struct Outputs {
        std::vector<Host<T>> tensors;
        std::vector<Host<G>> weights;
    };
    enum class Grads { given, zero, replaced };
    const auto once = [&](Grads from) {
        const Tensor<T> k_gate(run.most, c.hidden), k_up(run.most, c.hidden), out(run.most, c.width),
            w_gate(run.most, c.hidden), w_up(run.most, c.hidden), w_inner(run.most, c.hidden),
            d_rows(run.most, c.width);
        const auto begun = [from](const Host<T>& given) {
            if (from == Grads::given) return Tensor<T>(given);
            if (from == Grads::zero) return Tensor<T>(Host<T>(given.rows, given.columns));
            return Tensor<T>(given.rows, given.columns);  // poison
        };
        const Tensor<T> d_gate = begun(run.dgate), d_up = begun(run.dup), d_down = begun(run.ddown),
                        d_gb = begun(run.dgate_bias), d_ub = begun(run.dup_bias), d_db = begun(run.ddown_bias);
        auto grads_there = far_bundle(d_gate, d_up, d_down, d_gb, d_ub, d_db, T{});
        if (from == Grads::replaced) grads_there.write = Write::assign;
        const Tensor<G> d_weight(run.dweight);
        const CudaBytes room = gpu::scratch(expert_ops<Cuda>::scratch_bytes<T>(device, run.most, c.width, c.hidden));
        const FfnKept<T, CudaSpace> kept{if_gated(k_gate.get()), k_up.get()};
        expert_ops<Cuda>::ffn_forward<T>(device, c.function, far_weights, far_x.get(), plan, kept, out.get(),
                                         room.data());
        expert_ops<Cuda>::ffn_backward<T>(device, c.function, far_weights, far_x.get(), plan,
                                          FfnKept<const T, CudaSpace>{kept.gate, kept.up}, far_weight.get(),
                                          far_dy.get(), {if_gated(w_gate.get()), w_up.get(), w_inner.get()},
                                          d_rows.get(), d_weight.get(), grads_there, room.data());
        gpu::finish();
        return Outputs{{k_gate.host(), k_up.host(), out.host(), d_rows.host(), d_gate.host(), d_up.host(),
                        d_down.host(), d_gb.host(), d_ub.host(), d_db.host()},
                       {d_weight.host()}};
    };
    const Outputs first = once(Grads::given), again = once(Grads::given);
    for (std::size_t i = 0; i < first.tensors.size(); ++i) CHECK(first.tensors[i].same(again.tensors[i]));
    CHECK(first.weights[0].same(again.weights[0]));
    // Gradients that replace what was there are those that were added to nothing.
    const Outputs added = once(Grads::zero), replaced = once(Grads::replaced);
    for (std::size_t i = 4; i < added.tensors.size(); ++i) {
        const Host<T>&a = added.tensors[i], &b = replaced.tensors[i];
        const bool has_bias = c.bias && (i != 7 || c.gated), used = i < 7 ? i != 4 || c.gated : has_bias;
        for (index_t j = 0; used && j < a.rows * a.columns; ++j)
            if (number(a.data[static_cast<std::size_t>(j)]) != number(b.data[static_cast<std::size_t>(j)])) {
                CAPTURE(i);
                CAPTURE(j);
                FAIL_CHECK("a gradient that replaces");
                break;
            }
    }

    const auto& got = first.tensors;
    if (c.gated) near("kept gate", got[0], kept_gate, run.filled, tolerance);
    near("kept up", got[1], kept_up, run.filled, tolerance);
    near("rows", got[2], rows, run.filled, tolerance);
    near("drows", got[3], drows, run.filled, tolerance);
    near("dweight", first.weights[0], dweight, c.tokens, tolerance);
    if (c.gated) near("dgate", got[4], dgate, dgate.rows, tolerance);
    near("dup", got[5], dup, dup.rows, tolerance);
    near("ddown", got[6], ddown, ddown.rows, tolerance);
    if (c.bias && c.gated) near("dgate_bias", got[7], dgb, dgb.rows, tolerance);
    if (c.bias) near("dup_bias", got[8], dub, dub.rows, tolerance);
    if (c.bias) near("ddown_bias", got[9], ddb, ddb.rows, tolerance);
}

}  // namespace

TEST_CASE("grouped experts agree with the CPU's in double, at awkward sizes, and twice in the same bits") {
    for (const index_t tokens : {index_t{1}, index_t{31}, index_t{33}, index_t{64}, index_t{129}, index_t{700}})
        for (const Crowd crowd : {Crowd::spread, Crowd::one_expert, Crowd::dropped})
            compare<bf16>({tokens, 72, 136, 3, 2, crowd}, CudaExperts::grouped);
    compare<bf16>({1, 8, 8, 1, 1}, CudaExperts::grouped);
    compare<bf16>({50, 64, 64, 160, 6}, CudaExperts::grouped);
    compare<bf16>({40, 64, 64, 512, 8}, CudaExperts::grouped);
    compare<bf16>({200, 64, 64, 4, 4}, CudaExperts::grouped);  // K = E
    compare<bf16>({1500, 520, 264, 4, 2}, CudaExperts::grouped);
    compare<bf16>({2600, 1032, 392, 8, 2}, CudaExperts::grouped);  // more pairs of tiles than the GPU has of blocks
}

TEST_CASE("grouped experts have every activation, gated and not") {
    for (const FfnFunction& function :
         {FfnFunction(Activation::relu), FfnFunction(Activation::relu2), FfnFunction(Activation::gelu),
          FfnFunction(Activation::silu), FfnFunction(Activation::gelu_tanh), FfnFunction(Activation::identity)})
        for (const bool gated : {false, true})
            for (const index_t tokens : {index_t{20}, index_t{400}})
                compare<bf16>({tokens, 64, 96, 3, 2, Crowd::spread, gated, false, function}, CudaExperts::grouped);
    compare<bf16>({300, 64, 96, 3, 2, Crowd::spread, true, false, ClampedSwish{}}, CudaExperts::grouped);
    compare<bf16>({300, 64, 96, 3, 2, Crowd::spread, false, false, FfnFunction::linear(0.5)}, CudaExperts::grouped);
}

TEST_CASE_TEMPLATE("looped experts agree with the CPU's in double", T, float, bf16) {
    for (const bool gated : {false, true})
        for (const bool bias : {false, true})
            for (const index_t tokens : {index_t{1}, index_t{33}, index_t{300}})
                compare<T>({tokens, 36, 28, 3, 2, Crowd::dropped, gated, bias, Activation::gelu_tanh},
                           CudaExperts::looped);
    compare<T>({5000, 24, 16, 1, 1}, CudaExperts::looped);  // more rows than a block
    compare<T>({40, 16, 24, 160, 3}, CudaExperts::looped);
}

TEST_CASE("experts are asked for in a way that cannot be") {
    Cuda device = gpu::device();
    device.experts = CudaExperts::grouped;
    Run<float> run({4, 8, 8, 2, 1});
    const Tensor<index_t> offsets(run.offsets);
    const Tensor<std::int32_t> choice(run.choice), row(run.row);
    const Plan<CudaSpace> plan{offsets.line(), choice.line(), row.get()};
    CHECK_THROWS_WITH(
        expert_ops<Cuda>::ffn_forward<float>(device, Activation::silu, {}, {}, plan, {}, {}, nullptr),
        "steelyard: experts: device.experts: expected looped or automatic, or what the grouped kernels can "
        "do, came elements other than bf16");
}
