#include "steelyard/cuda/plan.hpp"

#include <doctest/doctest.h>

#include "cuda/device_memory.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/plan.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::Tensor;
using ops = plan_ops<Cuda>;

namespace {

enum class Kind { spread, some_missing, one_expert, none };

Host<expert_t> choices_of(index_t tokens, index_t experts, index_t top_k, Kind kind, unsigned seed) {
    std::mt19937 generator(seed);
    Host<expert_t> choices(tokens, top_k);
    for (index_t t = 0; t < tokens; ++t)
        for (index_t k = 0; k < top_k; ++k) {
            auto e = static_cast<expert_t>(generator() % static_cast<unsigned>(experts));
            if (kind == Kind::some_missing && generator() % 3 == 0) e = -1;
            if (kind == Kind::one_expert) e = static_cast<expert_t>(experts - 1);
            if (kind == Kind::none) e = -1;
            choices(t, k) = e;
        }
    return choices;
}

/// A plan on the CPU and the same on the GPU.
struct Plans {
    Host<index_t> offsets;
    Host<std::int32_t> choice, row;
    Tensor<index_t> gpu_offsets;
    Tensor<std::int32_t> gpu_choice, gpu_row;

    Plans(const Host<expert_t>& choices, index_t experts)
        : offsets(1, experts + 1),
          choice(1, choices.rows * choices.columns),
          row(choices.rows, choices.columns),
          gpu_offsets(1, experts + 1),
          gpu_choice(1, choices.rows * choices.columns),
          gpu_row(choices.rows, choices.columns) {
        const LayerShape shape{.tokens = choices.rows, .width = 1, .experts = experts};
        const auto top_k = static_cast<int>(choices.columns);
        const Bytes cpu_scratch(plan_ops<Cpu>::scratch_bytes(Cpu{}, shape, top_k));
        plan_ops<Cpu>::make_plan(Cpu{}, choices.get(), host(), cpu_scratch.data());
        const CudaBytes scratch = gpu::scratch(ops::scratch_bytes(gpu::device(), shape, top_k));
        const Tensor<expert_t> given(choices, 3);
        ops::make_plan(gpu::device(), given.get(), get(), scratch.data());
        gpu::finish();
    }
    Plan<> host() { return {offsets.line(), choice.line(), row.get()}; }
    [[nodiscard]] Plan<CudaSpace> get() const { return {gpu_offsets.line(), gpu_choice.line(), gpu_row.get()}; }
    [[nodiscard]] index_t filled() const { return offsets.data[static_cast<std::size_t>(offsets.columns - 1)]; }
};

}  // namespace

TEST_CASE("plans are those of the CPU, bit for bit") {
    struct Case {
        index_t experts, top_k;
    };
    for (const Case c : {Case{1, 1}, {3, 2}, {8, 8}, {33, 1}, {160, 8}, {512, 2}, {160, 160}, {1024, 3}})
        for (const index_t tokens : {0, 1, 31, 33, 64, 1000, 4096, 40000})
            for (const Kind kind : {Kind::spread, Kind::some_missing, Kind::one_expert, Kind::none}) {
                if (tokens * c.top_k > 400000) continue;
                CAPTURE(c.experts);
                CAPTURE(c.top_k);
                CAPTURE(tokens);
                CAPTURE(static_cast<int>(kind));
                Plans plans(choices_of(tokens, c.experts, c.top_k, kind, 7), c.experts);
                REQUIRE(plans.gpu_offsets.host().same(plans.offsets));
                REQUIRE(plans.gpu_row.host().same(plans.row));
                const Host<std::int32_t> choice = plans.gpu_choice.host();
                bool same = true;
                for (index_t r = 0; r < plans.filled(); ++r) same = same && choice(0, r) == plans.choice(0, r);
                REQUIRE(same);
            }
}

TEST_CASE_TEMPLATE("rows go to their experts and come back", T, float, bf16) {
    const double unit = std::is_same_v<T, float> ? 1e-6 : 4e-3;
    for (const index_t width : {1, 7, 8, 20, 64, 1024})
        for (const index_t top_k : {1, 3, 8, 19})
            for (const index_t tokens : {0, 1, 33, 500}) {
                const index_t experts = 24, padding = width % 8 == 0 && top_k == 3 ? 5 : width % 8 == 0 ? 8 : 0;
                CAPTURE(width);
                CAPTURE(top_k);
                CAPTURE(tokens);
                Plans plans(choices_of(tokens, experts, top_k, Kind::some_missing, 3), experts);
                const index_t rows = tokens * top_k, filled = plans.filled();
                const Host<T> x = gpu::random<T>(tokens, width, 1);
                const Tensor<T> gpu_x(x, padding), gpu_rows(rows, width, padding);
                ops::dispatch<T>(gpu::device(), plans.get(), gpu_x.get(), gpu_rows.get());
                gpu::finish();
                const Host<T> moved = gpu_rows.host();
                bool same = true;
                for (index_t r = 0; r < filled; ++r)
                    same = same && std::memcmp(&moved(r, 0), &x(plans.choice(0, r) / top_k, 0),
                                               static_cast<std::size_t>(width) * sizeof(T)) == 0;
                REQUIRE(same);

                const Host<float> weight = gpu::random<float>(tokens, top_k, 2);
                const Host<T> before = gpu::random<T>(tokens, width, 4), dy = gpu::random<T>(tokens, width, 5);
                const Tensor<float> gpu_weight(weight, 1);
                for (const bool weighted : {true, false})
                    for (const Write write : {Write::assign, Write::add}) {
                        Host<double> want(tokens, width);
                        for (index_t t = 0; t < tokens; ++t)
                            for (index_t j = 0; j < width; ++j) {
                                double sum = write == Write::add ? gpu::number(before(t, j)) : 0.0;
                                for (index_t k = 0; k < top_k; ++k)
                                    if (const auto r = plans.row(t, k); r >= 0)
                                        sum += (weighted ? gpu::number(weight(t, k)) : 1.0) * gpu::number(moved(r, j));
                                want(t, j) = sum;
                            }
                        Host<T> first(0, 0);
                        for (int run = 0; run < 2; ++run) {
                            const Tensor<T> y =
                                write == Write::add ? Tensor<T>(before, padding) : Tensor<T>(tokens, width, padding);
                            ops::combine<T>(gpu::device(), plans.get(), gpu_rows.get(),
                                            weighted ? gpu_weight.get() : view<float, 2, CudaSpace>{}, y.get(), write);
                            gpu::finish();
                            const Host<T> got = y.host();
                            gpu::require_close(got, want, unit * 4.0);
                            if (run == 0) first = got;
                            REQUIRE(got.same(first));
                        }
                    }

                Host<double> dweight = weight.as<double>();
                for (index_t t = 0; t < tokens; ++t)
                    for (index_t k = 0; k < top_k; ++k)
                        if (const auto r = plans.row(t, k); r >= 0)
                            for (index_t j = 0; j < width; ++j)
                                dweight(t, k) += gpu::number(dy(t, j)) * gpu::number(moved(r, j));
                const Tensor<T> gpu_dy(dy, padding);
                ops::combine_backward<T>(gpu::device(), plans.get(), gpu_rows.get(), gpu_dy.get(), gpu_weight.get());
                gpu::finish();
                // Sums of `width` products in float, whose terms are as large as their sum is long.
                gpu::require_close(gpu_weight.host(), dweight, 1e-4);
            }
}
