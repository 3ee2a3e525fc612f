// A routing of made-up logits, and the plan that follows from it.
#pragma once

#include "../huge_memory.hpp"
#include "model.hpp"
#include "steelyard/steelyard.hpp"

namespace steelyard_bench {

class RoutedTokens {
public:
    RoutedTokens(index_t count, index_t experts, int top_k)
        : tokens(count),
          shape{.tokens = count, .width = 1, .experts = experts},
          rule(TopK{.k = top_k}.rule()),
          memory_(static_cast<std::size_t>(bytes_of<Routing<float>>(count, experts, top_k))),
          plan_memory_(static_cast<std::size_t>(bytes_of<Plan<>>(count, experts, top_k))),
          scratch_(static_cast<std::size_t>(std::max({router_ops<Cpu>::scratch_bytes<float>(Cpu{}, shape),
                                                      plan_ops<Cpu>::scratch_bytes(Cpu{}, shape, top_k),
                                                      balance_ops<Cpu>::scratch_bytes(Cpu{}, shape)}))),
          routing(place<Routing<float>>(memory_.as<std::byte>(), count, experts, top_k)),
          plan(place<Plan<>>(plan_memory_.as<std::byte>(), count, experts, top_k)) {
        fill_uniform(routing.logits.data, routing.logits.size(), 5, 1.0);
        select();
        make_plan();
        seen.routing = routing;
        seen.valid_tokens = count;
    }

    void select() const { router_ops<Cpu>::select<float>(Cpu{}, rule, {}, {}, routing, scratch()); }
    void make_plan() const {
        plan_ops<Cpu>::make_plan(Cpu{}, view<const expert_t, 2>(routing.expert), plan, scratch());
    }
    [[nodiscard]] std::byte* scratch() const { return scratch_.as<std::byte>(); }

    index_t tokens;
    LayerShape shape;
    SelectionRule rule;

private:
    HugeMemory memory_, plan_memory_, scratch_;

public:
    Routing<float> routing;
    Plan<> plan;
    Observation<float> seen;
};

}  // namespace steelyard_bench
