// ggml: its operator mul_mat_id, which llama.cpp's mixture-of-experts layers are made of. Inference only.
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include "../threads.hpp"
#include "layer_contender.hpp"

namespace steelyard_bench {
namespace {

ggml_type type_of(Type type) {
    constexpr ggml_type types[] = {GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0};
    return types[static_cast<int>(type)];
}

struct Graph;

/// Weights in ggml's own types, and the threads that its graphs are computed by.
class GgmlWeights {
public:
    GgmlWeights(const Model& model, const Case& of)
        : context_(ggml_init({ggml_tensor_overhead() * 8, nullptr, true})), backend_(ggml_backend_cpu_init()) {
        const auto& from = model.weights();
        gate = add(from.gate, of.type), up = add(from.up, of.type), down = add(from.down, of.type);
    }
    ~GgmlWeights();
    GgmlWeights(const GgmlWeights&) = delete;
    GgmlWeights& operator=(const GgmlWeights&) = delete;

    void compute(ggml_cgraph* nodes, int threads) const {
        ggml_backend_cpu_set_n_threads(backend_, threads);
        if (ggml_backend_graph_compute(backend_, nodes) != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml failed");
    }

    ggml_tensor *gate, *up, *down;
    mutable std::unique_ptr<Graph> graph;  // of the last number of tokens

private:
    ggml_tensor* add(const view<float, 3>& from, Type type) {
        ggml_tensor* const to =
            ggml_new_tensor_3d(context_, type_of(type), from.extents[2], from.extents[1], from.extents[0]);
        if (type == Type::f32) {
            to->data = from.data;
            return to;
        }
        memory_.emplace_back(ggml_nbytes(to));
        to->data = memory_.back().as<void>();
        ggml_quantize_init(to->type);
        for_each_task(2, from.extents[0], [&](index_t e) {
            ggml_quantize_chunk(to->type, from.data, to->data, e * from.extents[1] * from.extents[2], from.extents[1],
                                from.extents[2], nullptr);
        });
        return to;
    }

    ggml_context* context_;
    ggml_backend_t backend_;
    std::vector<HugeMemory> memory_;
};

/// A graph for T tokens, with its memory.
struct Graph {
    Graph(const GgmlWeights& weights, index_t width, index_t hidden, index_t tokens, index_t top_k)
        : context(ggml_init({ggml_tensor_overhead() * 32 + ggml_graph_overhead(), nullptr, true})) {
        x = ggml_new_tensor_3d(context, GGML_TYPE_F32, width, 1, tokens);
        ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, top_k, tokens);
        ggml_tensor* const gate = ggml_mul_mat_id(context, weights.gate, x, ids);
        ggml_tensor* const up = ggml_mul_mat_id(context, weights.up, x, ids);
        ggml_tensor* const inner = ggml_swiglu_split(context, gate, up);
        out = ggml_mul_mat_id(context, weights.down, inner, ids);
        graph = ggml_new_graph(context);
        ggml_build_forward_expand(graph, out);
        const auto bytes = static_cast<std::size_t>(tokens * top_k * hidden) * sizeof(float);
        for (ggml_tensor* tensor : {ids, gate, up, inner, out}) {
            memory.emplace_back(std::max(bytes, ggml_nbytes(tensor)));
            tensor->data = memory.back().as<void>();
        }
    }
    ~Graph() { ggml_free(context); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    ggml_context* context;
    ggml_tensor *x, *ids, *out;
    ggml_cgraph* graph;
    std::vector<HugeMemory> memory;
};

GgmlWeights::~GgmlWeights() {
    graph.reset();
    ggml_backend_free(backend_);
    ggml_free(context_);
}

/// Our layer around ggml's experts: rows come in the order of choices from there, and are moved to grouped order.
struct GgmlExpert : SwiGlu {
    const GgmlWeights* weights = nullptr;

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device&, const LayerShape&) const {
        return 0;
    }

    template <class T, class Device, class Space = HostSpace>
    void forward(const Device& device, const Params<const T, Space>&, std::type_identity_t<view<const T, 2, Space>> x,
                 const Plan<Space>& plan, const Kept<T, Space>&, std::type_identity_t<view<T, 2, Space>> rows,
                 std::byte*) const {
        if constexpr (std::is_same_v<T, float>) run(device.threads, x, plan, rows);
    }

    friend bool operator==(const GgmlExpert&, const GgmlExpert&) = default;

private:
    void run(int threads, view<const float, 2> x, const Plan<>& plan, view<float, 2> rows) const;
};

void GgmlExpert::run(int threads, view<const float, 2> x, const Plan<>& plan, view<float, 2> rows) const {
    const index_t tokens = x.extents[0], top_k = plan.top_k(), width = x.extents[1];
    auto& kept = weights->graph;
    if (!kept || kept->x->ne[2] != tokens || kept->ids->ne[0] != top_k)
        kept = std::make_unique<Graph>(*weights, width, hidden, tokens, top_k);
    auto* const ids = static_cast<std::int32_t*>(kept->ids->data);
    for (index_t e = 0; e < plan.experts(); ++e)
        for (index_t r = plan.offsets[e]; r < plan.offsets[e + 1]; ++r)
            ids[plan.choice[r]] = static_cast<std::int32_t>(e);
    kept->x->data = const_cast<float*>(x.data);
    weights->compute(kept->graph, threads);
    const auto* const out = static_cast<const float*>(kept->out->data);
    for_each_task(threads, (tokens + 63) / 64, [&](index_t task) {
        for (index_t t = task * 64; t < std::min(tokens, (task + 1) * 64); ++t)
            for (index_t k = 0; k < top_k; ++k)
                std::copy_n(out + (t * top_k + k) * width, width, &rows(plan.row(t, k), 0));
    });
}

class GgmlContender final : public LayerContender<GgmlExpert> {
public:
    GgmlContender(const Model& model, const Case& of)
        : LayerContender(model, GgmlExpert{{.hidden = of.shape.hidden}}), weights_(model, of) {
        expert_.weights = &weights_;
    }

private:
    GgmlWeights weights_;
};

const Registration registered({.name = "ggml",
                               .version = std::string(ggml_version()) + ", int8 is q8_0",
                               .place = 70,
                               .supports = [](const Case& of) { return of.pass == Pass::forward; },
                               .make = [](const Model& model, const Case& of) -> std::unique_ptr<Contender> {
                                   return std::make_unique<GgmlContender>(model, of);
                               }});

}  // namespace
}  // namespace steelyard_bench
