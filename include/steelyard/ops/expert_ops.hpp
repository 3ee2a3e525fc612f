// What a device computes inside experts: grouped feed-forward networks, forward and backward.
#pragma once

#include "steelyard/core/routing.hpp"

namespace steelyard {

/// The nonlinearity of a feed-forward expert. `gelu` is the exact form x Phi(x); `relu2` is max(x, 0)^2.
enum class Activation { relu, relu2, gelu, silu };

/// Weights of E feed-forward experts: down(act(up x + b_up) + b_down), or, where `gate` is present,
/// down(act(gate x) * (up x)). Biases may be absent. The same bundle with non-const T holds gradients.
template <class T, class Space = HostSpace>
struct FfnWeights {
    view<T, 3, Space> gate;     // [E, h, d]  present: gated (SwiGLU and its kin)
    view<T, 3, Space> up;       // [E, h, d]
    view<T, 3, Space> down;     // [E, d, h]
    view<T, 2, Space> up_bias;  // [E, h]
    view<T, 2, Space> down_bias;  // [E, d]
};

/// Pre-activations of the grouped rows: what backward needs beside x, kept or recomputed.
template <class T, class Space = HostSpace>
struct FfnKept {
    view<T, 2, Space> gate;  // [N, h]  gate x, where gated
    view<T, 2, Space> up;    // [N, h]  up x + b_up
};

/// Backward's own activations.
template <class T, class Space = HostSpace>
struct FfnGradRows {
    view<T, 2, Space> gate;   // [N, h]  gradient of the gate pre-activation, where gated
    view<T, 2, Space> up;     // [N, h]  gradient of the up pre-activation
    view<T, 2, Space> inner;  // [N, h]  the activation times its combine weight, for the gradient of `down`
};

/// Expert kernels of a device, as static functions (results independent of the number of threads; an expert
/// without rows computes nothing and gets exactly no gradient):
///
///  index_t scratch_bytes<T>(device, width, hidden)
///      bytes of `scratch` that the calls below need, aligned to `layout_alignment`.
///  void ffn_forward<T>(device, activation, weights, x[T,d], plan, kept (=), rows[N,d] (=) or absent, scratch)
///      Gathers the rows of each expert from x through the plan; writes the pre-activations to `kept`, and, where
///      `rows` is present, each row's output (without its combine weight).
///  void ffn_backward<T>(device, activation, weights, x[T,d], plan, kept, combine weight[T,K] or absent (1),
///                       dy[T,d], grad_rows (=), drows[N,d] (=), dweight[T,K] (+=) or absent, grads (+=), scratch)
///      For row r = (t, k): the output's gradient is weight[t,k] * dy[t]; dweight[t,k] += <dy[t], output[r]>,
///      computed as <down^T dy[t], act> + <dy[t], b_down>, so that no output is kept. drows is the gradient of the
///      gathered input row, to be brought together by plan_ops::combine with absent weights. `grads` members that
///      are absent are skipped (frozen weights).
template <class Device>
struct expert_ops;

}  // namespace steelyard
