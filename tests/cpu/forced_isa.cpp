// What is made of matrix products runs on the instruction set that the device names, like everything else.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "cpu/ffn_run.hpp"
#include "cpu/instruction_sets.hpp"
#include "steelyard/cpu/expert.hpp"
#include "steelyard/cpu/gating.hpp"
#include "steelyard/cpu/merge.hpp"
#include "steelyard/cpu/router.hpp"
#include "steelyard/cpu/soft.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

constexpr index_t tokens = 45, width = 37, experts = 19;

/// Numbers whose products are rounded.
struct Matrix : Tensor<float, 2> {
    Matrix(index_t rows, index_t columns, int seed) {
        make(0, 0.0, rows, columns);
        set([&](index_t at) { return std::sin(1.7 * static_cast<double>(at) + seed); });
    }
};

/// Plain products of one instruction set.
struct Products {
    Isa isa;
    Bytes room{cpu::gemm_scratch_bytes<float>()};

    void nt(const Matrix& a, const Matrix& b, Matrix& c, Write write = Write::assign) const {
        cpu::gemm_nt<float>(a.v, b.v, c.v, write, room.data(), isa);
    }
    void nn(const Matrix& a, const Matrix& b, Matrix& c, Write write = Write::assign) const {
        cpu::gemm_nn<float>(a.v, b.v, c.v, write, room.data(), isa);
    }
    void tn(const Matrix& a, const Matrix& b, Matrix& c, Write write = Write::assign) const {
        cpu::gemm_tn<float>(a.v, b.v, c.v, write, room.data(), isa);
    }
};

/// Calls body(device, products) for each instruction set.
template <class Body>
void each_isa(Body&& body) {
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        body(Cpu{.isa = isa}, Products{isa});
    }
}

/// A matrix as one expert's.
view<float, 3> of_one(const Matrix& m) { return {m.v.data, 1, m.v.extents[0], m.v.extents[1]}; }

}  // namespace

TEST_CASE("low-rank experts whose b is 0 give the bits of their base, on every instruction set") {
    const FfnCase c{.rows = {21}, .width = 37, .hidden = 29, .function = Activation::silu, .gated = true};
    constexpr index_t rank = 3;
    each_isa([&](const Cpu& device, const Products&) {
        FfnRun<float> base(c), run(c);
        base.both(device);
        Tensor<float, 3> a_in, a_hidden, b_in, b_hidden;
        a_in.make(0, 0.3, index_t{1}, rank, c.width), a_hidden.make(0, 0.2, index_t{1}, rank, c.hidden);
        b_in.make(0, 0.0, index_t{1}, c.hidden, rank), b_hidden.make(0, 0.0, index_t{1}, c.width, rank);
        const LowRank<const float> in{a_in.v, b_in.v}, out{a_hidden.v, b_hidden.v};
        const LowRankUpdates<const float> updates{in, in, out};
        Matrix low_gate(c.filled(), rank, 0), low_up(c.filled(), rank, 0);
        Matrix dlow_gate(c.filled(), rank, 0), dlow_up(c.filled(), rank, 0), dlow_down(c.filled(), rank, 0),
            low_inner(c.filled(), rank, 0);
        Bytes scratch(expert_ops<Cpu>::low_rank_scratch_bytes<float>(device, c.width, c.hidden, rank));
        expert_ops<Cpu>::low_rank_forward<float>(device, c.function, run.weights(), updates, 1.0, run.x.v, run.plan,
                                                 run.kept(), {low_gate.v, low_up.v}, run.rows.v, scratch.data());
        expert_ops<Cpu>::low_rank_backward<float>(device, c.function, run.weights(), updates, 1.0, run.x.v, run.plan,
                                                  {run.kept_gate.v, run.kept_up.v}, {low_gate.v, low_up.v},
                                                  run.weight.v, run.dy.v, {run.work_gate.v, run.work_up.v, run.inner.v},
                                                  {dlow_gate.v, dlow_up.v, dlow_down.v, low_inner.v}, run.drows.v,
                                                  run.dweight.v, run.grads(), {}, scratch.data());
        run.results(base, [](const std::string& name, auto& mine, auto& others) {
            CAPTURE(name);
            CHECK(same_bits(mine, others));
        });
    });
}

