#include "steelyard/cpu/expert.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <utility>

#include "cpu/ffn_cases.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

/// The same call in double, by plain loops. Its pre-activations are rounded as T holds them, for backward to begin
/// from.
template <class T>
struct Expected {
    FfnRun<double> run;

    explicit Expected(const FfnRun<T>& of) : run(of.c) {
        run.x.take(of.x), run.dy.take(of.dy), run.weight.take(of.weight), run.dweight.take(of.dweight);
        run.gate.take(of.gate), run.up.take(of.up), run.down.take(of.down);
        run.gate_bias.take(of.gate_bias), run.up_bias.take(of.up_bias), run.down_bias.take(of.down_bias);
        run.dgate.take(of.dgate), run.dup.take(of.dup), run.ddown.take(of.ddown);
        run.dgate_bias.take(of.dgate_bias), run.dup_bias.take(of.dup_bias), run.ddown_bias.take(of.ddown_bias);
        plain_forward(run);
        Tensor<T, 2> rounded;
        for (auto* kept : {&run.kept_gate, &run.kept_up}) {
            rounded.make(of.c.padding, 0, kept->v.extents[0], kept->v.extents[1]);
            rounded.take(*kept);
            kept->take(rounded);
        }
        plain_backward(run);
    }
};

/// What is left of a sum of some thousand terms of about 1.
template <class T>
constexpr double tolerance = 100 * double(std::numeric_limits<T>::epsilon());

template <class T>
void compare_with_plain_loops(const FfnCase& c) {
    CAPTURE(text(c));
    const Expected<T> expected{FfnRun<T>(c)};
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        FfnRun<T> run(c);
        const Cpu device{.threads = 2, .isa = isa};
        run.forward(device);
        CHECK(difference(run.kept_gate, expected.run.kept_gate) <= tolerance<T>);
        CHECK(difference(run.kept_up, expected.run.kept_up) <= tolerance<T>);
        // A derivative that jumps is asked for at the very same place.
        run.kept_gate.take(expected.run.kept_gate), run.kept_up.take(expected.run.kept_up);
        run.backward(device);
        run.results(expected.run, [&](const std::string& name, auto& came, auto& wanted) {
            CAPTURE(name);
            CHECK(difference(came, wanted) <= tolerance<T>);
        });
    }
}

template <class T>
void check_same(FfnRun<T>& a, FfnRun<T>& b) {
    a.results(b, [](const std::string& name, auto& mine, auto& others) {
        CAPTURE(name);
        CHECK(same_bits(mine, others));
    });
}

template <class T>
bool same_row(view<T, 2> a, index_t i, view<T, 2> b, index_t j) {
    return std::memcmp(&a(i, 0), &b(j, 0), static_cast<std::size_t>(a.extents[1]) * sizeof(T)) == 0;
}

}  // namespace

TEST_CASE_TEMPLATE("experts agree with plain loops in double at awkward sizes, on every instruction set", T, float,
                   double) {
    for (const FfnCase& c : awkward_calls()) compare_with_plain_loops<T>(c);
}

TEST_CASE_TEMPLATE("every activation agrees with plain loops in double, gated and not", T, float, double) {
    for (FfnFunction function :
         {FfnFunction(Activation::relu), FfnFunction(Activation::relu2), FfnFunction(Activation::gelu),
          FfnFunction(Activation::silu), FfnFunction(Activation::gelu_tanh), FfnFunction(Activation::identity),
          FfnFunction::linear(-1.5), FfnFunction(ClampedSwish{}), FfnFunction(ClampedSwish{.limit = 0.3, .alpha = 2})})
        for (const bool gated : {false, true}) {
            if (gated ? function.factor != 1 : function.clamped) continue;
            compare_with_plain_loops<T>({.rows = {5, 13},
                                         .width = 17,
                                         .hidden = 35,
                                         .function = function,
                                         .gated = gated,
                                         .bias = true,
                                         .top_k = 2});
        }
}

