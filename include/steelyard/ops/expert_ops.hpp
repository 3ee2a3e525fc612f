// What a device computes inside experts: grouped feed-forward networks and linear maps, forward and backward.
#pragma once

#include <cstddef>

#include "steelyard/core/routing.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard {

/// A function of one number.
///
///     identity   u
///     relu       max(u, 0)                        derivative 0 at 0
///     relu2      max(u, 0)^2                      squared ReLU (So et al., "Primer", 2109.08668)
///     gelu       u Phi(u), Phi(u) = (1 + erf(u / sqrt 2)) / 2, the exact form (Hendrycks and Gimpel, 1606.08415)
///     gelu_tanh  u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2, its approximation (same source)
///     silu       u / (1 + exp(-u))                (Elfwing et al., 1702.03118; Ramachandran et al., 1710.05941)
enum class Activation { relu, relu2, gelu, silu, gelu_tanh, identity };

/// The gate of gpt-oss (OpenAI, "gpt-oss-120b and gpt-oss-20b model card", 2508.10925), of two numbers:
///
///     a = (u' + 1) g' / (1 + exp(-alpha g')),   g' = min(g, limit),   u' = min(max(u, -limit), limit)
///
/// The derivative of a clamp is 1 up to and on the limit, 0 beyond.
struct ClampedSwish {
    double limit = 7.0;    ///< above 0
    double alpha = 1.702;  ///< sharpness of the sigmoid

    friend bool operator==(const ClampedSwish&, const ClampedSwish&) = default;
};

/// What stands between the matrices of a feed-forward expert, element by element, with g = gate x and u = up x:
///
///     an Activation    a = act(u) without a gate, a = act(g) u with one
///     a ClampedSwish   a of both, with a gate
///     linear(factor)   a = factor u, without a gate
///
/// An Activation and a ClampedSwish convert to it.
struct FfnFunction {
    Activation activation = Activation::relu;
    ClampedSwish clamp = {};
    bool clamped = false;
    double factor = 1.0;  ///< of the identity without a gate

    constexpr FfnFunction(Activation of_one) : activation(of_one) {}
    constexpr FfnFunction(const ClampedSwish& of_two) : clamp(of_two), clamped(true) {}
    /// factor * u
    static constexpr FfnFunction linear(double factor) {
        FfnFunction function = Activation::identity;
        function.factor = factor;
        return function;
    }
};

/// Elements of packed weights.
///
///     full   the layer's own: the results of forward have the same bits as without packing
///     bf16   rounded to bfloat16, and so are the rows that meet them; products are added in float
///     int8   rounded to 8 bits, with a float scale for each output column and group of 256 inputs; rows are rounded in
///            the same way as they come, sums are exact within a group and float beyond
///
/// Sizes of a weight: 4 (float), 2 and 1.02 bytes.
enum class PackedFormat { full, bf16, int8 };

/// What a packed copy is made for: forward alone, or backward too, which reads the matrices in another order and takes
/// as much memory again.
enum class PackedFor { inference, training };

/// Weights of feed-forward experts: down(a(up x + b_up)) + b_down, or, where `gate` is present,
/// down(a(gate x + b_gate, up x + b_up)) + b_down, a being an FfnFunction. Biases may be absent. The same bundle
/// with non-const T holds gradients.
template <class T, class Space = HostSpace>
struct FfnWeights {
    view<T, 3, Space> gate;            // [E, h, d]  present: gated (SwiGLU and its kin)
    view<T, 3, Space> up;              // [E, h, d]
    view<T, 3, Space> down;            // [E, d, h]
    view<T, 2, Space> up_bias;         // [E, h]
    view<T, 2, Space> down_bias;       // [E, d]
    view<T, 2, Space> gate_bias = {};  // [E, h]
    /// A packed copy that is read instead of the matrices, which may then be absent if it serves; or absent.
    view<const std::byte, 1, Space> packed = {};
    /// Of gradients: whether they are added to what is there, or replace it; then nothing that was there is read, and
    /// an expert without rows gets zeros.
    Write write = Write::add;
};

/// Pre-activations of the grouped rows: what backward needs beside x, kept or recomputed.
template <class T, class Space = HostSpace>
struct FfnKept {
    view<T, 2, Space> gate;  // [N, h]  gate x + b_gate, where gated
    view<T, 2, Space> up;    // [N, h]  up x + b_up
};

/// Backward's own activations.
template <class T, class Space = HostSpace>
struct FfnGradRows {
    view<T, 2, Space> gate;   // [N, h]  gradient of the gate pre-activation, where gated
    view<T, 2, Space> up;     // [N, h]  gradient of the up pre-activation
    view<T, 2, Space> inner;  // [N, h]  the activation times its combine weight, for the gradient of `down`
};

/// An update of rank r of one matrix M [out, in]: M + b a. Gradients where T is not const.
template <class T, class Space = HostSpace>
struct LowRank {
    view<T, 3, Space> a;  // [E, r, in]
    view<T, 3, Space> b;  // [E, out, r]
};

/// Updates of the three matrices of a gated feed-forward expert.
template <class T, class Space = HostSpace>
struct LowRankUpdates {
    LowRank<T, Space> gate, up, down;
};

/// Rows of rank r beside the rows of FfnKept.
template <class T, class Space = HostSpace>
struct LowRankKept {
    view<T, 2, Space> gate;  // [N, r]  factor a_gate x
    view<T, 2, Space> up;    // [N, r]  factor a_up x
};

