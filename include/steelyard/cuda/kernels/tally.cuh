// What balance counts and sums: over blocks of tokens, or over one packed sequence, and then over the blocks in order.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/warp.cuh"
#include "steelyard/ops/balance_ops.hpp"

namespace steelyard::cuda {

/// Tokens of an Observation, and how they are cut: into segments, where there are several, or into blocks of a fixed
/// size.
struct SeenTokens {
    static constexpr int block_tokens = 256, threads = 256;

    Matrix<const float> logits, probs, weight, smooth_load;
    Matrix<const expert_t> expert;
    const std::uint8_t* mask;  // [T], or null
    const std::int32_t* ids;   // [T], or null
    const index_t* sequences;  // [S + 1], or null: one sequence
    index_t sequence_count;
    std::int32_t only_id;
    index_t tokens;
    int experts, top_k;
    bool by_segment;

    explicit SeenTokens(const Observation<float, CudaSpace>& seen, index_t segments)
        : logits{seen.routing.logits.data, seen.routing.logits.strides[0]},
          probs{seen.routing.probs.data, seen.routing.probs.strides[0]},
          weight{seen.routing.weight.data, seen.routing.weight.strides[0]},
          smooth_load{seen.routing.smooth_load.data, seen.routing.smooth_load.strides[0]},
          expert{seen.routing.expert.data, seen.routing.expert.strides[0]},
          mask(seen.tokens.mask.data),
          ids(seen.tokens.ids.data),
          sequences(seen.tokens.sequences.data),
          sequence_count(seen.tokens.sequences.present() ? seen.tokens.sequences.extents[0] - 1 : 1),
          only_id(seen.only_id),
          tokens(seen.count()),
          experts(static_cast<int>(seen.experts())),
          top_k(static_cast<int>(seen.top_k())),
          by_segment(segments > 1) {}

    __device__ bool counts(index_t t) const {
        if (mask != nullptr && mask[t] == 0) return false;
        return only_id < 0 || (ids != nullptr && ids[t] == only_id);
    }
    /// Tokens of part `part`: a block of them, or a segment, of which those beyond the last sequence are empty.
    __device__ index_t begin(index_t part) const {
        if (!by_segment) return part * block_tokens;
        if (sequences == nullptr) return part == 0 ? 0 : tokens;
        return part < sequence_count ? sequences[part] : tokens;
    }
    __device__ index_t end(index_t part) const {
        if (!by_segment)
            return part * block_tokens + block_tokens < tokens ? part * block_tokens + block_tokens : tokens;
        if (sequences == nullptr) return tokens;
        return part < sequence_count ? sequences[part + 1] : tokens;
    }
    __device__ index_t segment_of(index_t t) const {
        if (!by_segment || sequences == nullptr) return 0;
        index_t low = 0, high = sequence_count;  // sequences[low] <= t < sequences[high]
        while (high - low > 1) {
            const index_t middle = (low + high) / 2;
            if (sequences[middle] <= t)
                low = middle;
            else
                high = middle;
        }
        return low;
    }
};

/// parts [parts, E + 1] (=): the choices of each expert, or fixed-point sums of a quantity, and the tokens that count.
template <class Value>
__global__ void tally_tokens(SeenTokens seen, Value value_of, std::int64_t* parts) {
    extern __shared__ unsigned long long tallied[];  // [E + 1]
    for (int e = threadIdx.x; e <= seen.experts; e += blockDim.x) tallied[e] = 0;
    __syncthreads();
    for (index_t t = seen.begin(blockIdx.x) + threadIdx.x; t < seen.end(blockIdx.x); t += blockDim.x) {
        if (!seen.counts(t)) continue;
        // Integers: exact in any order.
        value_of.each(seen, t, [&](int e, std::int64_t value) {
            atomicAdd(&tallied[e], static_cast<unsigned long long>(value));
        });
        atomicAdd(&tallied[seen.experts], 1ull);
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= seen.experts; e += blockDim.x)
        parts[blockIdx.x * (seen.experts + 1) + e] = static_cast<std::int64_t>(tallied[e]);
}

struct ChoiceValue {
    template <class Add>
    __device__ void each(const SeenTokens& seen, index_t t, Add&& add) const {
        for (int k = 0; k < seen.top_k; ++k)
            if (const expert_t e = seen.expert(t, k); e >= 0) add(e, 1);
    }
};
template <Quantity Q>
struct FixedValue {
    template <class Add>
    __device__ void each(const SeenTokens& seen, index_t t, Add&& add) const {
        if constexpr (Q == Quantity::gates) {
            for (int k = 0; k < seen.top_k; ++k)
                if (const expert_t e = seen.expert(t, k); e >= 0)
                    add(e, FixedPoint::from_small(within(static_cast<double>(seen.weight(t, k)))));
        } else {
            const auto& from = Q == Quantity::probs ? seen.probs : seen.smooth_load;
            int e = static_cast<int>(threadIdx.x) % seen.experts;  // each from elsewhere: they add to different words
            for (int i = 0; i < seen.experts; ++i) {
                add(e, FixedPoint::from_small(static_cast<double>(from(t, e))));
                e = e + 1 < seen.experts ? e + 1 : 0;
            }
        }
    }

private:
    /// FixedPoint::from's clamp; std::clamp would take references, to constants that lie in the host's memory.
    __device__ static double within(double value) {
        constexpr double largest = FixedPoint::largest;
        return value < -largest ? -largest : value > largest ? largest : value;
    }
};

/// parts [parts, E + 1] (=): sums of a quantity in double, by ascending token in each of a few runs, which are added in
/// order; and behind them the tokens.
template <Quantity Q>
__global__ void sum_tokens_of(SeenTokens seen, double* parts) {
    extern __shared__ double sums[];  // [runs, columns]
    const int columns = min(SeenTokens::threads, (seen.experts + 31) / 32 * 32), runs = SeenTokens::threads / columns;
    const int column = threadIdx.x % columns, run = threadIdx.x / columns;
    double* const part = parts + blockIdx.x * (seen.experts + 1);
    for (int first = 0; first < seen.experts; first += columns) {
        const int e = first + column;
        double sum = 0.0;
        if (run < runs && e < seen.experts)
            for (index_t t = seen.begin(blockIdx.x) + run; t < seen.end(blockIdx.x); t += runs) {
                if (!seen.counts(t)) continue;
                if constexpr (Q == Quantity::gates) {
                    for (int k = 0; k < seen.top_k; ++k)
                        if (seen.expert(t, k) == e) sum += static_cast<double>(seen.weight(t, k));
                } else {
                    sum += static_cast<double>((Q == Quantity::probs ? seen.probs : seen.smooth_load)(t, e));
                }
            }
        if (run < runs) sums[run * columns + column] = sum;
        __syncthreads();
        if (run == 0 && e < seen.experts) {
            for (int r = 1; r < runs; ++r) sum += sums[r * columns + column];
            part[e] = sum;
        }
        __syncthreads();
    }
    int counted = 0;
    for (index_t t = seen.begin(blockIdx.x) + threadIdx.x; t < seen.end(blockIdx.x); t += blockDim.x)
        counted += seen.counts(t) ? 1 : 0;
    const int tokens = sum_of_block(counted);
    if (threadIdx.x == 0) part[seen.experts] = tokens;
}

/// out [rows, words] (=): the parts of each row, of which there are `each`, in order.
template <class Number>
__global__ void add_up_parts(const Number* parts, int each, int words, Number* out, index_t stride) {
    const int word = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
    if (word >= words) return;
    Number sum = 0;
#pragma unroll 4
    for (int part = 0; part < each; ++part)
        sum += parts[(static_cast<index_t>(blockIdx.x) * each + part) * words + word];
    out[blockIdx.x * stride + word] = sum;
}
/// The same, of sums and, in the last word, tokens.
__global__ void add_up_sums(const double* parts, int each, int experts, double* sums, index_t stride,
                            std::int64_t* own_tokens) {
    const int word = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
    if (word > experts) return;
    double sum = 0;
#pragma unroll 4
    for (int part = 0; part < each; ++part)
        sum += parts[(static_cast<index_t>(blockIdx.x) * each + part) * (experts + 1) + word];
    if (word < experts)
        sums[blockIdx.x * stride + word] = sum;
    else
        own_tokens[blockIdx.x] = static_cast<std::int64_t>(sum);
}

/// grad += factor slopes[segment of t], by the quantity.
template <Quantity Q>
__global__ void add_slopes(SeenTokens seen, const double* slopes, double factor, Matrix<float> grad) {
    const int columns = Q == Quantity::gates ? seen.top_k : seen.experts;
    const index_t at = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= seen.tokens * columns) return;
    const index_t t = at / columns;
    if (!seen.counts(t)) return;
    const int column = static_cast<int>(at % columns);
    const int e = Q == Quantity::gates ? seen.expert(t, column) : column;
    if (e >= 0) grad(t, column) += static_cast<float>(factor * slopes[seen.segment_of(t) * seen.experts + e]);
}

