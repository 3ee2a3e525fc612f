#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "steelyard/balance/z_loss.hpp"

namespace {

using namespace steelyard;

template <class T>
double loss_of(const std::vector<T>& logits) {
    return ZLoss{}.loss(view<const T, 1>(logits.data(), static_cast<index_t>(logits.size())));
}

template <class T>
std::vector<T> gradient_of(const std::vector<T>& logits, double factor, T before = 0) {
    std::vector<T> gradient(logits.size(), before);
    const auto experts = static_cast<index_t>(logits.size());
    ZLoss{}.gradient(view<const T, 1>(logits.data(), experts), factor, view<T, 1>(gradient.data(), experts));
    return gradient;
}

}  // namespace

TEST_CASE("the z-loss of equal logits is log(E) squared, and pulls at all alike") {
    CHECK(loss_of<double>({0, 0, 0, 0}) == doctest::Approx(std::log(4.0) * std::log(4.0)).epsilon(1e-15));
    for (const double g : gradient_of<double>({0, 0, 0, 0}, 3.0))
        CHECK(g == doctest::Approx(3.0 * 2 * std::log(4.0) / 4).epsilon(1e-15));
}

TEST_CASE("the gradient of the z-loss is added to what is there") {
    CHECK(gradient_of<double>({0.0}, 1.0, 5.0)[0] == 5.0);  // log-sum-exp 0
    CHECK(gradient_of<double>({2.0}, 0.5, 5.0)[0] == doctest::Approx(7.0));
}

TEST_CASE("the z-loss of huge logits stays finite and exact") {
    CHECK(loss_of<double>({1e4, -1e4}) == doctest::Approx(1e8));
    CHECK(loss_of<double>({-1e4, -1e4}) == doctest::Approx(std::pow(-1e4 + std::log(2.0), 2)));
    CHECK(std::isfinite(loss_of<float>({3e4f, 1.0f})));
    for (const float g : gradient_of<float>({3e4f, -3e4f}, 1e-6)) CHECK(std::isfinite(g));
}
