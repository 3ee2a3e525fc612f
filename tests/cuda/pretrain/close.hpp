// What tests of pretrain on the GPU share: its GPU, and a comparison that says what is off, and by how much.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <string>

#include "pretrain/cuda/gpu_ops.hpp"

namespace test {

inline const pretrain::Gpu& gpu() {
    static const pretrain::Gpu one;
    return one;
}
/// Waits; nothing went wrong.
inline void finish() {
    const steelyard::Status status = gpu().finish();
    REQUIRE_MESSAGE(status.ok(), status.message());
}

/// |got - want| / |want|, of all numbers together; of a NaN, infinity.
template <class T, class U>
double distance(std::span<const T> got, std::span<const U> want) {
    REQUIRE(got.size() == want.size());
    double off = 0, norm = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
        const double a = static_cast<double>(got[i]), b = static_cast<double>(want[i]);
        off += (a - b) * (a - b), norm += b * b;
    }
    const double relative = norm > 0 ? std::sqrt(off / norm) : std::sqrt(off);
    return std::isfinite(relative) ? relative : HUGE_VAL;
}

inline void check_close(const std::string& what, double off, double tolerance) {
    CHECK_MESSAGE(off <= tolerance, what, " is off by ", off, ", where ", tolerance, " is allowed");
}
template <class T, class U>
void check_close(const std::string& what, std::span<const T> got, std::span<const U> want, double tolerance) {
    check_close(what, distance(got, want), tolerance);
}

}  // namespace test