TEST_CASE("pre-activations that are too many for any cache are the same numbers") {
    // More than 16 MiB, which full lines pass the caches by; aligned to lines and not.
    if (few_sizes) return;
    for (const index_t hidden : {32768, 33000}) {
        const FfnCase c{.rows = {130}, .width = 1, .hidden = hidden, .function = Activation::silu, .gated = true};
        CAPTURE(hidden);
        FfnRun<float> run(c);
        Expected<float> expected(run);
        for (const Isa isa : instruction_sets())
            for (const int threads : {1, 2}) {
                CAPTURE(name_of(isa));
                CAPTURE(threads);
                run.forward({.threads = threads, .isa = isa});
                CHECK(difference(run.kept_gate, expected.run.kept_gate) <= tolerance<float>);
                CHECK(difference(run.kept_up, expected.run.kept_up) <= tolerance<float>);
                CHECK(difference(run.rows, expected.run.rows) <= tolerance<float>);
            }
    }
}

TEST_CASE("outputs that are too many for any cache are the same numbers, and bf16's have the bits of few") {
    if (few_sizes) return;
    for (const index_t width : {32768, 33000})
        for (const bool bias : {false, true}) {
            const FfnCase c{
                .rows = {130}, .width = width, .hidden = 3, .function = Activation::silu, .gated = true, .bias = bias};
            FfnCase of_few = c;
            of_few.rows = {2};
            CAPTURE(text(c));
            FfnRun<float> run(c), few(of_few);  // the first tokens, and all weights, are drawn alike
            Expected<float> expected(run);
            for (const Isa isa : instruction_sets())
                for (const int threads : {1, 2}) {
                    CAPTURE(name_of(isa));
                    CAPTURE(threads);
                    const Cpu device{.threads = threads, .isa = isa};
                    run.forward(device);
                    CHECK(difference(run.rows, expected.run.rows) <= tolerance<float>);
                    for (FfnRun<float>* of : {&run, &few})
                        of->forward(device, of->pack(device, PackedFor::inference, false, PackedFormat::bf16), {},
                                    of->rows.v);
                    CHECK(std::memcmp(few.rows.v.data, run.rows.v.data,
                                      static_cast<std::size_t>(few.rows.v.size()) * sizeof(float)) == 0);
                }
        }
}

TEST_CASE("gradients that replace are those that are added to zeros, whatever was there and however much there is") {
    // 16 MiB and more of them pass the caches by: in whole lines, and in rows that are not. One expert has no rows.
    if (few_sizes) return;
    for (const index_t width : {512, 513, 16}) {
        const FfnCase c{.rows = {3, 0, width == 16 ? 800 : 150},
                        .width = width,
                        .hidden = 1000,
                        .function = Activation::silu,
                        .gated = true,
                        .bias = true};
        CAPTURE(width);
        for (const Isa isa : instruction_sets())
            for (const int threads : {1, 3}) {
                CAPTURE(name_of(isa));
                CAPTURE(threads);
                const Cpu device{.threads = threads, .isa = isa};
                FfnRun<float> added(c), replaced(c);
                for (auto* run : {&added, &replaced}) {
                    const double before = run == &added ? 0.0 : std::numeric_limits<double>::quiet_NaN();
                    for (auto* of : {&run->dgate, &run->dup, &run->ddown}) of->set([&](index_t) { return before; });
                    for (auto* of : {&run->dgate_bias, &run->dup_bias, &run->ddown_bias})
                        of->set([&](index_t) { return before; });
                    run->forward(device);
                    auto grads = run->grads();
                    if (run == &replaced) grads.write = Write::assign;
                    run->backward(device, run->weights(), run->weight.v, run->dweight.v, grads);
                }
                check_same(replaced, added);
            }
    }
}

TEST_CASE_TEMPLATE("the number of threads changes no bit, forward or backward", T, float, double) {
    for (const FfnCase& c : awkward_calls())
        for (const Isa isa : instruction_sets()) {
            CAPTURE(text(c));
            CAPTURE(name_of(isa));
            FfnRun<T> one(c);
            one.both({.threads = 1, .isa = isa});
            for (const int threads : {2, 3, 7}) {
                if (few_sizes && threads != 3) continue;
                CAPTURE(threads);
                FfnRun<T> many(c);
                many.both({.threads = threads, .isa = isa});
                check_same(one, many);
            }
        }
}

