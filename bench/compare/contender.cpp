#include "contender.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace steelyard_bench {
namespace {

double part_error(const std::vector<float>& found, const std::vector<float>& expected) {
    if (found.size() != expected.size()) return std::numeric_limits<double>::infinity();
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
        const double d = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
        difference += d * d;
        norm += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
    }
    const double error = norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
    return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

}  // namespace

std::vector<Entry>& entries() {
    static std::vector<Entry> all;
    return all;
}

PeerOptions& peer_options() {
    static PeerOptions options;
    return options;
}

double relative_error(const Outcome& found, const Outcome& expected) {
    double worst = 0;
    for (const auto part : {&Outcome::y, &Outcome::dx, &Outcome::router, &Outcome::gate, &Outcome::up, &Outcome::down})
        worst = std::max(worst, part_error(found.*part, expected.*part));
    return worst;
}

double tolerance(Type type) {
    constexpr double most[] = {1e-4, 2e-2, 5e-2};
    return most[static_cast<int>(type)];
}

}  // namespace steelyard_bench
