// Each piece of the transformer: a hand-checkable case, and its gradients against finite differences.
#include <doctest/doctest.h>

#include <cstdint>

#include "finite_differences.hpp"
#include "pretrain/attention.hpp"
#include "pretrain/cross_entropy.hpp"
#include "pretrain/embedding.hpp"
#include "pretrain/linear.hpp"
#include "pretrain/rms_norm.hpp"
#include "pretrain/rotary.hpp"

namespace {

using namespace pretrain;
using test::check_gradient;
using test::dot;
using test::Random;

const Threads one(1);

TEST_CASE("pretrain linear: the gradients of x and W match finite differences, and dW accumulates") {
    Random<2> x(1, 1, 7, 5), w(2, 1, 3, 5), y(3, 0, 7, 3), dy(4, 1, 7, 3), dx(5, 1, 7, 5), dw(6, 0, 3, 5);
    linear_backward_input<double>(one, dy, w, dx);
    linear_backward_weight<double>(one, dy, x, dw);
    const auto loss = [&] {
        linear_forward<double>(one, x, w, y);
        return dot(y.values, dy.values);
    };
    check_gradient("x", x.values, dx.values, loss);
    check_gradient("W", w.values, dw.values, loss);
    const auto once = dw.values;
    linear_backward_weight<double>(one, dy, x, dw);
    for (std::size_t i = 0; i < once.size(); ++i) CHECK(dw.values[i] == doctest::Approx(2 * once[i]));
}

TEST_CASE("pretrain embedding: a byte that comes twice gets both gradients") {
    const std::uint8_t bytes[] = {2, 0, 2};
    const view<const std::uint8_t, 1> tokens(bytes, 3);
    Random<2> table(1, 1, 4, 3), y(2, 0, 3, 3), dy(3, 1, 3, 3), dtable(4, 0, 4, 3);
    embedding_backward<double>(one, tokens, dy, dtable);
    check_gradient("table", table.values, dtable.values, [&] {
        embedding_forward<double>(one, tokens, table, y);
        return dot(y.values, dy.values);
    });
    CHECK(y.tensor(2, 1) == table.tensor(2, 1));
}

TEST_CASE("pretrain rms_norm: unit gain leaves a row whose mean square is one") {
    Random<2> x(1, 3, 2, 8), y(2, 0, 2, 8);
    Random<1> gain(3, 0, 8), inverse(4, 0, 2);
    std::fill(gain.values.begin(), gain.values.end(), 1.0);
    rms_norm_forward<double>(one, x, gain, y, inverse);
    CHECK(dot(y.values, y.values) / 16 == doctest::Approx(1).epsilon(1e-5));
}

TEST_CASE("pretrain rms_norm: the gradients of x and gain match finite differences") {
    Random<2> x(1, 1, 6, 5), y(2, 0, 6, 5), dy(3, 1, 6, 5), dx(4, 0, 6, 5);
    Random<1> gain(5, 1, 5), inverse(6, 0, 6), dgain(7, 0, 5);
    const auto loss = [&] {
        rms_norm_forward<double>(one, x, gain, y, inverse);
        return dot(y.values, dy.values);
    };
    loss();
    rms_norm_backward<double>(one, x, gain, inverse, dy, dx, dgain);
    check_gradient("x", x.values, dx.values, loss);
    check_gradient("gain", gain.values, dgain.values, loss);
}

TEST_CASE("pretrain rotary: a turn keeps lengths, and turning back restores the input") {
    Random<2> qkv(1, 1, 6, 12);  // two heads of width 2, sequences of 3
    Random<3> table(2, 0, 3, 2, 1);
    rotary_table<double>(table);
    const auto before = qkv.values;
    rotary<double>(one, qkv, table, 1.0);
    CHECK(dot(qkv.values, qkv.values) == doctest::Approx(dot(before, before)));
    CHECK(qkv.tensor(3, 0) == before[3 * 12]);                      // position 0 does not turn
    CHECK(qkv.tensor(4, 0) == doctest::Approx(before[4 * 12] * std::cos(1.0) - before[4 * 12 + 1] * std::sin(1.0)));
    CHECK(qkv.tensor(4, 8) == before[4 * 12 + 8]);                  // values do not turn
    rotary<double>(one, qkv, table, -1.0);
    for (std::size_t i = 0; i < before.size(); ++i) CHECK(qkv.values[i] == doctest::Approx(before[i]));
}

TEST_CASE("pretrain attention: equal keys give the mean of the values so far") {
    Random<2> qkv(1, 1, 3, 6), y(2, 0, 3, 2);
    Random<4> p(3, 0, 1, 1, 3, 3);
    for (index_t t = 0; t < 3; ++t) qkv.tensor(t, 2) = qkv.tensor(t, 3) = 0.5;
    attention_forward<double>(one, qkv, p, y);
    const double mean = (qkv.tensor(0, 4) + qkv.tensor(1, 4) + qkv.tensor(2, 4)) / 3;
    CHECK(y.tensor(2, 0) == doctest::Approx(mean));
    CHECK(y.tensor(0, 1) == doctest::Approx(qkv.tensor(0, 5)));
}

TEST_CASE("pretrain attention: the gradient matches finite differences, with a tile that is not full") {
    const index_t sequences = 2, heads = 2, length = query_tile + 3, width = 4;
    Random<2> qkv(1, 1, sequences * length, 3 * width), dqkv(2, 1, sequences * length, 3 * width);
    Random<2> y(3, 0, sequences * length, width), dy(4, 1, sequences * length, width);
    Random<4> p(5, 1, sequences, heads, length, length);
    Random<3> scratch(6, 1, sequences * heads, query_tile, length);
    const auto loss = [&] {
        attention_forward<double>(one, qkv, p, y);
        return dot(y.values, dy.values);
    };
    loss();
    attention_backward<double>(one, qkv, p, dy, scratch, dqkv);
    check_gradient("qkv", qkv.values, dqkv.values, loss);
}

TEST_CASE("pretrain cross_entropy: equal logits cost log V, and the gradient matches finite differences") {
    const std::uint8_t bytes[] = {1, 4, 0};
    const view<const std::uint8_t, 1> targets(bytes, 3);
    Random<2> logits(1, 0, 3, 5), kept(2, 0, 3, 5);
    Random<1> losses(3, 0, 3);
    cross_entropy_forward<double>(one, targets, logits, losses);
    CHECK(losses.tensor(1) == doctest::Approx(std::log(5.0)));

    Random<2> z(4, 2, 3, 5);
    const auto loss = [&] {
        kept.values = z.values;
        cross_entropy_forward<double>(one, targets, kept, losses);
        return 0.25 * (losses.values[0] + losses.values[1] + losses.values[2]);
    };
    loss();
    cross_entropy_backward<double>(one, targets, 0.25, kept);
    const auto gradient = kept.values;
    check_gradient("logits", z.values, gradient, loss);
}

TEST_CASE("pretrain pieces: every number of threads gives the same bits") {
    const index_t sequences = 3, heads = 2, length = 100, width = 24, tokens = sequences * length;
    Random<2> x(1, 1, tokens, width), w(2, 1, 3 * width, width), dy(3, 1, tokens, width);
    Random<1> gain(4, 1, width);
    const auto run = [&](int count) {
        const Threads threads(count);
        Random<2> qkv(5, 0, tokens, 3 * width), y(6, 0, tokens, width), dqkv(7, 0, tokens, 3 * width);
        Random<2> dw(8, 0, 3 * width, width), dx(9, 0, tokens, width), n(10, 0, tokens, width);
        Random<1> inverse(11, 0, tokens), dgain(12, 0, width);
        Random<4> p(13, 0, sequences, heads, length, length);
        Random<3> scratch(14, 0, sequences * heads, query_tile, length);
        rms_norm_forward<double>(threads, x, gain, n, inverse);
        linear_forward<double>(threads, n, w, qkv);
        attention_forward<double>(threads, qkv, p, y);
        attention_backward<double>(threads, qkv, p, dy, scratch, dqkv);
        linear_backward_weight<double>(threads, dqkv, n, dw);
        linear_backward_input<double>(threads, dqkv, w, n);
        rms_norm_backward<double>(threads, x, gain, inverse, n, dx, dgain);
        test::Values all = y.values;
        for (const auto* part : {&dw.values, &dx.values, &dgain.values})
            all.insert(all.end(), part->begin(), part->end());
        return all;
    };
    const auto serial = run(1);
    CHECK(serial == run(2));
    CHECK(serial == run(5));
}

}  // namespace
