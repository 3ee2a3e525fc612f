// One expert with few and many rows, its packed weights in the second cache.
#include <memory>

#include "../threads.hpp"
#include "layer_contender.hpp"
#include "stages.hpp"

namespace steelyard_bench {
namespace {

/// One expert of 196 608 weights: 768 KiB in float, which with the rows beside it fits a second cache of 1 MiB.
struct OneExpert {
    static constexpr Shape shape{"one expert", 1, 256, 256, 1, 1};
    explicit OneExpert(index_t rows)
        : choice(static_cast<std::size_t>(rows)),
          row(choice),
          x(static_cast<std::size_t>(rows * shape.width) * sizeof(float)),
          y(x.size()) {
        offsets[1] = rows;
        for (index_t r = 0; r < rows; ++r)
            choice[static_cast<std::size_t>(r)] = row[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(r);
        fill_uniform(x.as<float>(), rows * shape.width, 3, 1.0);
        plan = {{offsets, 2}, {choice.data(), rows}, {row.data(), rows, 1}};
        params = {model.weights().gate, model.weights().up, model.weights().down};
        const auto bytes = expert.packed_bytes<float>(Cpu{}, sizes);
        packed = HugeMemory(static_cast<std::size_t>(bytes));
        throw_if_refused(expert.pack<float>(Cpu{}, sizes, params, packed.span()));
        params.packed = {packed.as<const std::byte>(), bytes};
    }
    void forward() const {
        const index_t rows = offsets[1];
        expert.forward<float>(Cpu{}, params, view<const float, 2>(x.as<const float>(), rows, shape.width), plan, {},
                              view<float, 2>(y.as<float>(), rows, shape.width), scratch.as<std::byte>());
    }

    Model model{shape, false};
    SwiGlu expert{.hidden = shape.hidden};
    LayerShape sizes{.tokens = 1, .width = shape.width, .experts = 1};
    HugeMemory scratch{static_cast<std::size_t>(expert.scratch_bytes<float>(Cpu{}, sizes))};
    HugeMemory packed;
    index_t offsets[2] = {};
    std::vector<std::int32_t> choice, row;
    HugeMemory x, y;
    Plan<> plan;
    SwiGlu::Params<const float> params;
};

}  // namespace

void add_expert_stages(std::vector<Stage>& stages) {
    for (const index_t rows : {1, 4, 16, 64, 256}) {
        const auto expert = std::make_shared<OneExpert>(rows);
        const double flops = 6.0 * static_cast<double>(rows * OneExpert::shape.width * OneExpert::shape.hidden);
        add_products(stages, "experts: " + std::to_string(rows) + " rows, d=256 h=256, weights in L2", flops,
                     [expert] { expert->forward(); });
    }
}

}  // namespace steelyard_bench
