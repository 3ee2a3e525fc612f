// The kernels of a model on the GPU, all but attention's. Each is a few lines: the model is small, and so are they.
#pragma once

#include <cstdint>

#include "pretrain/adamw_factors.hpp"
#include "steelyard/cuda/kernels/warp.cuh"

namespace pretrain::kernels {

using steelyard::bf16;
using steelyard::index_t;
using steelyard::cuda::warp_max;
using steelyard::cuda::warp_sum;

/// Which thread of the grid this is, and which warp.
__device__ inline index_t thread_of_grid() { return static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline index_t warp_of_grid() { return thread_of_grid() / 32; }
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

// ---- A thread for each number ---------------------------------------------------------------------------

template <class T>
__global__ void add(const T* a, const T* b, index_t count, T* sum) {
    const index_t at = thread_of_grid();
    if (at < count) sum[at] = a[at] + b[at];
}

template <class T>
__global__ void embed(const std::uint8_t* tokens, const T* table, index_t width, index_t count, T* y) {
    const index_t at = thread_of_grid();
    if (at < count) y[at] = table[tokens[at / width] * width + at % width];
}

/// A thread for each pair of channels of queries and keys; there are as many pairs of a token as its width.
template <class T>
__global__ void turn_pairs(T* qkv, const T* table, index_t length, index_t half, index_t width, index_t pairs,
                           T direction) {
    const index_t at = thread_of_grid();
    if (at >= pairs) return;
    const index_t token = at / width, head = at % width / half, i = at % width % half;
    const T* turns = table + token % length * 2 * half;
    T* channel = qkv + token * 3 * width + head * 2 * half + i;
    const T a = channel[0], b = channel[half], cosine = turns[i], sine = direction * turns[half + i];
    channel[0] = a * cosine - b * sine;
    channel[half] = a * sine + b * cosine;
}

template <class T>
__global__ void cross_entropy_gradient(const std::uint8_t* targets, T weight, index_t vocabulary, index_t count,
                                       T* probabilities) {
    const index_t at = thread_of_grid();
    if (at >= count) return;
    const T p = weight * probabilities[at];
    probabilities[at] = at % vocabulary == targets[at / vocabulary] ? p - weight : p;
}

/// As many parts as one launch adds up.
template <class T>
struct Parts {
    static constexpr int most = 64;
    const T* of[most];
    int count;
};
template <class T>
__global__ void add_parts(Parts<T> parts, bool onto, index_t count, T* sum) {
    const index_t at = thread_of_grid();
    if (at >= count) return;
    T total = onto ? sum[at] : parts.of[0][at];
    for (int i = onto ? 0 : 1; i < parts.count; ++i) total += parts.of[i][at];
    sum[at] = total;
}

/// See adamw.hpp.
template <class T>
__global__ void adamw(AdamWFactors<T> by, index_t count, T* params, const T* gradient, T* first_moment,
                      T* second_moment) {
    const index_t at = thread_of_grid();
    if (at >= count) return;
    const T g = by.scale * gradient[at];
    const T m = by.b1 * first_moment[at] + (T(1) - by.b1) * g;
    const T v = by.b2 * second_moment[at] + (T(1) - by.b2) * g * g;
    first_moment[at] = m;
    second_moment[at] = v;
    params[at] = params[at] * by.keep - by.to_m * m / (sqrt(by.to_v * v) + by.epsilon);
}

/// What is done to a number in float and its twin in bf16.
enum class Cast { narrow, widen, drain };

/// One row of blocks for each tensor that there is twice.
template <Cast cast, class Twins>
__global__ void cast_twins(Twins twins) {
    const auto& twin = twins.of[blockIdx.y];
    const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
    for (index_t at = thread_of_grid(); at < twin.size; at += step) {
        if constexpr (cast == Cast::narrow) twin.narrow[at] = steelyard::cuda::from_float<bf16>(twin.wide[at]);
        if constexpr (cast == Cast::widen) twin.wide[at] = steelyard::cuda::to_float(twin.narrow[at]);
        if constexpr (cast == Cast::drain) {
            twin.wide[at] += steelyard::cuda::to_float(twin.narrow[at]);
            twin.narrow[at] = bf16();
        }
    }
}

// ---- A warp for each row --------------------------------------------------------------------------------

template <class T>
__global__ void norm_rows(const T* x, const T* gain, index_t rows, index_t width, T* y, T* inverse) {
    const index_t row = warp_of_grid();
    if (row >= rows) return;
    const T* in = x + row * width;
    T squares = 0;
    for (index_t c = lane_of_warp(); c < width; c += 32) squares += in[c] * in[c];
    const T r = T(1) / sqrt(warp_sum(squares) / static_cast<T>(width) + T(1e-5));
    for (index_t c = lane_of_warp(); c < width; c += 32) y[row * width + c] = in[c] * gain[c] * r;
    if (lane_of_warp() == 0) inverse[row] = r;
}

template <class T>
__global__ void norm_rows_gradient(const T* x, const T* gain, const T* inverse, const T* dy, index_t rows,
                                   index_t width, T* dx) {
    const index_t row = warp_of_grid();
    if (row >= rows) return;
    const index_t begin = row * width;
    T along = 0;
    for (index_t c = lane_of_warp(); c < width; c += 32) along += dy[begin + c] * gain[c] * x[begin + c];
    const T r = inverse[row], part = warp_sum(along) / static_cast<T>(width) * r * r * r;
    for (index_t c = lane_of_warp(); c < width; c += 32)
        dx[begin + c] += dy[begin + c] * gain[c] * r - x[begin + c] * part;
}

template <class T>
__global__ void cross_entropy(const std::uint8_t* targets, index_t rows, index_t vocabulary, T* logits, T* losses) {
    const index_t row = warp_of_grid();
    if (row >= rows) return;
    T* z = logits + row * vocabulary;
    const T wanted = z[targets[row]];
    T top = z[0];
    for (index_t v = lane_of_warp(); v < vocabulary; v += 32) top = max(top, z[v]);
    top = warp_max(top);
    __syncwarp();  // all lanes have read what one of them is about to write over
    T sum = 0;
    for (index_t v = lane_of_warp(); v < vocabulary; v += 32) {
        const T e = exp(z[v] - top);
        z[v] = e;
        sum += e;
    }
    sum = warp_sum(sum);
    const T share = T(1) / sum;
    for (index_t v = lane_of_warp(); v < vocabulary; v += 32) z[v] *= share;
    if (lane_of_warp() == 0) losses[row] = log(sum) - (wanted - top);
}

// ---- Sums over tokens -----------------------------------------------------------------------------------

/// A block for 32 columns: each of its 32 warps adds up every 32nd row, then the first one adds up these sums.
template <class T>
__global__ void norm_gain_gradient(const T* x, const T* inverse, const T* dy, index_t rows, index_t width, T* dgain) {
    __shared__ T sums[32][32];
    const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x / 32);
    const index_t column = static_cast<index_t>(blockIdx.x) * 32 + lane;
    T sum = 0;
    if (column < width)
        for (index_t row = warp; row < rows; row += 32)
            sum += dy[row * width + column] * x[row * width + column] * inverse[row];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= width) return;
    for (int other = 1; other < 32; ++other) sum += sums[other][lane];
    dgain[column] += sum;
}

