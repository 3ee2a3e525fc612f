// Balance kernels of the CUDA device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "steelyard/core/gate.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/ops/balance_ops.hpp"

namespace steelyard {

/// The contract is that of balance_ops (ops/balance_ops.hpp), for T in {float, bf16}; defined in cuda/balance.cuh. What a
/// routing holds is float for both.
///
/// Loads, sums and slopes are host views: they lie in pinned memory, which kernels write once at their end, and which is
/// copied to scratch on the stream before kernels read it. So what the host writes there in the stream's order is seen.
///
/// Counts are those of the CPU; sums in double are taken over the same blocks in the same order, so that they have the
/// same bits where the routing has. For the sums of packed sequences each is cut into `parts`.
///
/// Not here: Shortfalls. Counts of a draw (`count_drawn`) are one chain of decisions over all tokens of all ranks, by one
/// thread: some ten milliseconds for a million tokens.
template <>
struct balance_ops<Cuda> {
    static constexpr index_t block = 256;  ///< tokens whose sum is taken in one go, as on the CPU
    static constexpr index_t parts = 16;   ///< of a packed sequence

    template <class T>
    using Seen = Observation<gate_t<T>, CudaSpace>;
    template <class T>
    using Grad = RoutingGrad<gate_t<T>, CudaSpace>;

    static index_t scratch_bytes(const Cuda& device, const LayerShape& shape);

    template <class T, class Tally = Choices>
    static void count(const Cuda& device, const Seen<T>& seen, view<std::int64_t, 2> load, const Tally& tally = {});
    template <class T, class Tally = Choices>
    static void count_drawn(const Cuda& device, const Seen<T>& seen, const TokenDraw& draw, view<std::int64_t, 2> load,
                            const Tally& tally = {});
    template <class T, Quantity Q>
    static void sum_quantity(const Cuda& device, const Seen<T>& seen, view<double, 2> sums,
                             view<std::int64_t, 1> own_tokens, std::byte* scratch);
    template <class T, Quantity Q>
    static void add_quantity_gradient(const Cuda& device, const Seen<T>& seen, view<const double, 2> coefficients,
                                      double factor, const Grad<T>& grad, std::byte* scratch);
    template <class T, class Objective>
    static void sum_tokens(const Cuda& device, const Seen<T>& seen, const Objective& objective, view<double, 1> sum,
                           std::byte* scratch);
    template <class T, class Objective>
    static void add_token_gradient(const Cuda& device, const Seen<T>& seen, const Objective& objective, double factor,
                                   view<gate_t<T>, 2, CudaSpace> dlogits, std::byte* scratch);
};

}  // namespace steelyard
