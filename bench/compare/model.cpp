#include "model.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

#include "../threads.hpp"
#include "steelyard/core/layout.hpp"

namespace steelyard_bench {
namespace {

int all_threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

/// The K experts with the largest logits, best first, and how far the next one is behind.
struct Choice {
    std::vector<index_t> experts;
    double gap = 0;
};
Choice choose(const float* x, const Model& model, const Shape& shape) {
    std::vector<double> logits(static_cast<std::size_t>(shape.experts));
    const auto& weights = model.weights();
    for (index_t e = 0; e < shape.experts; ++e)
        logits[static_cast<std::size_t>(e)] =
            weights.bias[e] + std::inner_product(x, x + shape.width, &weights.router(e, 0), 0.0f);
    std::vector<index_t> order(logits.size());
    std::iota(order.begin(), order.end(), index_t{0});
    const auto better = [&](index_t a, index_t b) {
        return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
    };
    const auto next = order.begin() + std::min<std::ptrdiff_t>(shape.top_k + 1, shape.experts);
    std::partial_sort(order.begin(), next, order.end(), better);
    Choice made;
    made.gap = 1;
    if (shape.top_k < shape.experts)
        made.gap = logits[static_cast<std::size_t>(order[static_cast<std::size_t>(shape.top_k) - 1])] -
                   logits[static_cast<std::size_t>(order[static_cast<std::size_t>(shape.top_k)])];
    made.experts.assign(order.begin(), order.begin() + shape.top_k);
    return made;
}

/// Rounded to bf16, which then all types can represent: nobody's router sees other tokens.
void round_to_bf16(float* values, index_t count) {
    for (index_t i = 0; i < count; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        bits = (bits + 0x8000u) & 0xffff0000u;
        std::memcpy(values + i, &bits, sizeof bits);
    }
}

}  // namespace

std::uint64_t unique_number() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

void fill_uniform(float* to, index_t count, std::uint32_t seed, double deviation) {
    const auto scale = static_cast<float>(deviation * std::sqrt(12.0) / 16777216.0);
    constexpr index_t block = index_t{1} << 16;
    for_each_task(all_threads(), (count + block - 1) / block, [&](index_t task) {
        const auto first = static_cast<std::uint32_t>(task * block);  // wraps beyond 2^32 elements: no matter
        const index_t size = std::min(block, count - task * block);
        float* const values = to + task * block;
        for (index_t i = 0; i < size; ++i) {  // MurmurHash3's finaliser: vectorised, and good enough to measure with
            std::uint32_t hash = (first + static_cast<std::uint32_t>(i)) * 0x9e3779b9u + seed;
            hash = (hash ^ (hash >> 16)) * 0x85ebca6bu;
            hash = (hash ^ (hash >> 13)) * 0xc2b2ae35u;
            hash ^= hash >> 16;
            values[i] = (static_cast<float>(static_cast<std::int32_t>(hash >> 8)) - 8388607.5f) * scale;
        }
    });
}

Model::Model(const Shape& shape, bool gradients)
    : shape_(shape),
      memory_(static_cast<std::size_t>(bytes_of<Tensors>(shape))),
      gradient_memory_(gradients ? static_cast<std::size_t>(bytes_of<Tensors>(shape)) : 0),
      weights_(place<Tensors>(memory_.as<std::byte>(), shape)) {
    if (gradients) gradients_ = place<Tensors>(gradient_memory_.as<std::byte>(), shape);
    const double by_width = 1 / std::sqrt(static_cast<double>(shape.width)),
                 by_hidden = 1 / std::sqrt(static_cast<double>(shape.hidden));
    fill_uniform(weights_.router.data, weights_.router.size(), 1, by_width);
    round_to_bf16(weights_.router.data, weights_.router.size());
    fill_uniform(weights_.gate.data, weights_.gate.size(), 2, by_width);
    fill_uniform(weights_.up.data, weights_.up.size(), 3, by_width);
    fill_uniform(weights_.down.data, weights_.down.size(), 4, by_hidden);
}

void Model::set_skew(Skew skew) const {
    for (index_t e = 0; e < shape_.experts; ++e) {
        const index_t rank = (e * 37 + 11) % shape_.experts;  // popular experts do not lie side by side
        weights_.bias[e] = skew == Skew::zipf ? -std::log(static_cast<float>(rank + 1)) : 0.0f;
    }
}

Batch::Batch(const Case& of, const Model& model)
    : memory_(static_cast<std::size_t>((of.sets() + 1) * of.shape.tokens * of.shape.width) * sizeof(float)) {
    const Shape& shape = of.shape;
    model.set_skew(of.skew);
    x = view<float, 3>(memory_.as<float>(), of.sets(), shape.tokens, shape.width);
    dy = view<float, 2>(x.data + x.size(), shape.tokens, shape.width);
    fill_uniform(dy.data, dy.size(), 99, 1.0);

    touched.resize(static_cast<std::size_t>(of.sets()));
    for (index_t set = 0; set < of.sets(); ++set) {
        std::vector<Choice> choices(static_cast<std::size_t>(shape.tokens));
        for_each_task(all_threads(), shape.tokens, [&](index_t t) {
            float* const row = &x(set, t, 0);
            auto seed = static_cast<std::uint32_t>(1000 + set * shape.tokens + t);
            Choice& choice = choices[static_cast<std::size_t>(t)];
            do {
                fill_uniform(row, shape.width, seed, 1.0);
                round_to_bf16(row, shape.width);
                choice = choose(row, model, shape);
                seed += 1u << 20;
            } while (choice.gap < 1e-4);
        });
        std::vector<index_t> load(static_cast<std::size_t>(shape.experts));
        for (const auto& choice : choices)
            for (const index_t e : choice.experts) ++load[static_cast<std::size_t>(e)];
        touched[static_cast<std::size_t>(set)] = shape.experts - std::count(load.begin(), load.end(), 0);
        if (set > 0) continue;
        const auto busiest = std::max_element(load.begin(), load.end());
        largest_load = static_cast<double>(*busiest * shape.experts) / static_cast<double>(shape.tokens * shape.top_k);
        sampled = {busiest - load.begin(), 0, shape.experts - 1};
    }
}

double Batch::touched_bytes(const Case& of, index_t set) const {
    const Shape& shape = of.shape;
    return 3.0 * static_cast<double>(touched[static_cast<std::size_t>(set)] * shape.width * shape.hidden) *
               weight_bytes(of.type) +
           4.0 * static_cast<double>(shape.experts * shape.width);
}

}  // namespace steelyard_bench
