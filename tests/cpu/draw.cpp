// Random numbers by the row are those that RouterNoise defines.
#include "steelyard/cpu/draw.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/instruction_sets.hpp"

using namespace steelyard;
using steelyard::testing::instruction_sets;

namespace {

const RouterNoise noise{.jitter = 0.25, .noise = 0.5, .seed = 11, .step = {.step = 2, .token_offset = 100}, .layer = 3};

/// A row drawn at once, with a number behind it that stays.
template <class T, class Draw>
std::vector<T> drawn(index_t elements, Draw&& draw) {
    std::vector<T> out(static_cast<std::size_t>(elements) + 1, T(-99));
    draw(out.data());
    CHECK(out.back() == T(-99));
    out.pop_back();
    return out;
}

}  // namespace

TEST_CASE_TEMPLATE("A row's jitter and noise are RouterNoise's, element by element", T, float, double) {
    const double epsilon = std::numeric_limits<T>::epsilon();
    for (const Isa isa : instruction_sets()) {
        const Cpu device{.threads = 1, .isa = isa};
        for (const index_t n : {1, 3, 4, 15, 16, 17, 33, 64, 131})
            for (const index_t token : {index_t{0}, index_t{7}, index_t{1} << 33}) {
                CAPTURE(name_of(isa));
                CAPTURE(n);
                std::vector<T> x;
                for (index_t j = 0; j < n; ++j) x.push_back(static_cast<T>(0.5 + 0.01 * static_cast<double>(j)));
                const auto jittered = drawn<T>(n, [&](T* out) {
                    cpu::jitter_row<T>(device, noise, {token, n, 0, n}, x.data(), out);
                });
                const auto normal = drawn<T>(n, [&](T* out) {
                    cpu::noise_row<T>(device, noise, {token, n, 0, n}, out);
                });
                for (index_t j = 0; j < n; ++j) {
                    const auto at = static_cast<std::size_t>(j), entry = at % 4;
                    const auto block = static_cast<std::uint64_t>(j / 4), position = noise.position(token);
                    const double factor = noise.jitter_factors(noise.jitter_stream(), position, block, n)[entry];
                    const double added = noise.logit_noise(noise.noise_stream(), position, block, n)[entry];
                    CHECK(std::abs(jittered[at] - factor * x[at]) <= 2 * epsilon * x[at]);
                    CHECK(std::abs(normal[at] - added) <= 2 * epsilon * std::abs(added) + 1e-15);
                }
                // In place, and from a block in the middle on: the same bits.
                const index_t begin = n / 2 / 4 * 4;
                cpu::jitter_row<T>(device, noise, {token, n, begin, n}, x.data() + begin, x.data() + begin);
                CHECK(std::memcmp(x.data() + begin, jittered.data() + begin,
                                  static_cast<std::size_t>(n - begin) * sizeof(T)) == 0);
                const auto rest = drawn<T>(n - begin, [&](T* out) {
                    cpu::noise_row<T>(device, noise, {token, n, begin, n}, out);
                });
                CHECK(std::memcmp(rest.data(), normal.data() + begin, rest.size() * sizeof(T)) == 0);
            }
    }
}

TEST_CASE("Noise reaches as far as a uniform number of 32 bits lets it, and its logarithm is never infinite") {
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        double largest = 0.0, squares = 0.0, fourth = 0.0;
        constexpr index_t tokens = 4096, n = 64;
        std::vector<float> row(n);
        for (index_t t = 0; t < tokens; ++t) {
            cpu::noise_row<float>({.threads = 1, .isa = isa}, noise, {t, n, 0, n}, row.data());
            for (const float v : row) {
                const double z = v / noise.noise;
                largest = std::max(largest, std::abs(z));
                squares += z * z / (tokens * n);
                fourth += z * z * z * z / (tokens * n);
            }
        }
        CHECK(largest > 4.0);
        CHECK(largest < 6.7);
        CHECK(squares == doctest::Approx(1.0).epsilon(0.01));
        CHECK(fourth == doctest::Approx(3.0).epsilon(0.03));
    }
}
