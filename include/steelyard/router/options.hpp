// What routers refuse of their options, and the words for it.
#pragma once

#include <cmath>
#include <string>
#include <string_view>
#include <utility>

#include "steelyard/core/shape.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard::detail {

[[nodiscard]] inline Status refuse_option(std::string_view option, std::string expected, std::string came) {
    return Status::refuse(Code::invalid_argument, "router", option, std::move(expected), std::move(came));
}

/// There is an expert.
[[nodiscard]] inline Status check_experts(const LayerShape& shape) {
    return shape.experts < 1 ? refuse_option("experts", "at least 1", std::to_string(shape.experts)) : Status{};
}

/// There is an expert, and something to score it by.
[[nodiscard]] inline Status check_scored(const LayerShape& shape) {
    if (Status s = check_experts(shape); !s) return s;
    return shape.width < 1 ? refuse_option("width", "at least 1", std::to_string(shape.width)) : Status{};
}

/// 1 to E.
[[nodiscard]] inline Status check_choices(std::string_view option, int k, const LayerShape& shape) {
    if (k >= 1 && k <= shape.experts) return {};
    return refuse_option(option, "1 to " + std::to_string(shape.experts) + " (the number of experts)",
                         std::to_string(k));
}

[[nodiscard]] inline Status check_divides_experts(std::string_view option, index_t groups, const LayerShape& shape) {
    if (groups >= 1 && shape.experts % groups == 0) return {};
    return refuse_option(option, "a divisor of " + std::to_string(shape.experts) + " (the number of experts)",
                         std::to_string(groups));
}

[[nodiscard]] inline Status check_positive(std::string_view option, double value) {
    if (std::isfinite(value) && value > 0.0) return {};
    return refuse_option(option, "a finite number above 0", std::to_string(value));
}

[[nodiscard]] inline Status check_not_negative(std::string_view option, double value) {
    if (std::isfinite(value) && value >= 0.0) return {};
    return refuse_option(option, "a finite number that is not negative", std::to_string(value));
}

}  // namespace steelyard::detail
