// Balance kernels of the CUDA device: which are launched for what.
#pragma once

#include <algorithm>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cuda/balance.hpp"
#include "steelyard/cuda/kernels/draw.cuh"
#include "steelyard/cuda/kernels/shortfalls.cuh"
#include "steelyard/cuda/kernels/tally.cuh"
#include "steelyard/cuda/product.cuh"

namespace steelyard {

namespace cuda {

/// Parts that a load or a sum of `segments` rows is made of: one of each segment, or blocks of tokens.
inline int parts_of(index_t tokens, index_t segments) {
    return segments > 1 ? static_cast<int>(segments)
                        : std::max(1, static_cast<int>(blocks_for(tokens, SeenTokens::block_tokens)));
}

template <class Tally>
struct ValueOf {
    static_assert(std::is_same_v<Tally, Choices>,
                  "steelyard: the CUDA device tallies no shortfalls of a sample (QuantileBias over Shuffled)");
    using type = ChoiceValue;
};
template <Quantity Q>
struct ValueOf<FixedSums<Q>> {
    using type = FixedValue<Q>;
};

/// What a tally of shortfalls needs beside its load.
struct ShortfallScratch {
    view<float, 1, CudaSpace> bias;     // [E]
    view<double, 1, CudaSpace> cutoff;  // [T]
    template <class Field>
    void fields(Field&& field, index_t tokens, index_t experts) {
        field("bias", bias, experts);
        field("cutoff", cutoff, tokens);
    }
};

/// load [rows, E bins + 1] (=)
inline void count_shortfalls(const Cuda& device, const Observation<float, CudaSpace>& seen, view<std::int64_t, 2> load,
                             const Shortfalls<>& tally, std::byte* scratch) {
    const index_t rows = load.extents[0];
    const auto placed = place<ShortfallScratch>(scratch, seen.count(), seen.experts());
    check_call(
        cudaMemcpyAsync(placed.bias.data, tally.bias.data, static_cast<std::size_t>(seen.experts()) * sizeof(float),
                        cudaMemcpyDefault, device.stream),
        "cudaMemcpyAsync");
    const ShortfallCall call{SeenTokens(seen, rows), tally.score != Score::softmax, static_cast<int>(tally.bins),
                             placed.bias.data, placed.cutoff.data};
    if (seen.count() > 0) {
        find_cutoffs<<<blocks_for(seen.count() * 32, SeenTokens::threads), SeenTokens::threads, 0, device.stream>>>(
            call);
        check_call(cudaGetLastError(), "find_cutoffs");
    }
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(seen.experts() + 1));
    tally_shortfalls<<<grid, SeenTokens::threads, 0, device.stream>>>(call, load.data, load.strides[0]);
    check_call(cudaGetLastError(), "tally_shortfalls");
}

}  // namespace cuda

index_t balance_ops<Cuda>::scratch_bytes(const Cuda&, const LayerShape& shape) {
    const index_t parts = std::max<index_t>(shape.sequences, cuda::parts_of(shape.tokens, 1));
    return std::max(parts * (shape.experts + 1) * static_cast<index_t>(sizeof(double)),
                    bytes_of<cuda::ShortfallScratch>(shape.tokens, shape.experts));
}

template <class G, class Tally>
void balance_ops<Cuda>::count(const Cuda& device, const Seen<G>& seen, view<std::int64_t, 2> load,
                              [[maybe_unused]] const Tally& tally, std::byte* scratch) {
    if constexpr (std::is_same_v<Tally, Shortfalls<>>) {
        cuda::count_shortfalls(device, seen, load, tally, scratch);
    } else {
        const index_t rows = load.extents[0];
        const int words = static_cast<int>(seen.experts()) + 1, parts = cuda::parts_of(seen.count(), rows);
        auto* const tallied = reinterpret_cast<std::int64_t*>(scratch);
        using Value = typename cuda::ValueOf<Tally>::type;
        cuda::tally_tokens<Value><<<static_cast<unsigned>(parts), cuda::SeenTokens::threads,
                                    static_cast<std::size_t>(words) * sizeof(std::int64_t), device.stream>>>(
            cuda::SeenTokens(seen, rows), Value{}, tallied);
        cuda::check_call(cudaGetLastError(), "tally_tokens");
        const dim3 grid(static_cast<unsigned>(rows), cuda::blocks_for(words, 128));
        cuda::add_up_parts<std::int64_t>
            <<<grid, 128, 0, device.stream>>>(tallied, rows > 1 ? 1 : parts, words, load.data, load.strides[0]);
        cuda::check_call(cudaGetLastError(), "add_up_parts");
    }
}