TEST_CASE("low-rank updates are products of the device's instruction set") {
    // Of an expert whose base is 0 there is nothing else.
    constexpr index_t rank = 5;
    const FfnCase c{.rows = {13}, .width = width, .hidden = 29, .function = Activation::silu, .gated = true};
    each_isa([&](const Cpu& device, const Products& product) {
        FfnRun<float> run(c);
        for (auto* weight : {&run.gate, &run.up, &run.down}) weight->set([](index_t) { return 0.0; });
        const Matrix a(rank, c.width, 1), b(c.hidden, rank, 2), a_down(rank, c.hidden, 3), b_down(c.width, rank, 4);
        const LowRank<const float> in{of_one(a), of_one(b)}, out{of_one(a_down), of_one(b_down)};
        Matrix low_gate(c.filled(), rank, 0), low_up(c.filled(), rank, 0), low(c.filled(), rank, 0);
        Matrix x(c.filled(), c.width, 0), up(c.filled(), c.hidden, 0);
        Bytes scratch(expert_ops<Cpu>::low_rank_scratch_bytes<float>(device, c.width, c.hidden, rank));
        expert_ops<Cpu>::low_rank_forward<float>(device, c.function, run.weights(), {in, in, out}, 1.0, run.x.v,
                                                 run.plan, run.kept(), {low_gate.v, low_up.v}, {}, scratch.data());
        std::copy_n(run.x.v.data, x.v.size(), x.v.data);
        product.nt(x, a, low), product.nt(low, b, up);
        CHECK(same_bits(low_up, low));
        CHECK(std::equal(up.v.data, up.v.data + up.v.size(), run.kept_up.v.data));
    });
}

TEST_CASE("grouped linear maps are products of the device's instruction set") {
    const FfnCase c{.rows = {tokens}, .width = width};
    each_isa([&](const Cpu& device, const Products& product) {
        const FfnRun<float> run(c);  // its plan: every token is one row
        const Matrix x(tokens, width, 1), dout(tokens, experts, 2), weight(experts, width, 3);
        Matrix out(tokens, experts, 4), din(tokens, width, 5), dweight(experts, width, 6);
        Matrix wanted_out(tokens, experts, 4), wanted_din(tokens, width, 5), wanted_dweight(experts, width, 6);
        Bytes scratch(expert_ops<Cpu>::linear_scratch_bytes<float>(device, width, experts));
        expert_ops<Cpu>::linear_forward<float>(device, of_one(weight), {.from = x.v}, run.plan, out.v, scratch.data());
        expert_ops<Cpu>::linear_backward<float>(device, of_one(weight), {.from = x.v}, {.from = dout.v}, run.plan,
                                                din.v, of_one(dweight), scratch.data());
        product.nt(x, weight, wanted_out);
        product.nn(dout, weight, wanted_din);
        product.tn(dout, x, wanted_dweight, Write::add);
        CHECK(same_bits(out, wanted_out));
        CHECK(same_bits(din, wanted_din));
        CHECK(same_bits(dweight, wanted_dweight));
    });
}

TEST_CASE("gradients of logits go through products of the device's instruction set, with jitter and without") {
    for (const double jitter : {0.0, 0.1})
        each_isa([&](const Cpu& device, const Products& product) {
            CAPTURE(jitter);
            RouterNoise noise;
            noise.jitter = jitter;
            const Matrix x(tokens, width, 1), weight(experts, width, 2), dlogits(tokens, experts, 3);
            Matrix dx(tokens, width, 4), dweight(experts, width, 5);
            Bytes scratch(
                router_ops<Cpu>::scratch_bytes<float>(device, {.tokens = tokens, .width = width, .experts = experts}));
            router_ops<Cpu>::logits_backward<float>(device, x.v, {}, weight.v, noise, dlogits.v, dx.v, dweight.v,
                                                    scratch.data());

            Matrix input(tokens, width, 1), product_dx(tokens, width, 0);
            Matrix wanted_dx(tokens, width, 4), wanted_dweight(experts, width, 5);
            const auto jittered = [&](Matrix& rows) {
                for (index_t t = 0; t < tokens; ++t)
                    cpu::jitter_row<float>(device, noise, {t, width, 0, width}, &rows.v(t, 0), &rows.v(t, 0));
            };
            if (jitter == 0.0) {
                product.nn(dlogits, weight, wanted_dx, Write::add);
            } else {
                product.nn(dlogits, weight, product_dx);
                jittered(product_dx), jittered(input);
                for (index_t i = 0; i < tokens * width; ++i) wanted_dx.v.data[i] += product_dx.v.data[i];
            }
            product.tn(dlogits, input, wanted_dweight, Write::add);
            CHECK(same_bits(dx, wanted_dx));
            CHECK(same_bits(dweight, wanted_dweight));
        });
}

