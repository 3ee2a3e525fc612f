// Rows of one expert between cuBLAS products: gathering, biases, the activation and its gradient.
#pragma once

#include <cstdint>

#include "steelyard/core/gate.hpp"
#include "steelyard/cuda/kernels/ffn_function.cuh"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

/// to[r] (=) from[choice[r] / K], one block a row.
template <class T>
__global__ void gather_rows(Matrix<const T> from, int width, const std::int32_t* choice, int top_k, Matrix<T> to) {
    const index_t row = blockIdx.x, token = choice[row] / top_k;
    for (int j = threadIdx.x; j < width; j += blockDim.x) to(row, j) = from(token, j);
}

/// rows[r] += bias, one block a row.
template <class T>
__global__ void add_bias_to_rows(const T* bias, int width, Matrix<T> rows) {
    for (int j = threadIdx.x; j < width; j += blockDim.x)
        rows(blockIdx.x, j) = from_float<T>(to_float(rows(blockIdx.x, j)) + to_float(bias[j]));
}

/// gate, up += their biases, where there are any; inner (=) their activation, where wanted. One block a row.
template <class T>
__global__ void activate_rows(FunctionOf function, int hidden, const T* gate_bias, const T* up_bias, Matrix<T> gate,
                              Matrix<T> up, Matrix<T> inner) {
    const index_t row = blockIdx.x;
    for (int j = threadIdx.x; j < hidden; j += blockDim.x) {
        float g = 0.0f, u = to_float(up(row, j));
        if (up_bias != nullptr) up(row, j) = from_float<T>(u += to_float(up_bias[j]));
        if (gate.data != nullptr) {
            g = to_float(gate(row, j));
            if (gate_bias != nullptr) gate(row, j) = from_float<T>(g += to_float(gate_bias[j]));
        }
        if (inner.data != nullptr) inner(row, j) = from_float<T>(point_of(function, g, u).a);
    }
}

/// What the gradient of the rows of one expert is made of.
template <class T>
struct GradientRows {
    Matrix<const T> gate, up;        // kept
    Matrix<const T> da;              // the output's gradient through `down`, without the combine weight
    Matrix<const T> dy;              // [T, d], of the tokens; only with down_bias
    Matrix<T> dgate, dup, inner;     // (=)
    Matrix<const gate_t<T>> weight;  // [T, K], or none: 1
    Matrix<gate_t<T>> dweight;       // [T, K] (+=), or none
    const T* down_bias = nullptr;    // [d]
};

/// dgate, dup, inner (=) w da a', w a;  dweight += <da, a> + <dy, b_down>. One block of 256 threads a row.
template <class T>
__global__ void activation_gradient(FunctionOf function, int hidden, int width, const std::int32_t* choice, int top_k,
                                    GradientRows<T> of) {
    const index_t row = blockIdx.x, token = choice[row] / top_k, k = choice[row] % top_k;
    const float w = of.weight.data != nullptr ? of.weight(token, k) : 1.0f;
    float part = 0.0f;
    for (int j = threadIdx.x; j < hidden; j += blockDim.x) {
        const float g = of.gate.data != nullptr ? to_float(of.gate(row, j)) : 0.0f;
        const FunctionPoint p = point_of(function, g, to_float(of.up(row, j)));
        const float da = to_float(of.da(row, j));
        part += da * p.a;
        if (of.dgate.data != nullptr) of.dgate(row, j) = from_float<T>(w * da * p.by_gate);
        of.dup(row, j) = from_float<T>(w * da * p.by_up);
        of.inner(row, j) = from_float<T>(w * p.a);
    }
    if (of.dweight.data == nullptr) return;
    for (int j = threadIdx.x; j < width && of.down_bias != nullptr; j += blockDim.x)
        part += to_float(of.dy(token, j)) * to_float(of.down_bias[j]);
    const float sum = sum_of_block(part);
    if (threadIdx.x == 0) of.dweight(token, k) += sum;
}

/// sums (+=) over the rows, each times its combine weight where there is one. One thread a column, by ascending row.
template <class T>
__global__ void add_column_sums(Matrix<const T> rows, index_t count, int width, const std::int32_t* choice, int top_k,
                                Matrix<const gate_t<T>> weight, T* sums) {
    const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= width) return;
    float sum = 0.0f;
    for (index_t row = 0; row < count; ++row) {
        const float w = weight.data != nullptr ? weight(choice[row] / top_k, choice[row] % top_k) : 1.0f;
        sum += w * to_float(rows(row, column));
    }
    sums[column] = from_float<T>(to_float(sums[column]) + sum);
}

}  // namespace steelyard::cuda
