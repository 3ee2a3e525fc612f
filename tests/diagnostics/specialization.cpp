#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "steelyard/diagnostics/specialization.hpp"

namespace {

using namespace steelyard;

Specialization of(std::vector<std::int64_t> table, index_t experts, index_t domains) {
    return measure_specialization(view<const std::int64_t, 2>(table.data(), experts, domains));
}

}  // namespace

TEST_CASE("choices are counted by expert and domain, padding left out") {
    const std::vector<expert_t> chosen{0, 1, 1, 0, -1, -1};
    Routing<float> routing;
    routing.expert = {const_cast<expert_t*>(chosen.data()), 3, 2};
    const std::vector<std::int32_t> domains{0, 2, 1};
    std::vector<std::int64_t> table(6, 10);
    count_by_domain(routing, {domains.data(), 3}, view<std::int64_t, 2>(table.data(), 2, 3));
    CHECK(table == std::vector<std::int64_t>{11, 10, 11, 11, 10, 11});
}

TEST_CASE("an expert for each domain has the mutual information log(D), for equal domains") {
    const auto two = of({5, 0, 0, 5}, 2, 2);
    CHECK(two.mutual_information == doctest::Approx(std::log(2.0)));
    CHECK(two.largest_share == 1.0);
    CHECK(of({3, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0}, 4, 3).mutual_information == doctest::Approx(std::log(3.0)));
}

TEST_CASE("domains that are routed alike have no mutual information, whatever their sizes") {
    const auto alike = of({1, 10, 3, 30}, 2, 2);
    CHECK(alike.mutual_information == doctest::Approx(0.0));
    CHECK(alike.largest_share == doctest::Approx(0.75));
    CHECK(of({4, 4, 4, 4, 4, 4}, 3, 2).largest_share == doctest::Approx(1.0 / 3));
}

TEST_CASE("the mutual information of a mixed table by hand") {
    // Joint (3, 1; 1, 3) / 8, uniform margins: sum p log(4 p).
    const double expected = 2 * 0.375 * std::log(1.5) + 2 * 0.125 * std::log(0.5);
    CHECK(of({3, 1, 1, 3}, 2, 2).mutual_information == doctest::Approx(expected));
}

TEST_CASE("empty tables and empty domains give 0") {
    CHECK(of({0, 0, 0, 0}, 2, 2).mutual_information == 0.0);
    CHECK(of({0, 0, 0, 0}, 2, 2).largest_share == 0.0);
    const auto one_domain = of({0, 6, 0, 2}, 2, 2);
    CHECK(one_domain.mutual_information == doctest::Approx(0.0));
    CHECK(one_domain.largest_share == 0.75);
}
