#include "steelyard/cpu/packed_ffn.hpp"

#include <doctest/doctest.h>

#include "cpu/ffn_cases.hpp"
#include "steelyard/cpu/expert.hpp"

using namespace steelyard;
using namespace steelyard::testing;

namespace {

template <class T>
void check_same(FfnRun<T>& a, FfnRun<T>& b) {
    a.results(b, [](const std::string& name, auto& mine, auto& others) {
        CAPTURE(name);
        CHECK(same_bits(mine, others));
    });
}

/// The norm of the difference of two runs' rows over that of the second one's.
double relative_difference(const FfnRun<float>& a, const FfnRun<float>& b) {
    double off = 0, norm = 0;
    for (index_t r = 0; r < b.c.filled(); ++r)
        for (index_t j = 0; j < b.c.width; ++j) {
            const double wanted = b.rows.v(r, j), d = a.rows.v(r, j) - wanted;
            off += d * d, norm += wanted * wanted;
        }
    return std::sqrt(off / norm);
}

template <class T>
view<const T, 2> combine_weight(const FfnRun<T>& run) {
    return run.c.weighted ? view<const T, 2>(run.weight.v) : view<const T, 2>();
}

}  // namespace

TEST_CASE_TEMPLATE("packed weights give the bits of the matrices, forward and backward, without the matrices", T, float,
                   double) {
    for (const FfnCase& c : awkward_calls())
        for (const Isa isa : instruction_sets())
            for (const int threads : {1, 3}) {
                CAPTURE(text(c));
                CAPTURE(name_of(isa));
                CAPTURE(threads);
                const Cpu device{.threads = threads, .isa = isa};
                FfnRun<T> plain(c), inference(c), training(c);
                plain.both(device);

                inference.forward(device, inference.pack(device, PackedFor::inference, false), inference.kept(),
                                  inference.rows.v);
                // Backward has no panels of its own: it goes through the matrices.
                inference.backward(device, inference.pack(device, PackedFor::inference), combine_weight(inference),
                                   inference.dweight.v, inference.grads());
                check_same(inference, plain);

                const auto weights = training.pack(device, PackedFor::training, false);
                training.forward(device, weights, training.kept(), training.rows.v);
                training.backward(device, weights, combine_weight(training), training.dweight.v, training.grads());
                check_same(training, plain);
            }
}

TEST_CASE_TEMPLATE("rows of packed experts have the bits that they have alone", T, float, double) {
    FfnCase c{.rows = {300}, .width = 600, .hidden = 70, .function = Activation::silu, .gated = true, .bias = true};
    if (few_sizes) c.rows = {26};
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        FfnRun<T> all(c);
        all.forward({.isa = isa}, all.pack({.isa = isa}, PackedFor::inference), {}, all.rows.v);
        for (const index_t rows : {1, 2, 4, 5, 12, 13})
            for (const int threads : {1, 3}) {
                CAPTURE(rows);
                CAPTURE(threads);
                FfnCase of_few = c;
                of_few.rows = {rows};
                FfnRun<T> few(of_few);  // the first tokens, and all weights, are drawn alike
                const Cpu device{.threads = threads, .isa = isa};
                few.forward(device, few.pack(device, PackedFor::inference), {}, few.rows.v);
                CHECK(std::memcmp(few.rows.v.data, all.rows.v.data,
                                  static_cast<std::size_t>(rows * c.width) * sizeof(T)) == 0);
            }
    }
}

TEST_CASE_TEMPLATE("the number of threads changes no byte of what is packed", T, float, double) {
    for (const FfnCase& c : awkward_calls())
        for (const Isa isa : instruction_sets()) {
            CAPTURE(text(c));
            CAPTURE(name_of(isa));
            FfnRun<T> one(c), three(c);
            (void)one.pack({.threads = 1, .isa = isa}, PackedFor::training);
            (void)three.pack({.threads = 3, .isa = isa}, PackedFor::training);
            REQUIRE(one.packed.size() == three.packed.size());
            CHECK(std::memcmp(one.packed.data(), three.packed.data(), static_cast<std::size_t>(one.packed.size())) ==
                  0);
        }
}