TEST_CASE_TEMPLATE("a row's output and gradient do not depend on the other rows of its expert, to the bit", T, float,
                   double) {
    // Depths beyond a block, a hidden layer beyond one too. Each number of rows has other tiles, and other numbers of
    // panels at once; few rows on many threads are cut by columns.
    for (FfnCase c :
         {FfnCase{.rows = {300}, .width = 37, .hidden = 50, .function = Activation::silu, .gated = true, .bias = true},
          FfnCase{.rows = {50}, .width = 2100, .hidden = 70, .function = Activation::gelu_tanh},
          FfnCase{.rows = {300}, .width = 19, .hidden = 1100, .function = ClampedSwish{}, .gated = true}}) {
        if (few_sizes) c.rows = {26};
        for (const Isa isa : instruction_sets()) {
            CAPTURE(text(c));
            CAPTURE(name_of(isa));
            FfnRun<T> all(c);
            all.both({.threads = 1, .isa = isa});
            for (const index_t rows : {1, 2, 3, 4, 5, 11, 12, 13, 25})
                for (const int threads : {1, 3}) {
                    if (few_sizes && (rows == 3 || rows == 11 || threads > 1)) continue;
                    CAPTURE(rows);
                    CAPTURE(threads);
                    FfnCase of_few = c;
                    of_few.rows = {rows};
                    FfnRun<T> few(of_few);
                    // Weights are drawn alike: they do not depend on the tokens. So are the first tokens; take others.
                    const index_t skip = c.rows[0] - rows;
                    for (index_t t = 0; t < rows; ++t) {
                        for (index_t j = 0; j < c.width; ++j)
                            few.x.v(t, j) = all.x.v(t + skip, j), few.dy.v(t, j) = all.dy.v(t + skip, j);
                        few.weight.v(t, 0) = all.weight.v(t + skip, 0);
                        few.dweight.v(t, 0) = 2;
                    }
                    few.both({.threads = threads, .isa = isa});
                    bool same = true;
                    for (index_t r = 0; r < rows; ++r)
                        same = same && same_row(few.rows.v, r, all.rows.v, r + skip) &&
                               same_row(few.drows.v, r, all.drows.v, r + skip) &&
                               same_row(few.kept_up.v, r, all.kept_up.v, r + skip) &&
                               same_row(few.inner.v, r, all.inner.v, r + skip) &&
                               few.dweight.v(r, 0) == all.dweight.v(r + skip, 0);
                    CHECK(same);
                }
        }
    }
}

TEST_CASE_TEMPLATE("a row's output does not depend on the experts that have rows beside its own, to the bit", T, float,
                   double) {
    // Few rows of few experts are cut by columns, many are not.
    const FfnCase c{
        .rows = {9, 4, 300, 9}, .width = 33, .hidden = 140, .function = Activation::silu, .gated = true, .bias = true};
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        FfnRun<T> all(c);
        all.both({.threads = 3, .isa = isa});
        for (index_t e = 0; e < c.experts(); ++e) {
            CAPTURE(e);
            const index_t first = all.plan.offsets[e], end = all.plan.offsets[e + 1];
            FfnRun<T> one(c);
            for (index_t i = 0; i <= c.experts(); ++i) one.plan.offsets(i) = i <= e ? first : end;
            one.both({.threads = 3, .isa = isa});
            bool same = true;
            for (index_t r = first; r < end; ++r)
                same = same && same_row(one.rows.v, r, all.rows.v, r) && same_row(one.drows.v, r, all.drows.v, r);
            CHECK(same);
            const auto bytes = static_cast<std::size_t>(c.hidden * c.width) * sizeof(T);
            CHECK(std::memcmp(&one.dup.v(e, 0, 0), &all.dup.v(e, 0, 0), bytes) == 0);
            CHECK(std::memcmp(&one.dgate.v(e, 0, 0), &all.dgate.v(e, 0, 0), bytes) == 0);
            CHECK(std::memcmp(&one.ddown.v(e, 0, 0), &all.ddown.v(e, 0, 0), bytes) == 0);
            const index_t other = (e + 1) % c.experts();
            CHECK(std::isnan(one.rows.v(other == 0 ? 0 : all.plan.offsets[other], 0)));
            FfnRun<T> untouched(c);
            CHECK(std::memcmp(&one.dup.v(other, 0, 0), &untouched.dup.v(other, 0, 0), bytes) == 0);
        }
    }
}