/// Rows of rank r beside the rows of FfnGradRows.
template <class T, class Space = HostSpace>
struct LowRankGradRows {
    view<T, 2, Space> gate;   // [N, r]  gradient of a_gate x
    view<T, 2, Space> up;     // [N, r]  gradient of a_up x
    view<T, 2, Space> down;   // [N, r]  gradient of a_down inner, without the combine weight
    view<T, 2, Space> inner;  // [N, r]  factor a_down inner, with it
};

/// The rows that a grouped product reads: those of the tokens, gathered through the plan, or rows in grouped order.
template <class T, class Space = HostSpace>
struct GroupedRows {
    view<const T, 2, Space> from;  // [T, n] with `by_token`, otherwise [N, n]
    bool by_token = false;
    view<const T, 2, Space> weight = {};  // [T, K]  row (t, k) is multiplied by it; absent: 1
};

/// Weights of constant experts: mix(x)_0 x + mix(x)_1 value, mix(x) = softmax(mix x).
template <class T, class Space = HostSpace>
struct BlendWeights {
    view<T, 3, Space> mix;    // [E, 2, d]
    view<T, 2, Space> value;  // [E, d]
};

/// Expert kernels of a device, as static functions (results independent of the number of threads; an expert
/// without rows computes nothing and gets exactly no gradient). The plan may begin above row 0: rows below
/// `offsets[0]` belong to others and are neither read nor written.
///
///  index_t scratch_bytes<T>(device, rows, width, hidden)
///      bytes of `scratch` that the ffn calls need for at most so many grouped rows, aligned to `layout_alignment`.
///  void ffn_forward<T>(device, function, weights, x[T,d], plan, kept (=), rows[N,d] (=) or absent, scratch)
///      Gathers the rows of each expert from x through the plan; writes the pre-activations to `kept`, and, where
///      `rows` is present, each row's output (without its combine weight).
///  void ffn_backward<T>(device, function, weights, x[T,d], plan, kept, combine weight[T,K] or absent (1),
///                       dy[T,d], grad_rows (=), drows[N,d] (=), dweight[T,K] (+=) or absent,
///                       grads (+=, or = with grads.write), scratch)
///      For row r = (t, k): the output's gradient is weight[t,k] * dy[t]; dweight[t,k] += <dy[t], output[r]>,
///      computed as <down^T dy[t], act> + <dy[t], b_down>, so that no output is kept. drows is the gradient of the
///      gathered input row, to be brought together by plan_ops::combine with absent weights. `grads` members that
///      are absent are skipped (frozen weights).
///  index_t ffn_packed_bytes<T>(device, format, purpose, experts, width, hidden, gated)
///  void ffn_pack<T>(device, format, purpose, weights, packed (=))
///      A copy of the weights (not of the biases) in the order in which they are read. Pure; aligned to
///      `layout_alignment`. It is tied to the device it was made for.
///  Status ffn_check_packed<T>(device, stage, name, packed, experts, width, hidden, gated)
///      Refuses what ffn_pack did not make for this device and these sizes.
///  bool ffn_packed_serves(packed, purpose)
///      Whether a packed copy that was checked does without the matrices.
///
///  index_t low_rank_scratch_bytes<T>(device, width, hidden, rank)
///  void low_rank_forward<T>(device, function, weights, updates, factor, x, plan, kept (=), low (=), rows (=) or
///                           absent, scratch)
///  void low_rank_backward<T>(device, function, weights, updates, factor, x, plan, kept, low, weight or absent, dy,
///                            grad_rows (=), low_grad_rows (=), drows (=), dweight (+=) or absent, grads (+=),
///                            update grads (+=), scratch)
///      The same for a gated expert without biases whose matrices are M + factor b a: `weights` serve all experts
///      (first extent 1), `updates` have E. With b = 0 forward gives the bits of ffn_forward.
///
///  index_t linear_scratch_bytes<T>(device, in, out)
///  void linear_forward<T>(device, weight[E,out,in], input GroupedRows, plan, out[N,out] (=), scratch)
///      out[r] = weight[e] input[r], e being the expert of row r.
///  void linear_backward<T>(device, weight[E,out,in], input GroupedRows, dout GroupedRows, plan,
///                          din[N,in] (=) or absent, dweight[E,out,in] (+=) or absent, scratch)
///      din[r] = weight[e]^T dout[r];  dweight[e] += dout[r] input[r]^T over the rows of e, in order.
///
///  void zero_rows<T>(device, plan, rows[N,d] (=))
///  void scale_forward<T>(device, scale[E,d] or absent (1), x[T,d], plan, rows[N,d] (=))
///  void scale_backward<T>(device, scale or absent, x, plan, weight or absent, dy[T,d], drows[N,d] (=),
///                         dweight[T,K] (+=) or absent, dscale[E,d] (+=) or absent)
///      rows[r] = scale[e] * x[t], element by element.
///  void blend_forward<T>(device, BlendWeights, x, plan, share[N,2] (=), rows (=) or absent)
///  void blend_backward<T>(device, BlendWeights, x, plan, share[N,2], weight or absent, dy, dlogit[N] (=), drows (=),
///                         dweight (+=) or absent, grads (+=))
///      rows[r] = share[r,0] x[t] + share[r,1] value[e]; dlogit is the gradient of the first logit, and minus that
///      of the second.
template <class Device>
struct expert_ops;

}  // namespace steelyard
