// How much experts specialise: which domain goes to which expert.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "steelyard/core/routing.hpp"

namespace steelyard {

/// table [E, D] (+=) the choices of each expert by the domain of each token. `domains` [T] holds ids below D.
template <class T>
void count_by_domain(const Routing<T>& routing, view<const std::int32_t, 1> domains, view<std::int64_t, 2> table) {
    for (index_t t = 0; t < routing.expert.extents[0]; ++t)
        for (index_t k = 0; k < routing.expert.extents[1]; ++k)
            if (const expert_t e = routing.expert(t, k); e >= 0) ++table(e, domains[t]);
}

/// What an expert-by-domain table says.
struct Specialization {
    double mutual_information = 0;  ///< I(expert; domain) in nats: 0 where every domain is routed alike
    double largest_share = 0;       ///< the largest share of one expert within one domain; 1/E is no preference
};

/// Specialisation from choices [E, D]. Domains are weighed by their choices. Empty tables and domains give 0.
[[nodiscard]] inline Specialization measure_specialization(view<const std::int64_t, 2> table) {
    Specialization result;
    const index_t experts = table.extents[0], domains = table.extents[1];
    double total = 0;
    for (index_t e = 0; e < experts; ++e)
        for (index_t d = 0; d < domains; ++d) total += static_cast<double>(table(e, d));
    if (total == 0) return result;
    for (index_t d = 0; d < domains; ++d) {
        double of_domain = 0;
        for (index_t e = 0; e < experts; ++e) of_domain += static_cast<double>(table(e, d));
        if (of_domain == 0) continue;
        for (index_t e = 0; e < experts; ++e) {
            const auto both = static_cast<double>(table(e, d));
            if (both == 0) continue;
            double of_expert = 0;
            for (index_t other = 0; other < domains; ++other) of_expert += static_cast<double>(table(e, other));
            result.mutual_information += both / total * std::log(both * total / (of_domain * of_expert));
            result.largest_share = std::max(result.largest_share, both / of_domain);
        }
    }
    return result;
}

}  // namespace steelyard
