// What a device does to group tokens by expert and to bring their outputs together again.
#pragma once

#include "steelyard/core/routing.hpp"

namespace steelyard {

/// Plan kernels of a device, as static functions:
///
///  index_t scratch_bytes(device, shape, top_k)
///      bytes of `scratch` that make_plan needs, aligned to `layout_alignment`.
///  void make_plan(device, choices[T,K], plan (=), scratch)
///      Stable counting sort of the choices by expert; -1 takes no row. No atomics: the order is by token. Choices
///      are -1 or in [0, E), and T K is below 2^31.
///  void dispatch<T>(device, plan, x[T,d], rows[N,d] (=))
///      rows[r] = x[choice[r] / K]. Experts gather inside their own loops; this is the stage alone.
///  void combine<T>(device, plan, rows[N,d], weight[T,K] or absent, y[T,d] (= or +=), write = Write::assign)
///      y[t] = (or +=) sum_k weight[t,k] * rows[row[t,k]] in the order of k; absent weights are 1, missing rows 0.
///      With absent weights this is the transpose of dispatch.
///  void combine_backward<T>(device, plan, rows[N,d], dy[T,d], dweight[T,K] (+=))
///      dweight[t,k] += <dy[t], rows[row[t,k]]>.
template <class Device>
struct plan_ops;

}  // namespace steelyard
