// What a balance policy does in one forward and backward, beside the layer that it belongs to.
#include <memory>

#include "layer_contender.hpp"
#include "stages.hpp"

namespace steelyard_bench {
namespace {

/// Layer A on one thread, and its policy alone on the routing of that layer.
template <class Policy>
class Balanced {
    using Layer = MoE<float, TopK, SwiGlu, Policy>;

public:
    Balanced()
        : model_(shape_a, true),
          batch_(case_, model_),
          layer_({.shape = {.tokens = shape_a.tokens, .width = shape_a.width, .experts = shape_a.experts},
                  .router = {.k = shape_a.top_k},
                  .expert = {.hidden = shape_a.hidden},
                  .balance = Policy{}}),
          context_(memory(layer_.context_bytes())),
          workspace_(memory(layer_.workspace_bytes())),
          state_(memory(layer_.state_bytes())),
          rows_(memory(2 * batch_.dy.size() * index_t{sizeof(float)})),
          kept_(memory_of<State>(layer_.config().balance, layer_.shape())),
          record_(memory_of<Record>(layer_.config().balance, layer_.shape())),
          scratch_(memory(balance_ops<Cpu>::scratch_bytes(Cpu{}, layer_.shape()))),
          grad_memory_(memory_of<RoutingGrad<float>>(shape_a.tokens, shape_a.experts, index_t{shape_a.top_k})),
          grad_(place<RoutingGrad<float>>(grad_memory_.as<std::byte>(), shape_a.tokens, shape_a.experts,
                                          index_t{shape_a.top_k})),
          words_(static_cast<std::size_t>(layer_.config().balance.wire_words(layer_.shape())) + 1),
          y_(rows_.as<float>(), shape_a.tokens, shape_a.width),
          dx_(rows_.as<float>() + batch_.dy.size(), shape_a.tokens, shape_a.width),
          params_(tensors(model_.weights())),
          grads_(tensors(model_.gradients())) {}

    /// The policy's share of forward + backward.
    double share() {
        const double start = now();
        TokenInfo<> tokens;
        tokens.step.step = ++step_;
        throw_if_refused(layer_.forward({}, {.x = batch_.x[0],
                                             .params = layer_.read_only_params(params_),
                                             .y = y_,
                                             .context = context_.span(),
                                             .workspace = workspace_.span(),
                                             .state = state_.span(),
                                             .tokens = tokens}));
        throw_if_refused(layer_.backward({.x = batch_.x[0],
                                          .params = layer_.read_only_params(params_),
                                          .dy = batch_.dy,
                                          .dx = dx_,
                                          .grads = grads_,
                                          .context = context_.span(),
                                          .workspace = workspace_.span()}));
        const double layer_seconds = now() - start;

        const Policy& policy = layer_.config().balance;
        Observation<float> seen;
        seen.routing = layer_.routing(context_.span());
        seen.valid_tokens = seen.count();
        seen.tokens.step.step = ++step_;
        const auto kept = place<State>(kept_.as<std::byte>(), policy, layer_.shape());
        const auto record = place<Record>(record_.as<std::byte>(), policy, layer_.shape());
        Wire<> out(view<std::int64_t, 1>(words_.data(), std::ssize(words_))), in = out;
        const double seconds = seconds_of([&] {
            policy.observe(layer_.config().device, seen, kept, record, scratch_.as<std::byte>());
            policy.post(seen, kept, record, out);
            policy.conclude(seen, kept, record, in);
            policy.gradient(layer_.config().device, seen, record, grad_, scratch_.as<std::byte>());
        });
        return seconds / layer_seconds;
    }

private:
    using State = typename Policy::template State<>;
    using Record = typename Policy::template Record<>;
    template <class Bundle, class... Dims>
    static HugeMemory memory_of(const Dims&... dims) {
        return HugeMemory(static_cast<std::size_t>(bytes_of<Bundle>(dims...)));
    }
    static HugeMemory memory(index_t bytes) { return HugeMemory(static_cast<std::size_t>(bytes)); }

    static constexpr Case case_{shape_a, Skew::uniform, Type::f32, Pass::train, 1};
    Model model_;
    Batch batch_;
    Layer layer_;
    HugeMemory context_, workspace_, state_, rows_, kept_, record_, scratch_, grad_memory_;
    RoutingGrad<float> grad_;
    std::vector<std::int64_t> words_;
    view<float, 2> y_, dx_;
    typename Layer::Params params_, grads_;
    std::int64_t step_ = 0;

    static typename Layer::Params tensors(const Model::Tensors& from) {
        typename Layer::Params to;
        to.router.weight = from.router;
        to.experts.gate = from.gate, to.experts.up = from.up, to.experts.down = from.down;
        return to;
    }
};

template <class Policy>
void add(std::vector<Stage>& stages, const std::string& name) {
    // Made at the first sample: another filter should not pay for its gigabyte.
    const auto made = std::make_shared<std::unique_ptr<Balanced<Policy>>>();
    stages.push_back(
        {{.name = "balance: " + name + ", A", .unit = "% of forward + backward"}, [made](StageResult& result) {
             if (!*made) *made = std::make_unique<Balanced<Policy>>();
             result.add(100 * (*made)->share());
         }});
}

}  // namespace

void add_balance_stages(std::vector<Stage>& stages) {
    add<MicroBatchLoss>(stages, "statistics, load-balancing loss and gradient");
    add<AllOf<MicroBatchLoss, RouterZLoss>>(stages, "the same with z-loss");
}

}  // namespace steelyard_bench
