// The kernels under the experts alone: a tile of rows with panels that lie ready, and the gradient of a weight.
#include <memory>

#include "../huge_memory.hpp"
#include "model.hpp"
#include "stages.hpp"
#include "steelyard/cpu/kernels.hpp"

namespace steelyard_bench {
namespace {

/// `rows` rows times panels of float, of which as many as a second-level cache of 1 MiB keeps beside them.
struct Tile {
    static constexpr index_t depth = 512, columns = 256;
    explicit Tile(index_t count) : rows(count) {
        fill_uniform(memory.as<float>(), static_cast<index_t>(memory.size() / sizeof(float)), 3, 1.0);
    }
    void multiply() const {
        cpu::with_kernels(Isa::automatic, [&](auto kernels) {
            typename decltype(kernels)::template ProductOf<float> product;
            float* const a = memory.as<float>() + depth * columns;
            product.rows = rows;
            product.a = {a, depth + 16};
            product.b.stored = memory.as<float>();
            product.b.depth = depth, product.b.columns = columns;
            product.c = a + rows * (depth + 16), product.c_row = columns;
            decltype(kernels)::product(product);
        });
    }
    [[nodiscard]] double flops() const { return 2.0 * static_cast<double>(rows * depth * columns); }

    index_t rows;
    HugeMemory memory{static_cast<std::size_t>(depth * columns + rows * (depth + 16 + columns)) * sizeof(float)};
};

/// The gradients of weights [m, n] of several experts in turn, each from `rows` tokens, so that none is in a cache: as
/// backward makes them with Write::assign.
struct WeightGradient {
    static constexpr index_t experts = 16;
    WeightGradient(index_t m, index_t n, index_t rows) : m_(m), n_(n), rows_(rows) {
        for (const HugeMemory* memory : {&left_, &right_, &out_})
            fill_uniform(memory->as<float>(), static_cast<index_t>(memory->size() / sizeof(float)), 3, 1.0);
    }
    void next() {
        expert_ = (expert_ + 1) % experts;
        cpu::with_kernels(Isa::automatic, [&](auto kernels) {
            using K = decltype(kernels);
            constexpr index_t width = K::template panel_columns<float>;
            const index_t step = cpu::gathered_panels_bytes / index_t{sizeof(float)} / (rows_ * width) * width;
            const float* const right = right_.as<float>() + expert_ * rows_ * n_;
            for (index_t j0 = 0; j0 < n_; j0 += step) {
                const index_t here = std::min(step, n_ - j0);
                for (index_t r = 0; r < rows_; ++r)
                    K::to_panels(right + r * n_ + j0, here, panels_.as<float>() + r * width, rows_ * width);
                typename K::template OuterProductOf<float> product;
                product.rows = rows_;
                product.left = left_.as<float>() + expert_ * rows_ * m_, product.left_row = m_, product.m = m_;
                product.right = panels_.as<float>(), product.n = here;
                product.out = out_.as<float>() + expert_ * m_ * n_ + j0, product.out_row = n_;
                product.add = false, product.past_caches = true;
                product.slab = slab_.as<float>();
                K::outer_product(product);
            }
        });
    }
    [[nodiscard]] double flops() const { return 2.0 * static_cast<double>(rows_ * m_ * n_); }

private:
    [[nodiscard]] static std::size_t bytes(index_t elements) {
        return static_cast<std::size_t>(elements) * sizeof(float);
    }

    index_t m_, n_, rows_, expert_ = 0;
    HugeMemory left_{bytes(experts * rows_ * m_)}, right_{bytes(experts * rows_ * n_)}, out_{bytes(experts * m_ * n_)};
    HugeMemory panels_{cpu::gathered_panels_bytes}, slab_{bytes(rows_ * 16)};
};

}  // namespace

void add_kernel_stages(std::vector<Stage>& stages) {
    for (const index_t rows : {1, 4, 12, 48}) {
        const auto tile = std::make_shared<Tile>(rows);
        add_products(stages, "product: " + std::to_string(rows) + " rows, d=512, 256 columns in L2", tile->flops(),
                     [tile] { tile->multiply(); });
    }
    for (const Shape& shape : {shape_a, shape_b}) {
        const auto gradient = std::make_shared<WeightGradient>(shape.hidden, shape.width, 256);
        add_products(stages, std::string("weight gradient, ") + shape.name + ", 256 tokens", gradient->flops(),
                     [gradient] { gradient->next(); });
    }
}

}  // namespace steelyard_bench
