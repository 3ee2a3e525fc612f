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
    Rows() { fill_uniform(x.data, x.size() + rows.size(), 8, 1.0); }
};

/// GB/s beside a memcpy of the same number of bytes, out of a block as large into one as large.
void add(std::vector<Stage>& stages, const std::string& name, double bytes, std::function<void()> body,
         std::function<void()> copy) {
    stages.push_back({{.name = name, .unit = "GB/s", .limit = "a copy of as many bytes"}, [=](StageResult& result) {
                          const double copied = seconds_of(copy), seconds = seconds_of(body);
                          result.add(bytes * 1e-9 / seconds, copied / seconds);
                      }});
}

}  // namespace

void add_row_stages(std::vector<Stage>& stages) {
    const auto at = std::make_shared<Rows>();
    const auto copy_of = [at](index_t bytes) {  // half of them are read, half written
        return [at, count = static_cast<std::size_t>(bytes / 2)] {
            std::memcpy(at->memory.as<char>() + at->memory.size() / 2, at->memory.as<char>(), count);
        };
    };
    constexpr index_t row = width * index_t{sizeof(float)};
    constexpr index_t dispatched = 2 * tokens * top_k * row, combined = tokens * (top_k + 1) * row;
    add(
        stages, "dispatch, A (bytes read + written)", dispatched,
        [at] { plan_ops<Cpu>::dispatch<float>(Cpu{}, at->routed.plan, view<const float, 2>(at->x), at->rows); },
        copy_of(dispatched));
    add(
        stages, "combine, A (bytes read + written)", combined,
        [at] {
            plan_ops<Cpu>::combine<float>(Cpu{}, at->routed.plan, view<const float, 2>(at->rows),
                                          view<const float, 2>(at->routed.routing.weight), at->x);
        },
        copy_of(combined));
}

}  // namespace steelyard_bench