/// A block for each byte and as many columns as it has threads: goes over all tokens in their order.
template <class T>
__global__ void embed_gradient(const std::uint8_t* tokens, index_t count, const T* dy, index_t width, T* dtable) {
    constexpr int some = 512;
    __shared__ std::uint8_t shared[some];
    const index_t column = static_cast<index_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    T* const to = dtable + static_cast<index_t>(blockIdx.x) * width + column;
    const bool here = column < width;
    T sum = here ? *to : T(0);
    for (index_t begin = 0; begin < count; begin += some) {
        const int n = static_cast<int>(count - begin < some ? count - begin : some);
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
            shared[i] = tokens[begin + i];
        __syncthreads();
        for (int i = 0; i < n; ++i)
            if (shared[i] == blockIdx.x && here) sum += dy[(begin + i) * width + column];
    }
    if (here) *to = sum;
}

/// A block of 256 threads for each block of numbers.
template <class T>
__global__ void square_blocks(const T* numbers, index_t count, index_t block, double* squares) {
    const index_t begin = static_cast<index_t>(blockIdx.x) * block;
    const index_t end = begin + block < count ? begin + block : count;
    double sum = 0;
    for (index_t at = begin + threadIdx.x; at < end; at += blockDim.x) {
        const double value = static_cast<double>(numbers[at]);
        sum += value * value;
    }
    sum = steelyard::cuda::sum_of_block(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

}  // namespace pretrain::kernels