template <class G, class Tally>
void balance_ops<Cuda>::count_drawn(const Cuda& device, const Seen<G>& seen, const TokenDraw& draw,
                                    view<std::int64_t, 2> load, const Tally&, std::byte*) {
    const auto room = static_cast<std::size_t>(seen.experts() + 1) * sizeof(std::int64_t);
    cuda::tally_drawn<<<1, cuda::SeenTokens::threads, room, device.stream>>>(
        cuda::SeenTokens(seen, 1), draw, typename cuda::ValueOf<Tally>::type{}, load.data);
    cuda::check_call(cudaGetLastError(), "tally_drawn");
}

template <class G, Quantity Q>
void balance_ops<Cuda>::sum_quantity(const Cuda& device, const Seen<G>& seen, view<double, 2> sums,
                                     view<std::int64_t, 1> own_tokens, std::byte* scratch) {
    const index_t rows = sums.extents[0];
    const int experts = static_cast<int>(seen.experts()), parts = cuda::parts_of(seen.count(), rows);
    auto* const summed = reinterpret_cast<double*>(scratch);
    cuda::sum_tokens_of<Q>
        <<<static_cast<unsigned>(parts), cuda::SeenTokens::threads, cuda::SeenTokens::threads * sizeof(double),
           device.stream>>>(cuda::SeenTokens(seen, rows), summed);
    cuda::check_call(cudaGetLastError(), "sum_tokens_of");
    const dim3 grid(static_cast<unsigned>(rows), cuda::blocks_for(experts + 1, 128));
    cuda::add_up_sums<<<grid, 128, 0, device.stream>>>(summed, rows > 1 ? 1 : parts, experts, sums.data,
                                                       sums.strides[0], own_tokens.data);
    cuda::check_call(cudaGetLastError(), "add_up_sums");
}

template <class G, Quantity Q>
void balance_ops<Cuda>::add_quantity_gradient(const Cuda& device, const Seen<G>& seen,
                                              view<const double, 2> coefficients, double factor,
                                              const RoutingGrad<G, CudaSpace>& grad, std::byte* scratch) {
    if (seen.count() == 0) return;
    // Once over the bus, rather than by every block.
    cuda::check_call(
        cudaMemcpyAsync(scratch, coefficients.data, static_cast<std::size_t>(coefficients.size()) * sizeof(double),
                        cudaMemcpyDefault, device.stream),
        "cudaMemcpyAsync");
    const auto& to = Q == Quantity::gates ? grad.weight : Q == Quantity::probs ? grad.probs : grad.smooth_load;
    const index_t columns = Q == Quantity::gates ? seen.top_k() : seen.experts();
    cuda::add_slopes<Q><<<cuda::blocks_for(seen.count() * columns, 256), 256, 0, device.stream>>>(
        cuda::SeenTokens(seen, coefficients.extents[0]), reinterpret_cast<const double*>(scratch), factor,
        cuda::matrix_of(to));
    cuda::check_call(cudaGetLastError(), "add_slopes");
}

template <class G, class Objective>
void balance_ops<Cuda>::sum_tokens(const Cuda& device, const Seen<G>& seen, const Objective& objective,
                                   view<double, 1> sum, std::byte* scratch) {
    const int parts = cuda::parts_of(seen.count(), 1);
    auto* const summed = reinterpret_cast<double*>(scratch);
    cuda::sum_token_losses<Objective><<<static_cast<unsigned>(parts), cuda::SeenTokens::threads, 0, device.stream>>>(
        cuda::SeenTokens(seen, 1), objective, summed);
    cuda::check_call(cudaGetLastError(), "sum_token_losses");
    cuda::add_up_parts<double><<<1, 1, 0, device.stream>>>(summed, parts, 1, sum.data, 1);
    cuda::check_call(cudaGetLastError(), "add_up_parts");
}

template <class G, class Objective>
void balance_ops<Cuda>::add_token_gradient(const Cuda& device, const Seen<G>& seen, const Objective& objective,
                                           double factor, view<G, 2, CudaSpace> dlogits, std::byte*) {
    if (seen.count() == 0) return;
    cuda::add_token_gradients<Objective><<<cuda::blocks_for(seen.count(), 128), 128, 0, device.stream>>>(
        cuda::SeenTokens(seen, 1), objective, factor, cuda::matrix_of(dlogits));
    cuda::check_call(cudaGetLastError(), "add_token_gradients");
}

}  // namespace steelyard
