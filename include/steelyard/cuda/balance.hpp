// Balance kernels of the CUDA device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "steelyard/core/gate.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/ops/balance_ops.hpp"

namespace steelyard {

/// The contract is that of balance_ops (ops/balance_ops.hpp), for float; defined in cuda/balance.cuh. Loads, sums and
/// slopes are in pinned host memory, where policies do their arithmetic; kernels write them once, when all blocks'
/// parts are added up, in a fixed order.
///
/// Objectives on logits are run as they are, a thread for each token: all that they call must be constexpr. ZLoss and
/// LocalEntropy are instantiated in cuda.cu; your own is by two lines in a .cu of yours that includes cuda/balance.cuh.
///
/// A draw (Shuffled) is a chain of decisions over the tokens of all ranks up to this one, by one thread: some ten
/// milliseconds for a million. Histograms of shortfalls (QuantileBias) are of all tokens: none of a draw.
template <>
struct balance_ops<Cuda> {
    template <class G>
    using Seen = Observation<G, CudaSpace>;

    static index_t scratch_bytes(const Cuda& device, const LayerShape& shape);

    template <class G, class Tally = Choices>
    static void count(const Cuda& device, const Seen<G>& seen, view<std::int64_t, 2> load, const Tally& tally,
                      std::byte* scratch);
    template <class G, class Tally = Choices>
    static void count_drawn(const Cuda& device, const Seen<G>& seen, const TokenDraw& draw, view<std::int64_t, 2> load,
                            const Tally& tally, std::byte* scratch);
    template <class G, Quantity Q>
    static void sum_quantity(const Cuda& device, const Seen<G>& seen, view<double, 2> sums,
                             view<std::int64_t, 1> own_tokens, std::byte* scratch);
    template <class G, Quantity Q>
    static void add_quantity_gradient(const Cuda& device, const Seen<G>& seen, view<const double, 2> coefficients,
                                      double factor, const RoutingGrad<G, CudaSpace>& grad, std::byte* scratch);
    template <class G, class Objective>
    static void sum_tokens(const Cuda& device, const Seen<G>& seen, const Objective& objective, view<double, 1> sum,
                           std::byte* scratch);
    template <class G, class Objective>
    static void add_token_gradient(const Cuda& device, const Seen<G>& seen, const Objective& objective, double factor,
                                   view<G, 2, CudaSpace> dlogits, std::byte* scratch);
};

}  // namespace steelyard
