// A balance objective of your own: a struct of one function, checked by the law test, used in a layer.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "steelyard/balance/laws.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;

/// L = E * sum_i max(0, f_i - 1/E) P_i: pushes probability away from overloaded experts, and from no other.
///
/// f is the load fraction over whatever scope the objective is put together with. It is a count and has no derivative:
/// dL/dP_i = E * max(0, f_i - 1/E). At perfect balance loss and gradient are 0.
struct OverloadLoss {
    double coefficient = 0.01;

    double loss(const SegmentLoad& segment, view<double, 1> gradient) const {
        const auto experts = static_cast<double>(segment.experts());
        double sum = 0.0;
        for (index_t i = 0; i < segment.experts(); ++i) {
            const double over = experts * std::max(0.0, segment.fraction(i) - 1.0 / experts);
            gradient[i] = segment.own_tokens == 0 ? 0.0 : over;
            sum += over * segment.mean_prob(i);
        }
        return sum;
    }

    friend bool operator==(const OverloadLoss&, const OverloadLoss&) = default;
};

// Any scope will do: here f over all accumulation steps so far and, with more than one rank, over all ranks.
using Policy = Balance<Buffered<Synchronized>, OverloadLoss>;
using Layer = MoE<float, TopK, SwiGlu, Policy>;

int main() {
    const index_t tokens = 128, width = 16, experts = 8;
    const LayerShape shape{.tokens = tokens, .width = width, .experts = experts, .micro_steps = 4};
    const Policy policy{.objective = {.coefficient = 1.0}};

    LayerShape small = shape;  // the laws take derivatives by differences, one by one
    small.tokens = 12;
    const Status laws = check_balance_laws(Cpu{}, policy, small, 2);
    std::printf("laws of balance: %s\n", laws.message().c_str());

    Module moe(Layer({.shape = shape, .router = {.k = 2}, .expert = {.hidden = 32}, .balance = policy}));
    std::vector<float> memory(4 * tokens * width, 0.0f);
    const auto tensor = [&](index_t i) { return view<float, 2>(&memory[i * tokens * width], tokens, width); };
    const auto x = tensor(0), y = tensor(1), dy = tensor(2), dx = tensor(3);  // dy stays 0: balance alone learns

    double first = 0, last = 0;
    for (int step = 0; step <= 50; ++step) {
        std::vector<std::int64_t> load(experts), sorted(experts);
        for (index_t micro_step = 0; micro_step < shape.micro_steps; ++micro_step) {
            const Philox random(7, Stream::data, static_cast<std::uint64_t>(step * shape.micro_steps + micro_step));
            for (index_t i = 0; i < x.size(); ++i)  // inputs with a mean, which some experts like better
                x.data[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)) + 1.0);
            moe.forward(x, y, {.step = {.total_tokens = shape.micro_steps * tokens}});
            moe.backward(x, dy, dx);
            count_choices(moe.routing(), load);
        }
        moe.each_param([&](const auto&, auto weights, auto gradient) {
            for (index_t i = 0; i < weights.size(); ++i) weights.data[i] -= 0.1f * gradient.data[i];
        });
        moe.end_step();

        last = summarize_load(load, sorted).max_violation;
        if (step == 0) first = last;
        if (step % 10 == 0) std::printf("step %2d  MaxVio of the whole step: %.2f\n", step, last);
    }
    return laws.ok() && last < 0.5 * first ? 0 : 1;
}
