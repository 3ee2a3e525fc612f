#include "steelyard/cpu/balance.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "router/routing_case.hpp"
#include "steelyard/balance/z_loss.hpp"

using namespace steelyard;
using reference::Matrix;
using reference::RoutingCase;
using ops = balance_ops<Cpu>;

namespace {

/// 600 tokens of some number of experts: more than two blocks, in padded rows, with a mask and two packed sequences.
struct Seen {
    static constexpr index_t tokens = 600;
    RoutingCase<float> routing;
    std::vector<std::uint8_t> mask;
    std::vector<index_t> sequences{0, 300, tokens};
    Bytes scratch;

    explicit Seen(index_t experts)
        : routing(tokens, experts, 1, 3),
          mask(static_cast<std::size_t>(tokens), 1),
          scratch(ops::scratch_bytes(Cpu{}, {.tokens = tokens, .width = 1, .experts = experts})) {
        for (index_t t = 0; t < tokens; ++t)
            for (index_t e = 0; e < experts; ++e) {
                routing.logits(t, e) = 3.0f * std::sin(static_cast<float>(t * 31 + e * 7));
                routing.probs(t, e) = std::abs(std::cos(static_cast<float>(t * 17 + e)));
            }
        for (std::size_t t = 5; t < mask.size(); t += 7) mask[t] = 0;
    }
    [[nodiscard]] Observation<float> get(bool packed) {
        Observation<float> seen;
        seen.routing = routing.routing();
        seen.tokens.mask = {mask.data(), tokens};
        if (packed) seen.tokens.sequences = {sequences.data(), 3};
        for (const std::uint8_t m : mask) seen.valid_tokens += m;
        return seen;
    }
};

}  // namespace

TEST_CASE("Sums of probabilities and the z-loss agree with plain sums in every instruction set") {
    for (const Isa isa : {Isa::compiled, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16})
        for (const index_t experts : {1, 3, 8, 17, 64, 65, 160, 257}) {
            if (!has_isa(isa)) continue;
            CAPTURE(name_of(isa));
            CAPTURE(experts);
            Seen made(experts);
            for (const bool packed : {false, true}) {
                const index_t segments = packed ? 2 : 1;
                Matrix<double> sums(segments, experts, -1.0), other(segments, experts, -1.0);
                std::vector<std::int64_t> own(2);
                const auto sum = [&](int threads, Matrix<double>& to) {
                    ops::sum_quantity<float, Quantity::probs>(Cpu{threads, isa}, made.get(packed), to.mutable_view(),
                                                              view<std::int64_t, 1>(own.data(), segments),
                                                              made.scratch.data());
                };
                sum(1, sums);
                for (const int threads : {2, 3, 7}) {
                    sum(threads, other);
                    CHECK(other.data == sums.data);
                }
                for (index_t s = 0; s < segments; ++s)
                    for (index_t e = 0; e < experts; ++e) {
                        double want = 0.0;
                        for (index_t t = 0; t < Seen::tokens; ++t)
                            if (made.mask[static_cast<std::size_t>(t)] != 0 && (!packed || t / 300 == s))
                                want += static_cast<double>(made.routing.probs(t, e));
                        REQUIRE(sums(s, e) == doctest::Approx(want).epsilon(1e-13));
                    }
            }

            double want = 0.0;
            Matrix<float> gradient(Seen::tokens, experts, 1.0f, 2), again(Seen::tokens, experts, 1.0f, 2);
            double loss = 0.0, by_three = 0.0;
            ops::sum_tokens(Cpu{1, isa}, made.get(false), ZLoss{}, view<double, 1>(&loss, 1), made.scratch.data());
            ops::sum_tokens(Cpu{3, isa}, made.get(false), ZLoss{}, view<double, 1>(&by_three, 1), made.scratch.data());
            CHECK(by_three == loss);
            ops::add_token_gradient(Cpu{1, isa}, made.get(false), ZLoss{}, 0.5, gradient.mutable_view());
            ops::add_token_gradient(Cpu{3, isa}, made.get(false), ZLoss{}, 0.5, again.mutable_view());
            CHECK(again.data == gradient.data);
            CHECK(gradient.padding_is(1.0f));
            for (index_t t = 0; t < Seen::tokens; ++t) {
                const bool valid = made.mask[static_cast<std::size_t>(t)] != 0;
                double total = 0.0;
                for (index_t e = 0; e < experts; ++e) total += std::exp(static_cast<double>(made.routing.logits(t, e)));
                const double lse = std::log(total);
                if (valid) want += lse * lse;
                for (index_t e = 0; e < experts; ++e) {
                    const double p = std::exp(static_cast<double>(made.routing.logits(t, e)) - lse);
                    REQUIRE(std::abs(static_cast<double>(gradient(t, e)) - (1.0 + (valid ? lse * p : 0.0))) < 2e-6);
                }
            }
            CHECK(loss == doctest::Approx(want).epsilon(1e-6));
        }
}
