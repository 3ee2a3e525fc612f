#include <doctest/doctest.h>

#include <numeric>
#include <vector>

#include "steelyard/balance/loss_free_bias.hpp"

namespace {

using namespace steelyard;

std::vector<float> updated(const LossFreeBias& objective, const std::vector<std::int64_t>& counts,
                           std::vector<float> bias = {}) {
    const auto experts = static_cast<index_t>(counts.size());
    bias.resize(counts.size());
    objective.update({counts.data(), experts}, {bias.data(), experts});
    return bias;
}

}  // namespace

TEST_CASE("the bias of a starved expert rises by the rate, that of an overloaded one falls, the mean's stays") {
    CHECK(updated({.rate = 0.25}, {0, 4, 8, 4}) == std::vector<float>{0.25f, 0.0f, -0.25f, 0.0f});
    CHECK(updated({.rate = 0.25}, {1, 9, 2}, {1.0f, 2.0f, 3.0f}) == std::vector<float>{1.25f, 1.75f, 3.25f});
}

TEST_CASE("a balanced load, or none, leaves the bias alone") {
    CHECK(updated({}, {5, 5, 5}, {0.1f, 0.2f, 0.3f}) == std::vector<float>{0.1f, 0.2f, 0.3f});
    CHECK(updated({}, {0, 0, 0}, {0.1f, 0.2f, 0.3f}) == std::vector<float>{0.1f, 0.2f, 0.3f});
}

TEST_CASE("a centred update takes its mean off, so that the biases keep their sum") {
    // Signs (1, 1, 1, -1): mean 1/2.
    CHECK(updated({.rate = 0.5, .centred = true}, {1, 1, 1, 97}) == std::vector<float>{0.25f, 0.25f, 0.25f, -0.75f});
    std::vector<float> bias{0.5f, -0.25f, 0.0f, 0.25f, 0.0f};
    for (const std::int64_t heavy : {3, 50, 700})
        bias = updated({.rate = 1.0, .centred = true}, {0, heavy, 2, 9, 1}, bias);
    CHECK(std::accumulate(bias.begin(), bias.end(), 0.0) == doctest::Approx(0.5).epsilon(1e-6));
}

TEST_CASE("the mean is compared in integers: one choice in 2^61 decides") {
    const std::int64_t many = std::int64_t{1} << 61;
    CHECK(updated({.rate = 1.0}, {many, many + 1}) == std::vector<float>{1.0f, -1.0f});
    CHECK(updated({.rate = 1.0}, {many, many}) == std::vector<float>{0.0f, 0.0f});
}
