// What routers without parameters share: fixed weights and refusals.
#pragma once

#include <string>
#include <type_traits>

#include "steelyard/ops/assign_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// The combine weights of a router without scores.
enum class FixedWeight {
    mean,  ///< 1 / K: the mean of the experts
    one,   ///< 1: their sum
};

/// Each of K experts weighs this much.
[[nodiscard]] constexpr double fixed_weight(FixedWeight weight, index_t top_k) {
    return weight == FixedWeight::one ? 1.0 : 1.0 / static_cast<double>(top_k);
}

namespace detail::fixed {

inline Status check(int k, FixedWeight weight, const LayerShape& shape) {
    if (Status s = check_experts(shape); !s) return s;
    if (Status s = check_choices("top_k", k, shape); !s) return s;
    if (weight != FixedWeight::mean && weight != FixedWeight::one)
        return refuse_option("weight", "mean or one", std::to_string(static_cast<int>(weight)));
    return {};
}

/// Refuses a call with fewer ids than tokens.
template <class Space>
Status check_ids(const TokenInfo<Space>& info, index_t tokens) {
    const index_t came = info.ids.present() ? info.ids.extents[0] : 0;
    if (came >= tokens) return {};
    return refuse_option("ids, token " + std::to_string(came),
                         "an id for each of the " + std::to_string(tokens) + " tokens",
                         came == 0 ? "no ids" : std::to_string(came) + " ids");
}

/// The refusal of a token whose id is not in [0, ids).
template <class Space>
Status refuse_id(const TokenInfo<Space>& info, index_t token, index_t ids) {
    std::string came = "another";
    if constexpr (std::is_same_v<Space, HostSpace>) came = std::to_string(info.ids[token]);
    return refuse_option("ids, token " + std::to_string(token),
                         ids > 0 ? "0 to " + std::to_string(ids - 1) : "an id that is known; there are none", came);
}

}  // namespace detail::fixed

}  // namespace steelyard