TEST_CASE_TEMPLATE("a packed copy is refused for other sizes, another gating, element or instruction set", T, float,
                   double) {
    const FfnCase c{.rows = {3, 4}, .width = 17, .hidden = 33, .function = Activation::silu, .gated = true};
    const auto refusal = [](const FfnRun<T>& run, const Cpu& device, const FfnCase& of) {
        const std::string message = run.check_packed(device, of).message();
        CAPTURE(message);
        CHECK(message.find("params.packed: expected ") != std::string::npos);
        CHECK(message.find(", came ") != std::string::npos);
        return message;
    };
    const auto names = [](const std::string& message, const std::string& wanted, const std::string& came) {
        CAPTURE(message);
        const auto comma = message.find(", came ");
        CHECK(message.substr(0, comma).find(wanted) != std::string::npos);
        CHECK(message.substr(comma).find(came) != std::string::npos);
    };
    for (const Isa isa : instruction_sets())
        for (const PackedFor purpose : {PackedFor::inference, PackedFor::training}) {
            CAPTURE(name_of(isa));
            const Cpu device{.threads = 2, .isa = isa};
            FfnRun<T> run(c);
            (void)run.pack(device, purpose);
            CHECK(run.check_packed(device, c).ok());
            CHECK(run.check_packed({.threads = 5, .isa = isa}, c).ok());

            FfnCase other = c;
            other.rows.push_back(0);
            names(refusal(run, device, other), "3 experts", "2 experts");
            other = c, other.width = 18;
            names(refusal(run, device, other), "width 18", "width 17");
            other = c, other.hidden = 32;
            names(refusal(run, device, other), "hidden 32", "hidden 33");
            other = c, other.gated = false;
            names(refusal(run, device, other), "not gated", ", gated");

            using Other = std::conditional_t<sizeof(T) == 4, double, float>;
            const Status element = expert_ops<Cpu>::ffn_check_packed<Other>(
                device, "experts", "params.packed", {run.packed.data(), run.packed.size()}, 2, 17, 33, true);
            names(element.message(), "elements of " + std::to_string(sizeof(Other)),
                  "elements of " + std::to_string(sizeof(T)));
        }

#if defined(STEELYARD_CPU_DISPATCHES)
    const auto panel = [](Isa isa) {
        return cpu::with_kernels(isa, [](auto kernels) { return decltype(kernels)::template panel_columns<T>; });
    };
    for (const Isa isa : instruction_sets())
        for (const Isa another : instruction_sets()) {
            CAPTURE(name_of(isa));
            CAPTURE(name_of(another));
            FfnRun<T> run(c);
            (void)run.pack({.isa = isa}, PackedFor::inference);
            CHECK(run.check_packed({.isa = another}, c).ok() == (panel(isa) == panel(another)));
            if (panel(isa) != panel(another))
                names(refusal(run, {.isa = another}, c), "panels of " + std::to_string(panel(another)) + " columns",
                      "panels of " + std::to_string(panel(isa)) + " columns");
        }
#endif
}

TEST_CASE("other bytes, a block that is too short or misaligned are no packed copy") {
    const FfnCase c{.rows = {3, 4}, .width = 17, .hidden = 33};
    const Cpu device;
    FfnRun<float> run(c);
    (void)run.pack(device, PackedFor::training);
    const auto check = [&](const std::byte* data, index_t bytes) {
        return expert_ops<Cpu>::ffn_check_packed<float>(device, "experts", "params.packed", {data, bytes}, 2, 17, 33,
                                                        false)
            .message();
    };
    const index_t all = run.packed.size();
    CHECK(check(run.packed.data(), all) == "ok");
    CHECK(check(run.packed.data(), all + 64) == "ok");
    CHECK(check(run.packed.data(), all - 1) == "steelyard: experts: params.packed: expected at least " +
                                                   std::to_string(all) + " bytes, came " + std::to_string(all - 1));
    CHECK(check(run.packed.data(), 8) ==
          "steelyard: experts: params.packed: expected a block that pack() wrote, aligned to 64 bytes, came 8 bytes");
    const Bytes moved(all + 64);
    std::memcpy(moved.data() + 8, run.packed.data(), static_cast<std::size_t>(all));
    CHECK(check(moved.data() + 8, all) ==
          "steelyard: experts: params.packed: expected a block that pack() wrote, "
          "aligned to 64 bytes, came a misaligned pointer");
    const Bytes zeros(all);
    CHECK(check(zeros.data(), all) ==
          "steelyard: experts: params.packed: expected a block that pack() wrote, came other bytes");
}

