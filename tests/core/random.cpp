#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "steelyard/core/random.hpp"

using namespace steelyard;

namespace {

using Words = std::array<std::uint32_t, 4>;

/// Undoes the folding of stream and layer into the key, so that Philox runs with exactly (k0, k1).
Philox with_key(std::uint32_t k0, std::uint32_t k1, std::uint64_t high) {
    const std::uint32_t folded = static_cast<std::uint32_t>(Stream::user) * 0x9E3779B9u;
    return Philox((std::uint64_t{k1} << 32) | (k0 ^ folded), Stream::user, high);
}

std::uint64_t join(std::uint32_t low, std::uint32_t high) { return (std::uint64_t{high} << 32) | low; }

}  // namespace

// The known answers are those of Random123's file kat_vectors, "philox4x32 10".
TEST_CASE("Philox gives Random123's known answers") {
    CHECK(with_key(0, 0, 0).words(0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});

    const std::uint32_t ones = 0xffffffff;
    CHECK(with_key(ones, ones, join(ones, ones)).words(join(ones, ones)) ==
          Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});

    // Counter and key from the digits of pi.
    CHECK(with_key(0xa4093822, 0x299f31d0, join(0x13198a2e, 0x03707344)).words(join(0x243f6a88, 0x85a308d3)) ==
          Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("a random number is a constant expression of what it is drawn for") {
    constexpr Words words = Philox(1, Stream::jitter, 2, 3).words(4);
    CHECK(words == Philox(1, Stream::jitter, 2, 3).words(4));
}

TEST_CASE("every part of the key and of the counter matters") {
    const Words base = Philox(1, Stream::noise, 10, 2).words(5);
    CHECK(Philox(2, Stream::noise, 10, 2).words(5) != base);
    CHECK(Philox(1 + (1ULL << 32), Stream::noise, 10, 2).words(5) != base);
    CHECK(Philox(1, Stream::jitter, 10, 2).words(5) != base);
    CHECK(Philox(1, Stream::noise, 11, 2).words(5) != base);
    CHECK(Philox(1, Stream::noise, 10 + (1ULL << 32), 2).words(5) != base);
    CHECK(Philox(1, Stream::noise, 10, 3).words(5) != base);
    CHECK(Philox(1, Stream::noise, 10, 2).words(6) != base);
    CHECK(Philox(1, Stream::noise, 10, 2).words(5 + (1ULL << 32)) != base);
}

TEST_CASE("streams, layers and steps do not repeat one another") {
    std::set<Words> seen;
    int drawn = 0;
    for (const Stream stream :
         {Stream::jitter, Stream::noise, Stream::shuffle, Stream::init, Stream::data, Stream::user})
        for (std::uint32_t layer = 0; layer < 8; ++layer)
            for (std::uint64_t step = 0; step < 8; ++step)
                for (std::uint64_t index = 0; index < 8; ++index, ++drawn)
                    seen.insert(Philox(42, stream, step, layer).words(index));
    CHECK(static_cast<int>(seen.size()) == drawn);
}

TEST_CASE("a uniform number lies in [0, 1), with the moments of the uniform distribution") {
    const Philox random(3, Stream::user);
    const int n = 100000;
    double sum = 0, squares = 0, least = 1, most = 0;
    for (int i = 0; i < n; ++i) {
        const double u = random.uniform(static_cast<std::uint64_t>(i));
        sum += u;
        squares += u * u;
        least = std::min(least, u);
        most = std::max(most, u);
    }
    CHECK(least >= 0.0);
    CHECK(most < 1.0);
    // Five standard errors of the mean, sqrt(1/12 / n), and of the mean square, sqrt(4/45 / n).
    CHECK(std::abs(sum / n - 1.0 / 2) < 5 * std::sqrt(1.0 / 12 / n));
    CHECK(std::abs(squares / n - 1.0 / 3) < 5 * std::sqrt(4.0 / 45 / n));
}

TEST_CASE("a uniform number has 53 bits: the first two words, shifted") {
    const Philox random(3, Stream::user);
    const Words words = random.words(9);
    const std::uint64_t bits = ((std::uint64_t{words[0]} << 32) | words[1]) >> 11;
    CHECK(random.uniform(9) == static_cast<double>(bits) / 9007199254740992.0);
}

TEST_CASE("a normal number is finite, with mean 0, variance 1 and fourth moment 3") {
    const Philox random(4, Stream::noise);
    const int n = 100000;
    double first = 0, second = 0, fourth = 0;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        const double z = random.normal(static_cast<std::uint64_t>(i));
        finite = finite && std::isfinite(z);
        first += z;
        second += z * z;
        fourth += z * z * z * z;
    }
    CHECK(finite);
    CHECK(std::abs(first / n) < 5 * std::sqrt(1.0 / n));
    CHECK(std::abs(second / n - 1) < 5 * std::sqrt(2.0 / n));
    CHECK(std::abs(fourth / n - 3) < 5 * std::sqrt(96.0 / n));
}

TEST_CASE("a normal number is Box and Muller of the first two words, the first moved off zero") {
    const Philox random(4, Stream::noise);
    const Words words = random.words(9);
    const double radius = std::sqrt(-2 * std::log((words[0] + 0.5) / 4294967296.0));
    const double angle = 2 * std::acos(-1.0) * (words[1] / 4294967296.0);
    CHECK(random.normal(9) == doctest::Approx(radius * std::cos(angle)).epsilon(1e-12));
}

TEST_CASE("a number below a bound takes each value about equally often, and bound 1 gives only 0") {
    const Philox random(5, Stream::shuffle);
    const int bound = 7, n = 70000;
    std::vector<int> count(bound, 0);
    for (int i = 0; i < n; ++i) ++count.at(random.below(static_cast<std::uint64_t>(i), bound));
    double chi_squared = 0;
    for (const int c : count) chi_squared += (c - 10000.0) * (c - 10000.0) / 10000.0;
    CHECK(chi_squared < 33.1);  // six degrees of freedom: exceeded once in 100,000
    CHECK(random.below(0, 1) == 0);
    CHECK(random.below(123, 1) == 0);
}
