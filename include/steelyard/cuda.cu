// The CUDA device compiled: what the library's policies call, for the element types float and bf16.
#include "steelyard/balance/entropy.hpp"
#include "steelyard/balance/z_loss.hpp"
#include "steelyard/cuda.cuh"

namespace steelyard {

template <class T>
using vector = view<T, 1, CudaSpace>;
template <class T>
using matrix = view<T, 2, CudaSpace>;
using Mask = vector<const std::uint8_t>;
using CudaPlan = Plan<CudaSpace>;
using CudaRouting = Routing<float, CudaSpace>;
using CudaRoutingGrad = RoutingGrad<float, CudaSpace>;
using CudaObservation = Observation<float, CudaSpace>;
using Loads = view<std::int64_t, 2>;

// ---- Elements: float ------------------------------------------------------------------------------------

using router = router_ops<Cuda>;
template index_t router::scratch_bytes<float>(const Cuda&, const LayerShape&);
template void router::logits<float>(const Cuda&, matrix<const float>, matrix<const float>, const RouterNoise&,
                                    matrix<float>, std::byte*);
template void router::add_bias<float>(const Cuda&, vector<const float>, matrix<float>);
template void router::bias_backward<float>(const Cuda&, matrix<const float>, vector<float>);
template void router::logits_backward<float>(const Cuda&, matrix<const float>, Mask, matrix<const float>,
                                             const RouterNoise&, matrix<const float>, matrix<float>, matrix<float>,
                                             std::byte*);

using plan = plan_ops<Cuda>;
template void plan::dispatch<float>(const Cuda&, const CudaPlan&, matrix<const float>, matrix<float>);
template void plan::combine<float>(const Cuda&, const CudaPlan&, matrix<const float>, matrix<const float>,
                                   matrix<float>, Write);
template void plan::combine_backward<float>(const Cuda&, const CudaPlan&, matrix<const float>, matrix<const float>,
                                            matrix<float>);

using expert = expert_ops<Cuda>;
template index_t expert::scratch_bytes<float>(const Cuda&, index_t, index_t, index_t);
template void expert::ffn_forward<float>(const Cuda&, const FfnFunction&, const FfnWeights<const float, CudaSpace>&,
                                         matrix<const float>, const CudaPlan&, const FfnKept<float, CudaSpace>&,
                                         matrix<float>, std::byte*);
template void expert::ffn_backward<float>(const Cuda&, const FfnFunction&, const FfnWeights<const float, CudaSpace>&,
                                          matrix<const float>, const CudaPlan&, const FfnKept<const float, CudaSpace>&,
                                          matrix<const float>, matrix<const float>,
                                          const FfnGradRows<float, CudaSpace>&, matrix<float>, matrix<float>,
                                          const FfnWeights<float, CudaSpace>&, std::byte*);

// ---- Elements: bf16 -------------------------------------------------------------------------------------

template index_t router::scratch_bytes<bf16>(const Cuda&, const LayerShape&);
template void router::logits<bf16>(const Cuda&, matrix<const bf16>, matrix<const bf16>, const RouterNoise&,
                                   matrix<float>, std::byte*);
template void router::add_bias<bf16>(const Cuda&, vector<const bf16>, matrix<float>);
template void router::bias_backward<bf16>(const Cuda&, matrix<const float>, vector<bf16>);
template void router::logits_backward<bf16>(const Cuda&, matrix<const bf16>, Mask, matrix<const bf16>,
                                            const RouterNoise&, matrix<const float>, matrix<bf16>, matrix<bf16>,
                                            std::byte*);

template void plan::dispatch<bf16>(const Cuda&, const CudaPlan&, matrix<const bf16>, matrix<bf16>);
template void plan::combine<bf16>(const Cuda&, const CudaPlan&, matrix<const bf16>, matrix<const float>, matrix<bf16>,
                                  Write);
template void plan::combine_backward<bf16>(const Cuda&, const CudaPlan&, matrix<const bf16>, matrix<const bf16>,
                                           matrix<float>);

template index_t expert::scratch_bytes<bf16>(const Cuda&, index_t, index_t, index_t);
template void expert::ffn_forward<bf16>(const Cuda&, const FfnFunction&, const FfnWeights<const bf16, CudaSpace>&,
                                        matrix<const bf16>, const CudaPlan&, const FfnKept<bf16, CudaSpace>&,
                                        matrix<bf16>, std::byte*);
template void expert::ffn_backward<bf16>(const Cuda&, const FfnFunction&, const FfnWeights<const bf16, CudaSpace>&,
                                         matrix<const bf16>, const CudaPlan&, const FfnKept<const bf16, CudaSpace>&,
                                         matrix<const float>, matrix<const bf16>, const FfnGradRows<bf16, CudaSpace>&,
                                         matrix<bf16>, matrix<float>, const FfnWeights<bf16, CudaSpace>&, std::byte*);

// ---- Routings: float for both ---------------------------------------------------------------------------

template index_t router::select<float>(const Cuda&, const SelectionRule&, vector<const float>, Mask, const CudaRouting&,
                                       std::byte*);
template index_t router::weigh<float>(const Cuda&, const SelectionRule&, Mask, const CudaRouting&, std::byte*);
template void router::take_all<float>(const Cuda&, Mask, const CudaRouting&);
template void router::select_backward<float>(const Cuda&, const SelectionRule&, Mask, const CudaRouting&,
                                             const CudaRoutingGrad&);

using balance = balance_ops<Cuda>;
template void balance::count<float>(const Cuda&, const CudaObservation&, Loads, const Choices&, std::byte*);
template void balance::count<float>(const Cuda&, const CudaObservation&, Loads, const FixedSums<Quantity::probs>&,
                                    std::byte*);
template void balance::count<float>(const Cuda&, const CudaObservation&, Loads, const FixedSums<Quantity::gates>&,
                                    std::byte*);
template void balance::count<float>(const Cuda&, const CudaObservation&, Loads, const FixedSums<Quantity::smooth_load>&,
                                    std::byte*);
template void balance::count<float>(const Cuda&, const CudaObservation&, Loads, const Shortfalls<>&, std::byte*);
template void balance::count_drawn<float>(const Cuda&, const CudaObservation&, const TokenDraw&, Loads, const Choices&,
                                          std::byte*);
template void balance::count_drawn<float>(const Cuda&, const CudaObservation&, const TokenDraw&, Loads,
                                          const FixedSums<Quantity::probs>&, std::byte*);
template void balance::count_drawn<float>(const Cuda&, const CudaObservation&, const TokenDraw&, Loads,
                                          const FixedSums<Quantity::gates>&, std::byte*);
template void balance::count_drawn<float>(const Cuda&, const CudaObservation&, const TokenDraw&, Loads,
                                          const FixedSums<Quantity::smooth_load>&, std::byte*);
template void balance::sum_quantity<float, Quantity::probs>(const Cuda&, const CudaObservation&, view<double, 2>,
                                                            view<std::int64_t, 1>, std::byte*);
template void balance::sum_quantity<float, Quantity::gates>(const Cuda&, const CudaObservation&, view<double, 2>,
                                                            view<std::int64_t, 1>, std::byte*);
template void balance::sum_quantity<float, Quantity::smooth_load>(const Cuda&, const CudaObservation&, view<double, 2>,
                                                                  view<std::int64_t, 1>, std::byte*);
template void balance::add_quantity_gradient<float, Quantity::probs>(const Cuda&, const CudaObservation&,
                                                                     view<const double, 2>, double,
                                                                     const CudaRoutingGrad&, std::byte*);
template void balance::add_quantity_gradient<float, Quantity::gates>(const Cuda&, const CudaObservation&,
                                                                     view<const double, 2>, double,
                                                                     const CudaRoutingGrad&, std::byte*);
template void balance::add_quantity_gradient<float, Quantity::smooth_load>(const Cuda&, const CudaObservation&,
                                                                           view<const double, 2>, double,
                                                                           const CudaRoutingGrad&, std::byte*);
template void balance::sum_tokens<float>(const Cuda&, const CudaObservation&, const ZLoss&, view<double, 1>,
                                         std::byte*);
template void balance::sum_tokens<float>(const Cuda&, const CudaObservation&, const LocalEntropy&, view<double, 1>,
                                         std::byte*);
template void balance::add_token_gradient<float>(const Cuda&, const CudaObservation&, const ZLoss&, double,
                                                 matrix<float>, std::byte*);
template void balance::add_token_gradient<float>(const Cuda&, const CudaObservation&, const LocalEntropy&, double,
                                                 matrix<float>, std::byte*);

}  // namespace steelyard
