// The overflow rule of docs/policies/overflow.md.
#include <doctest/doctest.h>

#include <cmath>

#include "steelyard/plan/laws.hpp"
#include "steelyard/steelyard.hpp"

namespace docs_overflow {

using namespace steelyard;

/// Each expert takes ceil(factor K T / E) choices, first come, first served; later ones are dropped.
struct Capacity {
    double factor = 1.25;
    static constexpr bool drops = true;

    Status check(const LayerShape&, int /*top_k*/) const {
        if (factor > 0.0) return {};
        return Status::refuse(Code::invalid_argument, "Capacity", "factor", "more than 0", std::to_string(factor));
    }

    template <class T, class Device>
    index_t scratch_bytes(const Device&, const LayerShape& shape, int /*top_k*/) const {
        return shape.experts * static_cast<index_t>(sizeof(index_t));
    }

    template <class T, class Device>
    void admit(const Device&, const Routing<T>& routing, const TokenInfo<>&, view<expert_t, 2> choices,
               std::byte* scratch) const {
        const index_t tokens = choices.extents[0], top_k = choices.extents[1], experts = routing.probs.extents[1];
        const double share = static_cast<double>(tokens * top_k) / static_cast<double>(experts);
        const auto capacity = static_cast<index_t>(std::ceil(factor * share));
        const view<index_t, 1> taken(reinterpret_cast<index_t*>(scratch), experts);
        for (index_t e = 0; e < experts; ++e) taken[e] = 0;
        for (index_t k = 0; k < top_k; ++k)  // all first choices before any second one
            for (index_t t = 0; t < tokens; ++t)
                if (expert_t& e = choices(t, k); e >= 0 && ++taken[e] > capacity) e = -1;
    }

    friend bool operator==(const Capacity&, const Capacity&) = default;
};

static_assert(Overflow<Capacity>);

using Layer = MoE<float, TopK, SwiGlu, MicroBatchLoss, SelfComm, Capacity>;

}  // namespace docs_overflow

using namespace docs_overflow;

TEST_CASE("the overflow rule of the documentation obeys the laws of overflow rules") {
    for (const int top_k : {1, 2, 4}) {
        const LayerShape shape{.tokens = 40, .width = 5, .experts = 4};
        const Status laws = check_overflow_laws(Capacity{1.0}, shape, top_k, Cpu{});
        CHECK_MESSAGE(laws.ok(), laws.message());
    }
}

TEST_CASE("a layer with the overflow rule of the documentation computes no more rows than the capacity") {
    const LayerShape shape{.tokens = 40, .width = 8, .experts = 4};
    Module moe(Layer({.shape = shape, .router = {.k = 2}, .expert = {.hidden = 8}, .overflow = {.factor = 0.5}}));
    std::vector<float> x(40 * 8, 0.5f), y(40 * 8);  // equal tokens all want the same two experts
    moe.forward({x.data(), 40, 8}, {y.data(), 40, 8});
    const auto plan = moe.layer().plan(moe.context());
    CHECK(plan.offsets(4) == 2 * 10);
    CHECK(moe.routing().expert(39, 0) >= 0);  // the routing is as the router made it
}
