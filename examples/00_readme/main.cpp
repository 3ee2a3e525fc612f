#include <vector>

#include "steelyard/steelyard.hpp"

using namespace steelyard;
using Layer = MoE<float, TopK, SwiGlu, SynchronizedLoss>;  // the balance strategy is one template argument

int main() {
    Module moe(Layer({.shape = {.tokens = 512, .width = 64, .experts = 8},  // T, d, E
                      .router = {.k = 2},
                      .expert = {.hidden = 128}}));
    std::vector<float> x(512 * 64, 1.0f), y(512 * 64), dy(512 * 64, 0.1f), dx(512 * 64);

    moe.forward({x.data(), 512, 64}, {y.data(), 512, 64});                          // y [T, d] =
    moe.backward({x.data(), 512, 64}, {dy.data(), 512, 64}, {dx.data(), 512, 64});  // dx =, moe.grads +=
    moe.each_param([](const auto& /*name*/, auto weights, auto gradient) {
        for (index_t i = 0; i < weights.size(); ++i) weights.data[i] -= 0.01f * gradient.data[i];
    });
    moe.end_step();
}