TEST_CASE("a product that adds to logits is one of the device's instruction set") {
    each_isa([&](const Cpu& device, const Products& product) {
        const Matrix a(tokens, width, 1), b(experts, width, 2);
        Matrix logits(tokens, experts, 3), wanted(tokens, experts, 3);
        Bytes scratch(
            router_ops<Cpu>::scratch_bytes<float>(device, {.tokens = tokens, .width = width, .experts = experts}));
        table_ops<Cpu>::add_product<float>(device, a.v, b.v, logits.v, scratch.data());
        product.nt(a, b, wanted, Write::add);
        CHECK(same_bits(logits, wanted));
    });
}

TEST_CASE("soft mixtures are products of the device's instruction set") {
    constexpr index_t slots = experts;
    each_isa([&](const Cpu& device, const Products& product) {
        const TokenInfo<> all;
        const Matrix x(tokens, width, 1), phi(slots, width, 2), weights(tokens, slots, 3), values(slots, width, 4);
        Matrix similarity(tokens, slots, 0), dispatch(tokens, slots, 0), combine(tokens, slots, 0);
        Matrix mixed(slots, width, 0), y(tokens, width, 0), products(tokens, slots, 0);
        Matrix dlogits(tokens, slots, 3), dx(tokens, width, 5), dphi(slots, width, 6);
        Bytes scratch(soft_ops<Cpu>::scratch_bytes<float>(device, slots));
        CHECK(soft_ops<Cpu>::route<float>(device, all, x.v, phi.v, {}, similarity.v, dispatch.v, combine.v,
                                          scratch.data()) == -1);
        soft_ops<Cpu>::mix<float>(device, all, weights.v, x.v, mixed.v, scratch.data());
        soft_ops<Cpu>::spread<float>(device, all, weights.v, values.v, y.v, Write::assign, scratch.data());
        soft_ops<Cpu>::products<float>(device, all, x.v, values.v, products.v, scratch.data());
        soft_ops<Cpu>::logits_backward<float>(device, all, x.v, phi.v, {}, similarity.v, dlogits.v, dx.v, dphi.v, {},
                                              scratch.data());

        Matrix wanted(tokens, slots, 0), wanted_mixed(slots, width, 0), wanted_y(tokens, width, 0);
        Matrix wanted_dx(tokens, width, 5), wanted_dphi(slots, width, 6);
        product.nt(x, phi, wanted);
        CHECK(same_bits(similarity, wanted));
        product.nt(x, values, wanted);
        CHECK(same_bits(products, wanted));
        product.tn(weights, x, wanted_mixed);
        CHECK(same_bits(mixed, wanted_mixed));
        product.nn(weights, values, wanted_y);
        CHECK(same_bits(y, wanted_y));
        product.nn(weights, phi, wanted_dx, Write::add);
        CHECK(same_bits(dx, wanted_dx));
        product.tn(weights, x, wanted_dphi, Write::add);
        CHECK(same_bits(dphi, wanted_dphi));
    });
}

TEST_CASE("merged experts are products of the device's instruction set") {
    constexpr index_t segments = 7;
    // Experts of one row each: all of them are one matrix.
    const auto by_row = [](const Matrix& m) { return view<float, 3>(m.v.data, m.v.extents[0], 1, m.v.extents[1]); };
    each_isa([&](const Cpu& device, const Products& product) {
        const Matrix probs(segments, experts, 1), weights(experts, width, 2), dmerged(segments, width, 3);
        Matrix merged(segments, width, 0), dprobs(segments, experts, 0), dweights(experts, width, 4);
        Matrix wanted(segments, width, 0), wanted_dweights(experts, width, 4);
        Bytes scratch(merge_ops<Cpu>::scratch_bytes<float>(device));
        merge_ops<Cpu>::merge<float>(device, probs.v, by_row(weights), by_row(merged), scratch.data());
        merge_ops<Cpu>::merge_backward<float>(device, probs.v, by_row(weights), by_row(dmerged), dprobs.v,
                                              by_row(dweights), scratch.data());
        product.nn(probs, weights, wanted);
        CHECK(same_bits(merged, wanted));
        product.tn(probs, dmerged, wanted_dweights, Write::add);
        CHECK(same_bits(dweights, wanted_dweights));
    });
}
