// The other overflow rules, experts and mixtures, one thread, beside the plain layer of the same sizes.
#include <string>
#include <vector>

#include "layer_case.hpp"

namespace steelyard_bench {
namespace {

constexpr index_t tokens = 2048, width = 256, hidden = 512, experts = 16;
constexpr LayerShape sizes{.tokens = tokens, .width = width, .experts = experts, .sequences = 8};

/// Any layer with memory and made-up data.
template <class Layer>
class AnyLayer {
public:
    explicit AnyLayer(const typename Layer::Config& config)
        : layer_(config),
          params_memory_(layer_.param_bytes()),
          grads_memory_(layer_.param_bytes()),
          context_(layer_.context_bytes()),
          workspace_(layer_.workspace_bytes()),
          rows_(2 * (1 + layer_.outputs()) * tokens * width * static_cast<index_t>(sizeof(float))) {
        throw_if_refused(layer_.check());
        params_ = layer_.place_params(params_memory_.data());
        grads_ = layer_.place_params(grads_memory_.data());
        layer_.each_param(params_, [seed = std::uint64_t{7}](const std::string&, auto tensor) mutable {
            fill_normal(tensor, seed++, 0.05);
        });
        auto* values = reinterpret_cast<float*>(rows_.data());
        const auto next = [&](index_t columns) {
            const view<float, 2> of(values, tokens, columns);
            values += of.size();
            return of;
        };
        x_ = next(width), dx_ = next(width), y_ = next(layer_.outputs() * width), dy_ = next(layer_.outputs() * width);
        fill_normal(x_, 1), fill_normal(dy_, 2);
        for (index_t s = 0; s <= sizes.sequences; ++s) sequences_.push_back(s * tokens / sizes.sequences);
    }
    void forward() {
        TokenInfo<> info;
        info.sequences = {sequences_.data(), sizes.sequences + 1};
        throw_if_refused(layer_.forward({}, {.x = x_,
                                             .params = layer_.read_only_params(params_),
                                             .y = y_,
                                             .context = context_,
                                             .workspace = workspace_,
                                             .state = {},
                                             .tokens = info}));
    }
    void backward() {
        throw_if_refused(layer_.backward({.x = x_,
                                          .params = layer_.read_only_params(params_),
                                          .dy = dy_,
                                          .dx = dx_,
                                          .grads = grads_,
                                          .context = context_,
                                          .workspace = workspace_}));
    }

private:
    Layer layer_;
    Bytes params_memory_, grads_memory_, context_, workspace_, rows_;
    typename Layer::Params params_, grads_;
    view<float, 2> x_, y_, dx_, dy_;
    std::vector<index_t> sequences_;
};

template <class RouterT, class ExpertT, class OverflowT = Dropless>
void add(const std::string& name, const RouterT& router, const ExpertT& expert, const OverflowT& overflow = {}) {
    using Layer = MoE<float, RouterT, ExpertT, NoBalance, SelfComm, OverflowT>;
    for (const bool backward : {false, true})
        benchmark::RegisterBenchmark(
            (std::string(backward ? "system_both/" : "system_forward/") + name).c_str(),
            [=](benchmark::State& state) {
                AnyLayer<Layer> made({.shape = sizes, .router = router, .expert = expert, .overflow = overflow});
                made.forward();
                const Lap lap;
                for (auto _ : state) {
                    made.forward();
                    if (backward) made.backward();
                }
                report_tokens(state, lap, tokens);
            })
            ->Unit(benchmark::kMillisecond);
}

[[maybe_unused]] const bool registered = [] {
    const TopK top{.k = 2};
    const SwiGlu ffn{.hidden = hidden};
    add("TopK, SwiGlu, Dropless", top, ffn);
    add("overflow: Capacity by position", top, ffn, Capacity{.factor = 1.0});
    add("overflow: Capacity, batch priority", top, ffn, batch_priority());
    add("overflow: Renormalized<InOrder<RandomRouting, Capacity>>", top, ffn,
        Renormalized<InOrder<RandomRouting, Capacity>>{});
    add("overflow: NextChoice", TopK{.k = 3}, ffn, NextChoice{.take = 2, .capacity = {.factor = 1.0}});
    add("expert: ClampedSwiGlu", top, ClampedSwiGlu{.hidden = hidden});
    add("expert: Mlp, ReLU", top, Mlp{.hidden = hidden, .activation = Activation::relu});
    add("expert: Mlp, GELU", top, Mlp{.hidden = hidden, .activation = Activation::gelu});
    add("expert: Lora, rank 16", top, Lora{.rank = 16});
    add("expert: LoraSwiGlu, rank 16", top, LoraSwiGlu{.hidden = hidden, .rank = 16});
    add("expert: Mixed, 12 SwiGlu, zero, copy, 2 constant", top,
        Mixed{Several{12, ffn}, Several{1, ZeroExpert{}}, Several{1, CopyExpert{}}, Several{2, ConstantExpert{}}});
    add("expert: WithShared", top, WithShared{ffn, ffn});
    add("expert: WithShared, gated", top, WithShared{ffn, ffn, shared_gate()});
    add("mixture: SoftSlots, 32 slots an expert", SoftSlots{.slots = 32}, ffn);  // as many rows as TopK has
    add("mixture: MergeExperts, by sequence", MergeExperts{}, ffn);
    add("mixture: MultiGate, 2 tasks", MultiGate{.tasks = 2}, SwiGlu{.hidden = hidden / 8});
    return true;
}();

}  // namespace
}  // namespace steelyard_bench
