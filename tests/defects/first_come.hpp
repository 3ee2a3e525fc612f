// An overflow rule for tests: an expert takes its first `capacity` choices by token, and drops the rest.
#pragma once

#include <string>

#include "steelyard/plan/overflow.hpp"

namespace steelyard::testing {

struct FirstCome {
    static constexpr bool drops = true;
    index_t capacity = 1;

    [[nodiscard]] Status check(const LayerShape&, int) const {
        if (capacity >= 0) return {};
        return Status::refuse(Code::invalid_argument, "FirstCome", "capacity", "at least 0", std::to_string(capacity));
    }
    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device&, const LayerShape& shape, int) const {
        return shape.experts * static_cast<index_t>(sizeof(index_t));
    }
    template <class T, class Device>
    void admit(const Device&, const Routing<T>& routing, const TokenInfo<>&, view<expert_t, 2> choices,
               std::byte* scratch) const {
        const view<index_t, 1> taken(reinterpret_cast<index_t*>(scratch), routing.probs.extents[1]);
        for (index_t e = 0; e < taken.extents[0]; ++e) taken[e] = 0;
        for (index_t t = 0; t < choices.extents[0]; ++t)
            for (index_t k = 0; k < choices.extents[1]; ++k)
                if (expert_t& choice = choices(t, k); choice >= 0 && taken[choice]++ >= capacity) choice = -1;
    }
    friend bool operator==(const FirstCome&, const FirstCome&) = default;
};

static_assert(Overflow<FirstCome>);

}  // namespace steelyard::testing
