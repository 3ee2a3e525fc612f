// A stranger's program: a layer from outside, by whichever way its build found the library.
#include <cmath>
#include <steelyard/steelyard.hpp>
#include <vector>

using Layer = steelyard::MoE<float, steelyard::TopK, steelyard::SwiGlu, steelyard::MicroBatchLoss>;

int main() {
    const int tokens = 8, width = 4;
    steelyard::Module<Layer> moe(Layer({.shape = {.tokens = tokens, .width = width, .experts = 4},
                                        .router = {.k = 2},
                                        .expert = {.hidden = 8},
                                        .balance = {{}, {0.01}}}));
    std::vector<float> x(tokens * width), y(x.size()), dx(x.size());
    const steelyard::Philox random(1, steelyard::Stream::user);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));

    moe.forward({x.data(), tokens, width}, {y.data(), tokens, width});
    moe.backward({x.data(), tokens, width}, {y.data(), tokens, width}, {dx.data(), tokens, width});

    float sum = 0;
    for (const float value : dx) sum += value * value;
    return std::isfinite(sum) && sum > 0 && moe.balance_loss() > 0 ? 0 : 1;
}
