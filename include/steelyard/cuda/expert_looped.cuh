// Experts one after the other by cuBLAS: for every element type, size and GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "steelyard/core/gate.hpp"
#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/cuda/kernels/ffn_rows.cuh"
#include "steelyard/cuda/product.cuh"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard::cuda {

/// Feed-forward experts. The host waits for the plan's counts; rows are worked off in blocks, so that scratch does not
/// grow with their number.
template <class T>
class LoopedFfn {
public:
    using Space = CudaSpace;
    static constexpr index_t block_rows = 4096;

    static index_t scratch_bytes(index_t rows, index_t width, index_t hidden) {
        return bytes_of<Scratch>(std::min(rows, block_rows), width, hidden);
    }

    LoopedFfn(const Cuda& device, const FfnFunction& function, const FfnWeights<const T, Space>& weights,
              view<const T, 2, Space> x, const Plan<Space>& plan, std::byte* scratch)
        : device_(device),
          function_(function, weights.gate.present()),
          weights_(weights),
          x_(x),
          plan_(plan),
          width_(weights.up.extents[2]),
          hidden_(weights.up.extents[1]),
          scratch_(place<Scratch>(scratch, std::min(plan.choice.extents[0], block_rows), width_, hidden_)) {}

    void forward(const FfnKept<T, Space>& kept, view<T, 2, Space> rows) const {
        each_block([&](index_t e, index_t begin, index_t count) {
            const Matrix<T> gate = function_.gated ? pick(kept.gate, scratch_.gate, begin) : Matrix<T>{};
            const Matrix<T> up = pick(kept.up, scratch_.up, begin);
            gather(x_, begin, count, scratch_.x);
            if (function_.gated) times_turned(count, hidden_, width_, of(scratch_.x), weights_.gate[e], gate);
            times_turned(count, hidden_, width_, of(scratch_.x), weights_.up[e], up);
            const Matrix<T> inner = rows.present() ? of(scratch_.inner) : Matrix<T>{};
            activate_rows<T><<<grid(count), 256, 0, device_.stream>>>(function_, static_cast<int>(hidden_),
                                                                      bias(weights_.gate_bias, e),
                                                                      bias(weights_.up_bias, e), gate, up, inner);
            check_call(cudaGetLastError(), "activate_rows");
            if (!rows.present()) return;
            const Matrix<T> out = from(rows, begin);
            times_turned(count, width_, hidden_, inner, weights_.down[e], out);
            if (const T* own = bias(weights_.down_bias, e); own != nullptr) {
                add_bias_to_rows<T><<<grid(count), 256, 0, device_.stream>>>(own, static_cast<int>(width_), out);
                check_call(cudaGetLastError(), "add_bias_to_rows");
            }
        });
    }

    void backward(const FfnKept<const T, Space>& kept, view<const gate_t<T>, 2, Space> weight,
                  view<const T, 2, Space> dy, const FfnGradRows<T, Space>& to, view<T, 2, Space> drows,
                  view<gate_t<T>, 2, Space> dweight, const FfnWeights<T, Space>& grads) const {
        each_block([&](index_t e, index_t begin, index_t count) {
            const Matrix<T> dgate = function_.gated ? from(to.gate, begin) : Matrix<T>{}, dup = from(to.up, begin);
            const Matrix<T> inner = from(to.inner, begin), da = of(scratch_.inner), all_dy = of(scratch_.dy);
            gather(x_, begin, count, scratch_.x);
            gather(dy, begin, count, scratch_.dy);
            multiply<Turn::no, Turn::no, T, T>(device_, count, hidden_, width_, fixed(all_dy), of(weights_.down[e]), da,
                                               Write::assign);
            const GradientRows<T> rows{function_.gated ? from(kept.gate, begin) : Matrix<const T>{},
                                       from(kept.up, begin),
                                       fixed(da),
                                       of(dy),
                                       dgate,
                                       dup,
                                       inner,
                                       of(weight),
                                       of(dweight),
                                       bias(weights_.down_bias, e)};
            activation_gradient<T><<<grid(count), 256, 0, device_.stream>>>(function_, static_cast<int>(hidden_),
                                                                            static_cast<int>(width_),
                                                                            plan_.choice.data + begin, top_k(), rows);
            check_call(cudaGetLastError(), "activation_gradient");
            if (drows.present()) {
                const Matrix<T> out = from(drows, begin);
                multiply<Turn::no, Turn::no, T, T>(device_, count, width_, hidden_, fixed(dup), of(weights_.up[e]), out,
                                                   Write::assign);
                if (function_.gated)
                    multiply<Turn::no, Turn::no, T, T>(device_, count, width_, hidden_, fixed(dgate),
                                                       of(weights_.gate[e]), out, Write::add);
            }
            add_product(grads.up, e, hidden_, width_, count, dup, of(scratch_.x));
            add_product(grads.gate, e, hidden_, width_, count, dgate, of(scratch_.x));
            add_product(grads.down, e, width_, hidden_, count, all_dy, inner);
            add_sums(grads.up_bias, e, fixed(dup), count, hidden_, begin, {});
            add_sums(grads.gate_bias, e, fixed(dgate), count, hidden_, begin, {});
            add_sums(grads.down_bias, e, fixed(all_dy), count, width_, begin, of(weight));
        });
    }

private:
    struct Scratch {
        view<T, 2, Space> x, dy, gate, up, inner;
        template <class Field>
        void fields(Field&& field, index_t rows, index_t width, index_t hidden) {
            field("x", x, rows, width);
            field("dy", dy, rows, width);
            field("gate", gate, rows, hidden);
            field("up", up, rows, hidden);
            field("inner", inner, rows, hidden);
        }
    };