/// RowMath (balance/objective.hpp) of one thread.
struct ThreadMath {
    template <class T>
    __device__ static T exp(T x) {
        return expf(x);
    }
    template <class T>
    __device__ static void add_exp(view<const T, 1> row, T shift, T factor, view<T, 1> out) {
        for (index_t i = 0; i < row.extents[0]; ++i) out.data[i] += factor * expf(row.data[i] - shift);
    }
    template <class T>
    __device__ static T log_sum_exp(view<const T, 1> row) {
        T largest = row.data[0], sum = 0;
        for (index_t i = 1; i < row.extents[0]; ++i) largest = fmaxf(largest, row.data[i]);
        for (index_t i = 0; i < row.extents[0]; ++i) sum += expf(row.data[i] - largest);
        return largest + logf(sum);
    }
};

/// parts [blocks] (=): the sum of the objective's losses over a block of tokens.
template <class Objective>
__global__ void sum_token_losses(SeenTokens seen, Objective objective, double* parts) {
    const index_t t = static_cast<index_t>(blockIdx.x) * SeenTokens::block_tokens + threadIdx.x;
    double loss = 0.0;
    if (t < seen.tokens && seen.counts(t)) {
        const view<const float, 1> row(&seen.logits(t, 0), seen.experts);
        if constexpr (requires { objective.loss(row, ThreadMath{}); })
            loss = objective.loss(row, ThreadMath{});
        else
            loss = objective.loss(row);
    }
    const double sum = sum_of_block(loss);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

template <class Objective>
__global__ void add_token_gradients(SeenTokens seen, Objective objective, double factor, Matrix<float> dlogits) {
    const index_t t = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (t >= seen.tokens || !seen.counts(t)) return;
    const view<const float, 1> row(&seen.logits(t, 0), seen.experts);
    const view<float, 1> out(&dlogits(t, 0), seen.experts);
    if constexpr (requires { objective.gradient(row, factor, out, ThreadMath{}); })
        objective.gradient(row, factor, out, ThreadMath{});
    else
        objective.gradient(row, factor, out);
}

}  // namespace steelyard::cuda