TEST_CASE(
    "weights of fewer bits: near the full ones on every instruction set, the same bits for any threads and company") {
    FfnCase c{.rows = {0, 1, 3, 13, 40},
              .width = 300,
              .hidden = 700,
              .function = Activation::silu,
              .gated = true,
              .bias = true,
              .weighted = false};
    if (few_sizes) c.width = 130, c.hidden = 70;
    for (const Isa isa : instruction_sets())
        for (const PackedFormat format : {PackedFormat::bf16, PackedFormat::int8}) {
            CAPTURE(name_of(isa));
            CAPTURE(static_cast<int>(format));
            FfnRun<float> full(c), one(c), three(c);
            full.forward({.isa = isa}, full.weights(), full.kept(), full.rows.v);
            const auto run = [&](FfnRun<float>& of, int threads) {
                const Cpu device{.threads = threads, .isa = isa};
                of.forward(device, of.pack(device, PackedFor::inference, false, format), of.kept(), of.rows.v);
            };
            run(one, 1), run(three, 3);
            check_same(three, one);
            const double off = relative_difference(one, full);
            // Errors of 2^-9 a factor, or of half a step of 1/127 of the largest of 256, average out over the depth.
            const double most = format == PackedFormat::bf16 ? 6e-3 : 2.5e-2;
            CHECK(off <= most);
            CHECK(off >= most / 20);  // and something was rounded

            // A row alone: other tiles, several panels at once.
            FfnCase of_one = c;
            of_one.rows = {0, 1, 0, 0, 0};
            FfnRun<float> alone(of_one);
            run(alone, 1);
            CHECK(std::memcmp(alone.rows.v.data, one.rows.v.data, static_cast<std::size_t>(c.width) * sizeof(float)) ==
                  0);
        }
}

TEST_CASE("weights of fewer bits: tall tiles of narrow rows") {
    // Whole tiles with one thread, quarters of them with three. A row in the format of a product takes two cache lines
    // or more, however narrow it is.
    FfnCase c{.rows = std::vector<index_t>(3, cpu::detail::expert::tile_rows),
              .hidden = 70,
              .function = Activation::silu,
              .gated = true};
    for (const Isa isa : instruction_sets())
        for (const PackedFormat format : {PackedFormat::bf16, PackedFormat::int8})
            for (c.width = 1; c.width <= 9; ++c.width) {
                CAPTURE(name_of(isa));
                CAPTURE(static_cast<int>(format));
                CAPTURE(c.width);
                FfnRun<float> full(c), one(c), three(c);
                full.forward({.isa = isa}, full.weights(), full.kept(), full.rows.v);
                const auto run = [&](FfnRun<float>& of, int threads) {
                    const Cpu device{.threads = threads, .isa = isa};
                    of.forward(device, of.pack(device, PackedFor::inference, false, format), of.kept(), of.rows.v);
                };
                run(one, 1), run(three, 3);
                check_same(three, one);
                CHECK(relative_difference(one, full) <= 4e-2);

                FfnRun<float> kept_only(c);
                kept_only.forward({.isa = isa}, kept_only.pack({.isa = isa}, PackedFor::inference, false, format),
                                  kept_only.kept(), {});
                CHECK(std::memcmp(kept_only.kept_up.v.data, one.kept_up.v.data,
                                  static_cast<std::size_t>(one.kept_up.v.size()) * sizeof(float)) == 0);
            }
}

TEST_CASE("weights of int8: instruction sets of one width differ in their dot products, and in no bit") {
    FfnCase c{.rows = {1, 3, 13}, .width = 530, .hidden = 70, .function = Activation::silu, .gated = true};
    const auto run = [&](FfnRun<float>& of, Isa isa) {
        const Cpu device{.isa = isa};
        of.forward(device, of.pack(device, PackedFor::inference, false, PackedFormat::int8), of.kept(), of.rows.v);
    };
    for (const Isa isa : instruction_sets()) {
        if (isa <= Isa::avx512) continue;
        CAPTURE(name_of(isa));
        FfnRun<float> pairs(c), dots(c);
        run(pairs, Isa::avx512), run(dots, isa);
        check_same(dots, pairs);
    }
}
