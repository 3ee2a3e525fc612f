// Dispatch and combine, against copies of as many bytes.
#include <memory>

#include "routed_tokens.hpp"
#include "stages.hpp"

namespace steelyard_bench {
namespace {

constexpr index_t tokens = 4096, width = 512, experts = 64;  // layer A
constexpr int top_k = 4;

struct Rows {
    RoutedTokens routed{tokens, experts, top_k};
    HugeMemory memory{static_cast<std::size_t>(2 * tokens * (top_k + 1) * width) * sizeof(float)};
    view<float, 2> x{memory.as<float>(), tokens, width};
    view<float, 2> rows{memory.as<float>() + tokens * width, tokens* top_k, width};
    Rows() { fill_uniform(memory.as<float>(), static_cast<index_t>(memory.size() / sizeof(float)), 8, 1.0); }
};

/// GB/s beside the better of an ordinary and a non-temporal copy that reads and writes as many bytes, half of each.
void add(std::vector<Stage>& stages, const std::string& name, index_t bytes, const std::shared_ptr<Rows>& at,
         std::function<void()> body) {
    stages.push_back(
        {{.name = name, .unit = "GB/s", .limit = "the best copy of as many bytes"}, [=](StageResult& result) {
             const auto* const from = at->memory.as<std::byte>();
             auto* const to = at->memory.as<std::byte>() + at->memory.size() / 2;
             const auto count = static_cast<std::size_t>(bytes / 2);
             const double copied = std::min(seconds_of([&] { copy_ordinary(from, to, count); }),
                                            seconds_of([&] { copy_streaming(from, to, count); }));
             const double seconds = seconds_of(body);
             result.add(static_cast<double>(bytes) * 1e-9 / seconds, copied / seconds);
         }});
}

}  // namespace

void add_row_stages(std::vector<Stage>& stages) {
    const auto at = std::make_shared<Rows>();
    constexpr index_t row = width * index_t{sizeof(float)};
    constexpr index_t dispatched = 2 * tokens * top_k * row, combined = tokens * (top_k + 1) * row;
    add(stages, "dispatch, A (bytes read + written)", dispatched, at,
        [at] { plan_ops<Cpu>::dispatch<float>(Cpu{}, at->routed.plan, view<const float, 2>(at->x), at->rows); });
    add(stages, "combine, A (bytes read + written)", combined, at, [at] {
        plan_ops<Cpu>::combine<float>(Cpu{}, at->routed.plan, view<const float, 2>(at->rows),
                                      view<const float, 2>(at->routed.routing.weight), at->x);
    });
}

}  // namespace steelyard_bench
