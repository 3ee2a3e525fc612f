// The contract of an Expert as a test that anyone can run on their own expert.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "steelyard/core/random.hpp"
#include "steelyard/expert/concept.hpp"

namespace steelyard {

namespace detail::expert {

inline Status broken(std::string law, std::string expected, std::string came) {
    return Status::refuse(Code::invalid_argument, "check_expert_laws", law, std::move(expected), std::move(came));
}

/// Zeroed numbers at an aligned address.
class Block {
public:
    explicit Block(index_t bytes) : storage_(static_cast<std::size_t>(bytes + layout_alignment)), bytes_(bytes) {
        const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
        shift_ = static_cast<index_t>((layout_alignment - address % layout_alignment) % layout_alignment);
    }
    Block(Block&&) = default;  // the storage stays where it is
    Block(const Block&) = delete;

    std::byte* bytes() { return storage_.data() + shift_; }
    double* numbers() { return reinterpret_cast<double*>(bytes()); }
    [[nodiscard]] index_t count() const { return bytes_ / static_cast<index_t>(sizeof(double)); }
    void fill(double value) {
        for (index_t i = 0; i < count(); ++i) numbers()[i] = value;
    }
    void normals(std::uint64_t seed, double scale) {
        const Philox random(seed, Stream::user);
        for (index_t i = 0; i < count(); ++i) numbers()[i] = scale * random.normal(static_cast<std::uint64_t>(i));
    }
    void copy(Block& from) { std::memcpy(bytes(), from.bytes(), static_cast<std::size_t>(bytes_)); }
    bool same_bits(Block& other) { return std::memcmp(bytes(), other.bytes(), static_cast<std::size_t>(bytes_)) == 0; }

private:
    std::vector<std::byte> storage_;
    index_t bytes_, shift_ = 0;
};

/// One batch: tokens, weights, and a plan in which some choices are -1 and, with two experts or more, the last
/// expert has no rows.
template <class X, class Device>
struct LawBatch {
    static_assert(std::is_same_v<typename Device::space, HostSpace>, "steelyard: the laws run on a host device");
    template <class T>
    using Params = typename X::template Params<T, HostSpace>;
    using Kept = typename X::template Kept<double, HostSpace>;
    using Work = typename X::template Work<double, HostSpace>;
    static constexpr index_t number = static_cast<index_t>(sizeof(double));

    const X& expert;
    LayerShape shape;
    const Device& device;
    index_t top_k, capacity;
    Block params, x, weight, dy, plan_block, scratch;
    Plan<> plan;

    LawBatch(const X& an_expert, const LayerShape& a_shape, const Device& a_device, bool reversed = false)
        : expert(an_expert),
          shape(a_shape),
          device(a_device),
          top_k(a_shape.experts > 2 ? 2 : 1),
          capacity(a_shape.tokens * top_k),
          params(bytes_of<Params<double>>(an_expert, a_shape)),
          x(shape.tokens * shape.width * number),
          weight(capacity * number),
          dy(shape.tokens * shape.width * number),
          plan_block(bytes_of<Plan<>>(shape.tokens, shape.experts, top_k)),
          scratch(an_expert.template scratch_bytes<double>(a_device, a_shape)),
          plan(place<Plan<>>(plan_block.bytes(), shape.tokens, shape.experts, top_k)) {
        params.normals(1, 0.5), x.normals(2, 1.0), weight.normals(3, 1.0), dy.normals(4, 1.0);
        if (reversed) reverse_tokens();
        const index_t used = shape.experts > 1 ? shape.experts - 1 : 1;
        index_t row = 0;
        for (index_t e = 0; e < shape.experts; ++e) {
            plan.offsets(e) = row;
            for (index_t t = 0; t < shape.tokens; ++t)
                for (index_t k = 0; k < top_k; ++k) {
                    const index_t token = reversed ? shape.tokens - 1 - t : t;
                    const bool dropped = token % 5 == 3;
                    if (e == 0) plan.row(t, k) = -1;
                    if (dropped || (token * token + k) % used != e) continue;
                    plan.choice(row) = static_cast<std::int32_t>(t * top_k + k);
                    plan.row(t, k) = static_cast<std::int32_t>(row++);
                }
        }
        plan.offsets(shape.experts) = row;
    }