    [[nodiscard]] int top_k() const { return static_cast<int>(plan_.top_k()); }
    static unsigned grid(index_t rows) { return static_cast<unsigned>(rows); }
    template <class U>
    static Matrix<U> of(const view<U, 2, Space>& all) {
        return {all.data, all.strides[0]};
    }
    template <class U>
    static Matrix<U> from(const view<U, 2, Space>& all, index_t row) {
        return {all.data + row * all.strides[0], all.strides[0]};
    }
    static Matrix<const T> fixed(const Matrix<T>& matrix) { return {matrix.data, matrix.stride}; }
    /// Rows of what is kept, or else the block's own.
    static Matrix<T> pick(const view<T, 2, Space>& kept, const view<T, 2, Space>& own, index_t row) {
        return kept.present() ? from(kept, row) : of(own);
    }
    template <class U>
    static U* bias(const view<U, 2, Space>& biases, index_t e) {
        return biases.present() ? biases.data + e * biases.strides[0] : nullptr;
    }

    /// body(expert, first row, rows) for at most block_rows rows of one expert at a time.
    template <class Body>
    void each_block(Body&& body) const {
        std::vector<index_t> offsets(static_cast<std::size_t>(plan_.experts()) + 1);
        check_call(cudaMemcpyAsync(offsets.data(), plan_.offsets.data, offsets.size() * sizeof(index_t),
                                   cudaMemcpyDeviceToHost, device_.stream),
                   "cudaMemcpyAsync");
        check_call(cudaStreamSynchronize(device_.stream), "cudaStreamSynchronize");
        for (std::size_t e = 0; e + 1 < offsets.size(); ++e)
            for (index_t begin = offsets[e]; begin < offsets[e + 1]; begin += block_rows)
                body(static_cast<index_t>(e), begin, std::min(block_rows, offsets[e + 1] - begin));
    }
    void gather(const view<const T, 2, Space>& tokens, index_t begin, index_t count,
                const view<T, 2, Space>& to) const {
        gather_rows<T><<<grid(count), 256, 0, device_.stream>>>(of(tokens), static_cast<int>(width_),
                                                                plan_.choice.data + begin, top_k(), of(to));
        check_call(cudaGetLastError(), "gather_rows");
    }
    /// out = rows weight^T
    void times_turned(index_t m, index_t n, index_t k, const Matrix<T>& rows, const view<const T, 2, Space>& weight,
                      const Matrix<T>& out) const {
        multiply<Turn::no, Turn::yes, T, T>(device_, m, n, k, fixed(rows), of(weight), out, Write::assign);
    }
    /// grads[e] += left^T right, over `count` rows
    void add_product(const view<T, 3, Space>& grads, index_t e, index_t m, index_t n, index_t count,
                     const Matrix<T>& left, const Matrix<T>& right) const {
        if (grads.present())
            multiply<Turn::yes, Turn::no, T, T>(device_, m, n, count, fixed(left), fixed(right), of(grads[e]),
                                                Write::add);
    }
    void add_sums(const view<T, 2, Space>& grads, index_t e, const Matrix<const T>& rows, index_t count, index_t width,
                  index_t begin, const Matrix<const gate_t<T>>& weight) const {
        if (!grads.present() || rows.data == nullptr) return;
        add_column_sums<T><<<static_cast<unsigned>((width + 63) / 64), 64, 0, device_.stream>>>(
            rows, count, static_cast<int>(width), plan_.choice.data + begin, top_k(), weight, bias(grads, e));
        check_call(cudaGetLastError(), "add_column_sums");
    }

    Cuda device_;
    FunctionOf function_;
    FfnWeights<const T, Space> weights_;
    view<const T, 2, Space> x_;
    Plan<Space> plan_;
    index_t width_, hidden_;
    Scratch scratch_;
};

}  // namespace steelyard::cuda
