// What a device does for the gates that are more than a product and a selection.
//
// One struct for each idea, specialised in the device's own folder; all functions are static, take T in {float,
// double}, give results that do not depend on the number of threads, and leave masked tokens alone as `router_ops`
// does: a masked row of any input may hold anything, a masked row of a gradient becomes 0.
#pragma once

#include "steelyard/ops/router_ops.hpp"

namespace steelyard {

/// Normal noise on the logits, z = c + sigma n, with sigma learned or fixed.
struct NoiseRule {
    int top_k = 1;
    double sigma = 0.0;          ///< where no spread is given
    double floor = 1e-2;         ///< sigma = softplus(spread) + floor, where one is given
    bool without_itself = true;  ///< the threshold of an expert leaves that expert out (Shazeer); else the K-th of all
    RouterNoise draw = {};       ///< with noise = 1: n. Not active: sigma is 0, as in evaluation

    [[nodiscard]] bool active() const { return draw.active(); }
};

/// Noise and smooth load.
///
///  index_t scratch_bytes<T>(device, shape)
///  void add_noise<T>(device, rule, spread[T,E] or absent, logits[T,E] (+=), scratch)
///      logits += sigma n.
///  void smooth_load<T>(device, rule, mask, spread or absent, logits (z), load[T,E] (=), scratch)
///      The chance that expert i is among the K best when its own noise is drawn again:
///      load_i = Phi(u_i),  u_i = (c_i - z_m) / sigma_i = (z_i - z_m) / sigma_i - n_i,
///      where m is, without itself, the (K+1)-th of z for the K best and the K-th for the others; otherwise the K-th.
///      K = E: 1. Without noise: 1 for the K best, 0 for the others.
///  void backward<T>(device, rule, mask, spread (in; its gradient =) or absent, logits, dload or absent,
///                   dlogits (by z in; by c out), scratch)
///      The threshold counts: dz_m -= dload_i phi(u_i) / sigma_i.
template <class Device>
struct noise_ops;

/// A gate over groups and a gate in each group, joined into one routing. E = G M experts lie in G contiguous groups.
///
///     logits_gj = a_g + log softmax(b_g)_j    a: outer logits, b: inner;   softmax(logits) = softmax(a) softmax(b_g)
///
///  void mean_bias(device, bias[E], mean[G] (=))
///  void join<T>(device, mask, outer, inner (expert, weight: [T, G K2], of all groups),
///               routing (logits: b in, joint =; probs: those of b in, joint =; expert, weight =))
///      The K1 K2 choices, by joint logit descending, then index ascending; weights and probs are products.
///  void split<T>(device, mask, routing, outer (logits, expert =), inner (logits, expert =))
///      Back to two levels, up to a constant in each row of b; groups that were not chosen have inner experts -1.
///  void split_gradient<T>(device, mask, routing, grad, outer, inner (weights and probs in), douter (=), dinner (=))
template <class Device>
struct level_ops;

/// Selectors of one expert each, made of smooth binary decisions (DSelect-K).
struct SelectorRule {
    int selectors = 1;   ///< K
    int bits = 0;        ///< m = ceil(log2 E)
    double gamma = 1.0;  ///< S(t) is 0 below -gamma/2, 1 above gamma/2, a cubic between
};

/// Selector k walks a binary tree whose leaves are the experts, most significant bit first; at a node with a experts
/// on its left and b on its right it goes right with p = b S / (b S + a (1 - S)), S = S(codes_kb): S where a = b,
/// never where b = 0. r_k(e) is the product along the way to e, w = softmax(mixture), q_e = sum_k w_k r_k(e).
///
///  index_t scratch_bytes<T>(device, shape, rule)
///  index_t select<T>(device, rule, mask, codes[T, K m], mixture[T, K], routing (=), scratch)
///      logits = probs = q; expert: those with q > 0, by q descending, then index ascending, then -1; weight = q.
///      Returns the first valid token whose codes or mixture are not all finite, or -1.
///  void backward<T>(device, rule, mask, codes (in; gradient =), mixture (in; gradient =), routing, grad, scratch)
///  double entropy<T>(device, rule, mask, experts, codes (in; factor * gradient =), factor, scratch)
///      Sum over valid tokens and selectors of -sum_e r log(r + 1e-6).
template <class Device>
struct selector_ops;

/// Rows of length 1, and a learned temperature tau = initial exp(log_ratio).
///
///  index_t scratch_bytes(device, shape)
///  void clear<T>(device, tensor[n,m] (= 0)),  void add<T>(device, from[n,m], to[n,m] (+=))
///  void normalize<T>(device, rows[n,r], unit[n,r] (=), norm[n] (=), epsilon)
///      unit = rows / max(|rows|, epsilon); may be in place.
///  void normalize_backward<T>(device, mask or absent, unit, norm, epsilon, drows (by the unit rows in; by rows out))
///  void temper<T>(device, factor, log_ratio[1], power, from[T,E], to[T,E] (=))
///      to = from factor exp(power log_ratio); may be in place.
///  void temper_backward<T>(device, mask, initial, log_ratio, logits, dlogits, dinitial or absent, dcosine (=),
///                          dlog_ratio[1] (+=) or absent, scratch)
///      For logits = cosine / tau, and others at the initial temperature, which is a constant.
template <class Device>
struct cosine_ops;

/// One vector, and one routing, for each packed sequence; no sequences: all tokens are one.
///
///  void pool<T>(device, x, tokens, pooled[S,d] (=), count[S] (=), valid[S] (=))
///      Means over the valid tokens of a sequence and how many these are; without any: zeros, and valid is 0.
///  void spread<T>(device, tokens, of_sequence, routing (=))
///      Each valid token gets the routing of its sequence; masked tokens as in `select`.
///  void gather<T>(device, tokens, routing, of_sequence (=))
///      The inverse: the routing of each sequence's first valid token.
///  void sum_gradient<T>(device, tokens, grad, of_sequence (=))
///      Sums over the valid tokens of a sequence, in ascending order; absent members of grad are 0.
///  void spread_gradient<T>(device, tokens, count, dpooled, dx (+=))
///  void clear<T>(device, tensor[n,m] (= 0))
template <class Device>
struct pool_ops;

/// Rows of a table by the ids of the tokens, and a product that adds.
///
///  index_t lookup<T>(device, ids, mask, table[N,E], logits[T,E] (=))
///      Returns the first valid token whose id is not in [0, N), or -1.
///  void lookup_backward<T>(device, ids, mask, dlogits, dtable[N,E] (+=))
///  void add_product<T>(device, a[T,n], b[E,n], logits[T,E] (+=), scratch)
///      logits += a b^T. Scratch is that of `router_ops`.
template <class Device>
struct table_ops;

}  // namespace steelyard