    void reverse_tokens() {
        for (auto [block, width] : {std::pair{&x, shape.width}, std::pair{&weight, top_k}, std::pair{&dy, shape.width}})
            for (index_t t = 0; 2 * t + 1 < shape.tokens; ++t)
                for (index_t j = 0; j < width; ++j)
                    std::swap(block->numbers()[t * width + j], block->numbers()[(shape.tokens - 1 - t) * width + j]);
    }

    [[nodiscard]] index_t rows() const { return plan.offsets(shape.experts); }
    [[nodiscard]] index_t token(index_t row) const { return plan.choice(row) / top_k; }

    void forward(Block& kept, view<double, 2> out) {
        scratch.fill(std::numeric_limits<double>::quiet_NaN());
        expert.template forward<double>(device, place<Params<const double>>(params.bytes(), expert, shape), tokens(x),
                                        plan, place<Kept>(kept.bytes(), expert, shape, capacity), out, scratch.bytes());
    }
    void backward(Block& kept, bool weighted, view<double, 2> drows, view<double, 2> dweight,
                  const Params<double>& grads) {
        Block work(bytes_of<Work>(expert, shape, capacity));
        work.fill(std::numeric_limits<double>::quiet_NaN());
        scratch.fill(std::numeric_limits<double>::quiet_NaN());
        expert.template backward<double>(
            device, place<Params<const double>>(params.bytes(), expert, shape), tokens(x), plan,
            place<Kept>(kept.bytes(), expert, shape, capacity),
            weighted ? view<const double, 2>(weight.numbers(), shape.tokens, top_k) : view<const double, 2>(),
            tokens(dy), place<Work>(work.bytes(), expert, shape, capacity), drows, dweight, grads, scratch.bytes());
    }
    /// sum over rows of w <dy[t], f(x[t])>
    double loss() {
        Block kept(bytes_of<Kept>(expert, shape, capacity)), out(capacity * shape.width * number);
        forward(kept, matrix(out, capacity));
        double sum = 0.0;
        for (index_t r = 0; r < rows(); ++r)
            for (index_t j = 0; j < shape.width; ++j)
                sum += weight.numbers()[plan.choice(r)] * dy.numbers()[token(r) * shape.width + j] *
                       out.numbers()[r * shape.width + j];
        return sum;
    }
    view<const double, 2> tokens(Block& block) { return {block.numbers(), shape.tokens, shape.width}; }
    view<double, 2> matrix(Block& block, index_t height) { return {block.numbers(), height, shape.width}; }

