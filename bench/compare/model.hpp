// Made-up weights and tokens, the same for all contenders and in every run.
#pragma once

#include <vector>

#include "../huge_memory.hpp"
#include "case.hpp"
#include "steelyard/core/routing.hpp"

namespace steelyard_bench {

/// Weights of one layer, and memory for their gradients.
class Model {
public:
    /// With `gradients` there is a second block, which whoever trains accumulates into.
    Model(const Shape& shape, bool gradients);

    struct Tensors {
        view<float, 2> router;    // [E, d]
        view<float, 1> bias;      // [E]
        view<float, 3> gate, up;  // [E, h, d]
        view<float, 3> down;      // [E, d, h]

        template <class Field>
        void fields(Field&& field, const Shape& shape) {
            field("router", router, shape.experts, shape.width);
            field("bias", bias, shape.experts);
            field("gate", gate, shape.experts, shape.hidden, shape.width);
            field("up", up, shape.experts, shape.hidden, shape.width);
            field("down", down, shape.experts, shape.width, shape.hidden);
        }
    };
    [[nodiscard]] const Tensors& weights() const { return weights_; }
    [[nodiscard]] const Tensors& gradients() const { return gradients_; }
    [[nodiscard]] const Shape& shape() const { return shape_; }  // its tokens mean nothing
    /// Sets the router's bias, for all cases until the next call.
    void set_skew(Skew skew) const;

private:
    Shape shape_;
    HugeMemory memory_, gradient_memory_;
    Tensors weights_, gradients_;
};

/// A number that no other call gives: addresses are used again.
[[nodiscard]] std::uint64_t unique_number();

/// Tokens of one case, with the gradient of their outputs.
///
/// Every token's K-th and next logit lie so far apart that rounding cannot make contenders choose differently.
class Batch {
public:
    Batch(const Case& of, const Model& model);

    std::uint64_t number = unique_number();
    view<float, 3> x;              // [sets, T, d]
    view<float, 2> dy;             // [T, d]
    std::vector<index_t> touched;  ///< experts that have rows, by set
    std::vector<index_t> sampled;  ///< experts whose gradients are compared: the busiest and two more
    double largest_load = 0;       ///< rows of the busiest expert of the first set, over the mean

    /// Bytes of the weights that a forward of this set reads, the router's included.
    [[nodiscard]] double touched_bytes(const Case& of, index_t set) const;

private:
    HugeMemory memory_;
};

/// Uniform values of mean 0 and this standard deviation, as a function of seed and place alone.
void fill_uniform(float* to, index_t count, std::uint32_t seed, double deviation);

}  // namespace steelyard_bench
