// A backend for which a program does not link if it so much as mentions a communication call.
#pragma once

#include <cstdint>
#include <span>

#include "steelyard/comm/concept.hpp"

namespace steelyard::testing {

/// A `CommBackend` in the eyes of the concept. The sums are declared and never defined.
struct UntouchableComm {
    int rank() const { return 0; }
    int size() const { return 2; }
    Status begin_sum(std::span<std::int64_t> words) const;
    Status end_sum(std::span<std::int64_t> words) const;
};

static_assert(CommBackend<UntouchableComm>);

}  // namespace steelyard::testing