TEST_CASE_TEMPLATE("outputs have the same bits where pre-activations are not kept, and these where no outputs are", T,
                   float, double) {
    for (const FfnCase& c : awkward_calls())
        for (const Isa isa : instruction_sets())
            for (const int threads : {1, 3}) {
                if (few_sizes && threads == 1) continue;
                CAPTURE(text(c));
                CAPTURE(name_of(isa));
                CAPTURE(threads);
                const Cpu device{.threads = threads, .isa = isa};
                FfnRun<T> whole(c), rows_alone(c), kept_alone(c), fresh(c);
                whole.forward(device);
                rows_alone.forward(device, rows_alone.weights(), {}, rows_alone.rows.v);
                kept_alone.forward(device, kept_alone.weights(), kept_alone.kept(), {});
                CHECK(same_bits(rows_alone.rows, whole.rows));
                CHECK(same_bits(rows_alone.kept_up, fresh.kept_up));
                CHECK(same_bits(kept_alone.kept_up, whole.kept_up));
                CHECK(same_bits(kept_alone.kept_gate, whole.kept_gate));
                CHECK(same_bits(kept_alone.rows, fresh.rows));
            }
}

TEST_CASE_TEMPLATE("gradients that are not asked for change no bit of the others", T, float, double) {
    for (const bool gated : {false, true})
        for (const Isa isa : instruction_sets()) {
            CAPTURE(gated);
            CAPTURE(name_of(isa));
            const FfnCase c{.rows = {0, 14, 3},
                            .width = 19,
                            .hidden = 37,
                            .function = Activation::gelu_tanh,
                            .gated = gated,
                            .bias = true,
                            .top_k = 2};
            const Cpu device{.threads = 2, .isa = isa};
            FfnRun<T> all(c), fresh(c);
            all.both(device);
            // Bit i: the i-th tensor is frozen; the last one is dweight.
            for (unsigned frozen : {0u, 1u, 2u, 4u, 8u, 16u, 32u, 64u, 7u, 56u, 63u, 127u}) {
                CAPTURE(frozen);
                FfnRun<T> some(c);
                auto grads = some.grads();
                if (frozen & 1u) grads.gate = {};
                if (frozen & 2u) grads.up = {};
                if (frozen & 4u) grads.down = {};
                if (frozen & 8u) grads.gate_bias = {};
                if (frozen & 16u) grads.up_bias = {};
                if (frozen & 32u) grads.down_bias = {};
                some.forward(device);
                some.backward(device, some.weights(), some.weight.v, frozen & 64u ? view<T, 2>() : some.dweight.v,
                              grads);
                CHECK(same_bits(some.drows, all.drows));
                CHECK(same_bits(some.dgate, (frozen & 1u ? fresh : all).dgate));
                CHECK(same_bits(some.dup, (frozen & 2u ? fresh : all).dup));
                CHECK(same_bits(some.ddown, (frozen & 4u ? fresh : all).ddown));
                CHECK(same_bits(some.dgate_bias, (frozen & 8u ? fresh : all).dgate_bias));
                CHECK(same_bits(some.dup_bias, (frozen & 16u ? fresh : all).dup_bias));
                CHECK(same_bits(some.ddown_bias, (frozen & 32u ? fresh : all).ddown_bias));
                CHECK(same_bits(some.dweight, (frozen & 64u ? fresh : all).dweight));
            }
        }
}

TEST_CASE_TEMPLATE("absent combine weights are weights of 1", T, float, double) {
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        FfnCase c{.rows = {6, 0, 14},
                  .width = 19,
                  .hidden = 37,
                  .function = Activation::silu,
                  .gated = true,
                  .bias = true,
                  .top_k = 2};
        FfnRun<T> ones(c);
        ones.weight.set([](index_t) { return 1.0; });
        c.weighted = false;
        FfnRun<T> absent(c);
        ones.both({.threads = 2, .isa = isa}), absent.both({.threads = 2, .isa = isa});
        check_same(ones, absent);
    }
}

TEST_CASE("a NaN among the inputs of a token stays in its own rows") {
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        FfnRun<float> run({.rows = {7, 30}, .width = 21, .hidden = 35, .function = Activation::silu, .gated = true});
        const index_t row = run.plan.offsets[1] + 14, token = run.plan.choice[row];
        run.x.v(token, 20) = std::numeric_limits<float>::quiet_NaN();
        run.forward({.threads = 2, .isa = isa});
        for (index_t r = 0; r < run.plan.offsets[2]; ++r)
            for (index_t j = 0; j < 21; ++j) REQUIRE(std::isnan(run.rows.v(r, j)) == (r == row));
    }
}
