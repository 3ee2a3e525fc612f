// A mixture-of-experts layer learns a task of four kinds of tokens: forward, backward, gradient descent.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "steelyard/steelyard.hpp"

using namespace steelyard;

// Each token goes to the 2 best of 8 SwiGlu experts; the load is balanced over the tokens of each call.
using Layer = MoE<float, TopK, SwiGlu, MicroBatchLoss>;

// A token of kind c has a bump in its c-th quarter, and is to be mapped to itself, rotated by c places.
void draw_batch(std::uint64_t step, view<float, 2> x, view<float, 2> target) {
    const Philox random(1, Stream::data, step);
    const index_t width = x.extents[1];
    for (index_t t = 0; t < x.extents[0]; ++t) {
        const index_t kind = t % 4;
        for (index_t j = 0; j < width; ++j) {
            const auto place = static_cast<std::uint64_t>(t * width + j);
            x(t, j) = static_cast<float>(random.normal(place) + (j / 4 == kind ? 3.0 : 0.0));
        }
        for (index_t j = 0; j < width; ++j) target(t, j) = x(t, (j + kind) % width);
    }
}

int main() {
    const index_t tokens = 256, width = 16, experts = 8;
    Module moe(Layer({.shape = {.tokens = tokens, .width = width, .experts = experts},
                      .router = {.k = 2},
                      .expert = {.hidden = 32},
                      .balance = {.objective = {.coefficient = 1.0}}}));

    std::vector<float> memory(5 * tokens * width);
    const auto tensor = [&](index_t i) { return view<float, 2>(&memory[i * tokens * width], tokens, width); };
    const auto x = tensor(0), target = tensor(1), y = tensor(2), dy = tensor(3), dx = tensor(4);
    std::vector<std::int64_t> load(experts), sorted(experts);

    double first = 0, loss = 0;
    for (int step = 0; step <= 600; ++step) {
        draw_batch(static_cast<std::uint64_t>(step), x, target);
        moe.forward(x, y);

        loss = 0;  // half the squared error, averaged over tokens
        for (index_t i = 0; i < y.size(); ++i) {
            const float error = y.data[i] - target.data[i];
            loss += 0.5 * error * error / tokens;
            dy.data[i] = error / tokens;
        }
        if (step == 0) first = loss;

        moe.backward(x, dy, dx);  // dx is what a layer below would go on with
        moe.each_param([&](const auto&, auto weights, auto gradient) {
            for (index_t i = 0; i < weights.size(); ++i) weights.data[i] -= 0.05f * gradient.data[i];
        });

        if (step % 100 == 0) {
            load.assign(experts, 0);
            count_choices(moe.routing(), load);
            std::printf("step %4d  loss %6.3f  balance loss %.5f  MaxVio %.2f  tokens per expert:", step, loss,
                        moe.balance_loss(), summarize_load(load, sorted).max_violation);
            for (const auto count : load) std::printf(" %3d", static_cast<int>(count));
            std::printf("\n");
        }
        moe.end_step();
    }
    return loss < 0.5 * first ? 0 : 1;
}
