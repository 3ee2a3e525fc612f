#include "stages.hpp"

#include <memory>
#include <regex>

#include "routed_tokens.hpp"

namespace steelyard_bench {
namespace {

std::string size_name(const RoutedTokens& of) {
    return "E=" + std::to_string(of.shape.experts) + " K=" + std::to_string(of.rule.top_k);
}

/// Nanoseconds a token.
void add_time(std::vector<Stage>& stages, const std::string& name, const std::shared_ptr<RoutedTokens>& tokens,
              std::function<void()> body) {
    stages.push_back({{.name = name + ", " + size_name(*tokens), .unit = "ns/token"},
                      [tokens, body = std::move(body)](StageResult& result) {
                          result.add(seconds_of(body) * 1e9 / static_cast<double>(tokens->tokens));
                      }});
}

}  // namespace

void add_products(std::vector<Stage>& stages, std::string name, double flops, std::function<void()> body) {
    stages.push_back({{.name = std::move(name), .unit = "GFLOP/s", .limit = "the multiply-add peak"},
                      [flops, body = std::move(body)](StageResult& result) {
                          body();  // the caches are warm
                          const double rate = flops * 1e-9 / seconds_of(body);
                          result.add(rate, rate / fma_gflops_now(1));
                      }});
}

void add_router_stages(std::vector<Stage>& stages) {
    using Ops = balance_ops<Cpu>;
    for (const auto& [experts, top_k] : {std::pair{64, 4}, std::pair{256, 8}}) {
        const auto tokens = std::make_shared<RoutedTokens>(4096, experts, top_k);
        const auto sums = std::make_shared<std::vector<double>>(experts);
        const auto words = std::make_shared<std::vector<std::int64_t>>(experts + 2);
        const auto count = [=] {
            Ops::count(Cpu{}, tokens->seen, view<std::int64_t, 2>(words->data(), 1, experts + 1));
        };
        const auto sum = [=] {
            Ops::sum_quantity<float, Quantity::probs>(Cpu{}, tokens->seen, view<double, 2>(sums->data(), 1, experts),
                                                      view<std::int64_t, 1>(&words->back(), 1), tokens->scratch());
        };
        add_time(stages, "router: softmax and top-k", tokens, [=] { tokens->select(); });
        add_time(stages, "router: statistics (counts, mean probabilities)", tokens, [=] { count(), sum(); });
        add_time(stages, "router: all of these", tokens, [=] { tokens->select(), count(), sum(); });
        add_time(stages, "router: z-loss", tokens,
                 [=] {
                     double loss = 0.0;
                     Ops::sum_tokens(Cpu{}, tokens->seen, ZLoss{}, view<double, 1>(&loss, 1), tokens->scratch());
                 });
        add_time(stages, "plan", tokens, [=] { tokens->make_plan(); });
    }
}

std::vector<StageResult> measure_stages(const StageOptions& options) {
    std::vector<Stage> stages;
    add_expert_stages(stages);
    add_kernel_stages(stages);
    add_router_stages(stages);
    add_row_stages(stages);
    add_balance_stages(stages);
    const std::regex filter(options.filter);
    std::erase_if(stages, [&](const Stage& stage) {
        return !options.filter.empty() && !std::regex_search(stage.result.name, filter);
    });
    for (int round = 0; round < options.rounds; ++round)
        for (Stage& stage : stages) stage.sample(stage.result);
    std::vector<StageResult> results;
    for (Stage& stage : stages) results.push_back(std::move(stage.result));
    return results;
}

}  // namespace steelyard_bench