    /// The gradient against a central difference of the loss, along a random direction of `count` numbers.
    Status differences(const std::string& name, double* at, const double* gradient, index_t count, std::uint64_t seed) {
        const Philox random(seed, Stream::user);
        const double step = 1e-5;
        double slope = 0.0, size = 1e-3, losses[2] = {};
        std::vector<double> saved(at, at + count);
        for (const int side : {0, 1}) {
            for (index_t i = 0; i < count; ++i) {
                const double direction = random.normal(static_cast<std::uint64_t>(i));
                at[i] = saved[static_cast<std::size_t>(i)] + (side == 0 ? step : -step) * direction;
                if (side == 0) slope += gradient[i] * direction, size += std::abs(gradient[i] * direction);
            }
            losses[side] = loss();
        }
        std::memcpy(at, saved.data(), saved.size() * sizeof(double));
        const double difference = (losses[0] - losses[1]) / (2 * step);
        if (std::abs(difference - slope) <= 1e-6 * size) return {};
        return broken("law 6, gradient of " + name, "the finite difference " + std::to_string(difference),
                      std::to_string(slope));
    }
};

}  // namespace detail::expert

/// Checks an expert against its contract (expert/concept.hpp, 5 to 9) in double precision, on a batch of
/// `shape.tokens` tokens: rows without a plan entry stay untouched, recompute and replay give the same bits, gradients
/// accumulate and agree with finite differences (1e-6), an absent weight is 1, absent gradients are frozen, an expert
/// without rows reads nothing and gets exactly nothing, and a permutation of tokens permutes rows.
///
/// Takes a small shape, say 12 tokens, width 5, 4 experts, and a device whose kernels are included, such as `Cpu{2}`.
/// Answers the first law that is broken, in one sentence.
template <Expert X, class Device>
Status check_expert_laws(const X& expert, const LayerShape& shape, const Device& device) {
    using namespace detail::expert;
    using Batch = LawBatch<X, Device>;
    using Grads = typename Batch::template Params<double>;
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (shape.tokens < 2 || shape.width < 1 || shape.experts < 1)
        return broken("shape", "at least 2 tokens, width 1 and 1 expert", "less");
    if (Status s = expert.check(shape); !s) return s;

    Batch batch(expert, shape, device);
    const index_t d = shape.width, n = batch.rows(), capacity = batch.capacity;
    const index_t kept_bytes = bytes_of<typename Batch::Kept>(expert, shape, capacity);
    const index_t row_bytes = capacity * d * Batch::number, grad_bytes = bytes_of<Grads>(expert, shape);

    // 7: the last of several experts has no rows; its weights are poison.
    const bool empty_expert = shape.experts > 1;
    const auto of_empty_expert = [&](Block& block, auto&& body) {
        auto bundle = place<Grads>(block.bytes(), expert, shape);
        for_each_tensor(
            bundle,
            [&](const std::string& name, auto tensor) {
                // What all experts share, or only some of them have, is not the last expert's.
                if (!empty_expert || tensor.size() == 0 || tensor.extents[0] != shape.experts) return;
                const index_t share = tensor.size() / shape.experts;
                for (index_t i = tensor.size() - share; i < tensor.size(); ++i) body(name, tensor.data[i]);
            },
            expert, shape);
    };
    of_empty_expert(batch.params, [&](const std::string&, double& value) { value = nan; });

    // 5, 9: forward, its replay, and recompute.
    Block kept(kept_bytes), rows(row_bytes), kept_again(kept_bytes), rows_again(row_bytes), recomputed(kept_bytes);
    for (Block* block : {&kept, &rows, &kept_again, &rows_again, &recomputed}) block->fill(nan);
    batch.forward(kept, batch.matrix(rows, capacity));
    batch.forward(kept_again, batch.matrix(rows_again, capacity));
    batch.forward(recomputed, {});
    for (index_t i = 0; i < capacity * d; ++i)
        if (std::isfinite(rows.numbers()[i]) != (i < n * d))
            return broken(
                "law 7, rows", "finite rows below offsets[E], none written beyond",
                std::to_string(rows.numbers()[i]) + " in row " + std::to_string(i / d) + " of " + std::to_string(n));
    if (!kept.same_bits(kept_again) || !rows.same_bits(rows_again))
        return broken("law 9, replay of forward", "the same bits", "others");
    if (!kept.same_bits(recomputed)) return broken("law 5, forward without rows", "the same bits in `kept`", "others");

    // 6, 9: backward from zero, its replay on top of something, with frozen weights, and with weights of 1.
    Block grad(grad_bytes), dweight(capacity * Batch::number), drows(row_bytes);
    const auto backward = [&](Block& dr, Block& dw, Block& g, bool weighted) {
        dr.fill(nan);
        batch.backward(kept, weighted, batch.matrix(dr, capacity), {dw.numbers(), shape.tokens, batch.top_k},
                       place<Grads>(g.bytes(), expert, shape));
    };
    backward(drows, dweight, grad, true);
    for (index_t i = 0; i < capacity * d; ++i)
        if (std::isfinite(drows.numbers()[i]) != (i < n * d))
            return broken("law 7, drows", "finite rows below offsets[E], none written beyond",
                          std::to_string(drows.numbers()[i]) + " in row " + std::to_string(i / d));
    Block grad_again(grad_bytes), dweight_again(capacity * Batch::number), drows_again(row_bytes);
    backward(drows_again, dweight_again, grad_again, true);
    if (!grad.same_bits(grad_again) || !dweight.same_bits(dweight_again) || !drows.same_bits(drows_again))
        return broken("law 9, replay of backward", "the same bits", "others");
    backward(drows_again, dweight_again, grad_again, true);
    const auto accumulates = [](const char* name, Block& once, Block& twice) -> Status {
        for (index_t i = 0; i < once.count(); ++i) {
            const double expected = 2 * once.numbers()[i], came = twice.numbers()[i];
            if (!(std::abs(came - expected) <= 1e-12 * (1 + std::abs(expected))))
                return broken(std::string("law 6, ") + name + " accumulates", std::to_string(expected),
                              std::to_string(came));
        }
        return {};
    };
    if (Status s = accumulates("grads", grad, grad_again); !s) return s;
    if (Status s = accumulates("dweight", dweight, dweight_again); !s) return s;
    Status status;
    if constexpr (requires(Grads grads) { grads.write; }) {
        Block replaced(grad_bytes);
        replaced.fill(nan);
        auto grads = place<Grads>(replaced.bytes(), expert, shape), sums = place<Grads>(grad.bytes(), expert, shape);
        grads.write = Write::assign;
        batch.backward(kept, true, batch.matrix(drows_again, capacity), {}, grads);
        for_each_tensor(
            sums,
            [&](const std::string& name, auto tensor) {
                for (index_t i = 0; i < tensor.size(); ++i)
                    if (const double came = replaced.numbers()[tensor.data - grad.numbers() + i];
                        came != tensor.data[i] && status)
                        status = broken("law 6, gradient of " + name + " that replaces what was there",
                                        std::to_string(tensor.data[i]), std::to_string(came));
            },
            expert, shape);
        if (!status) return status;
    }
    drows_again.fill(nan);
    batch.backward(kept, true, batch.matrix(drows_again, capacity), {}, Grads{});
    if (!drows.same_bits(drows_again))
        return broken("law 6, backward with frozen weights and no dweight", "the same drows", "others");

    of_empty_expert(grad, [&](const std::string& name, double& value) {
        if (value != 0.0 && status)
            status =
                broken("law 7, gradient of " + name + " of an expert without rows", "exactly 0", std::to_string(value));
    });
    if (!status) return status;

    // 8: the same tokens in the other order.
    Batch other(expert, shape, device, true);
    Block other_kept(kept_bytes), other_rows(row_bytes);
    other.forward(other_kept, other.matrix(other_rows, capacity));
    for (index_t t = 0; t < shape.tokens; ++t)
        for (index_t k = 0; k < batch.top_k; ++k) {
            const index_t r = batch.plan.row(t, k), q = other.plan.row(shape.tokens - 1 - t, k);
            for (index_t j = 0; r >= 0 && j < d; ++j) {
                const double expected = rows.numbers()[r * d + j], came = other_rows.numbers()[q * d + j];
                if (!(std::abs(came - expected) <= 1e-12 * (1 + std::abs(expected))))
                    return broken("law 8, rows in another order", std::to_string(expected), std::to_string(came));
            }
        }

    // 6: finite differences, along random directions; without the poison.
    of_empty_expert(batch.params, [&](const std::string&, double& value) { value = 0.25; });
    std::vector<double> dx(static_cast<std::size_t>(shape.tokens * d), 0.0);
    for (index_t r = 0; r < n; ++r)
        for (index_t j = 0; j < d; ++j)
            dx[static_cast<std::size_t>(batch.token(r) * d + j)] += drows.numbers()[r * d + j];
    for (std::uint64_t seed = 10; seed < 14; ++seed) {
        if (Status s = batch.differences("x", batch.x.numbers(), dx.data(), shape.tokens * d, seed); !s) return s;
        if (Status s =
                batch.differences("the combine weight", batch.weight.numbers(), dweight.numbers(), capacity, seed);
            !s)
            return s;
        auto bundle = place<Grads>(grad.bytes(), expert, shape);
        for_each_tensor(
            bundle,
            [&](const std::string& name, auto tensor) {
                if (!status || !tensor.present()) return;
                double* const at = batch.params.numbers() + (tensor.data - grad.numbers());
                status = batch.differences(name, at, tensor.data, tensor.size(), seed);
            },
            expert, shape);
        if (!status) return status;
    }

    // 6: absent weights are 1.
    Block grad_ones(grad_bytes), dweight_ones(capacity * Batch::number), drows_ones(row_bytes);
    grad.fill(0), dweight.fill(0), batch.weight.fill(1.0);
    backward(drows, dweight, grad, true);
    backward(drows_ones, dweight_ones, grad_ones, false);
    if (!grad.same_bits(grad_ones) || !dweight.same_bits(dweight_ones) || !drows.same_bits(drows_ones))
        return broken("law 6, backward without weights", "the bits of weights of 1", "others");
    return {};
}

}  // namespace steelyard
