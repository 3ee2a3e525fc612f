// The operations of a model on a GPU. Each is that of the same name on the CPU (the header that it names), enqueued:
// for T = float, compiled in ops.cu. Tensors are dense. Sums are taken in a fixed order.
#pragma once

#include <cstdint>
#include <span>

#include "gpu.hpp"
#include "pretrain/adamw_factors.hpp"
#include "steelyard/core/bf16.hpp"

namespace pretrain {

template <class T, int Rank>
using far = view<T, Rank, steelyard::CudaSpace>;

// ---- host.hpp -------------------------------------------------------------------------------------------

/// `given` is pinned, and stays as it is until the GPU has come so far.
far<const std::uint8_t, 1> brought(const Gpu& gpu, view<const std::uint8_t, 1> given, far<std::uint8_t, 1> room);
template <class T, int Rank>
void upload(const Gpu& gpu, view<const T, Rank> from, far<T, Rank> to);

template <class T>
void add(const Gpu& gpu, far<const T, 2> a, far<const T, 2> b, far<T, 2> sum);  // [T, d]
template <class T>
void clear(const Gpu& gpu, far<T, 2> all);
void clear(const Gpu& gpu, const GpuBytes& memory);

template <class T>
void sum_parts(const Gpu& gpu, std::span<const GpuBytes* const> parts, index_t begin, far<T, 1> sum);
/// `squares` is pinned.
template <class T>
void sum_squares(const Gpu& gpu, far<const T, 1> numbers, index_t block, double* squares);
template <class T>
void adamw(const Gpu& gpu, const AdamWFactors<T>& by, far<T, 1> params, const T* gradient, T* first_moment,
           T* second_moment);

void mark(const Gpu& gpu);
/// Tells what kernels found wrong so far.
Status await_mark(const Gpu& gpu);
inline Status finish(const Gpu& gpu) { return gpu.finish(); }

// ---- embedding.hpp, linear.hpp, rms_norm.hpp, rotary.hpp ------------------------------------------------

template <class T>
void embedding_forward(const Gpu& gpu, far<const std::uint8_t, 1> tokens, far<const T, 2> table,  // [T], [V, d]
                       far<T, 2> y);                                                              // [T, d]
template <class T>
void embedding_backward(const Gpu& gpu, far<const std::uint8_t, 1> tokens, far<const T, 2> dy,  // [T], [T, d]
                        far<T, 2> dtable);                                                      // [V, d]  +=

template <class T>
void linear_forward(const Gpu& gpu, far<const T, 2> x, far<const T, 2> weight,  // [T, in], [out, in]
                    far<T, 2> y);                                               // [T, out]
template <class T>
void linear_backward_input(const Gpu& gpu, far<const T, 2> dy, far<const T, 2> weight,  // [T, out], [out, in]
                           far<T, 2> dx);                                               // [T, in]
template <class T>
void linear_backward_weight(const Gpu& gpu, far<const T, 2> dy, far<const T, 2> x,  // [T, out], [T, in]
                            far<T, 2> dweight);                                     // [out, in]  +=

template <class T>
void rms_norm_forward(const Gpu& gpu, far<const T, 2> x, far<const T, 1> gain,  // [T, d], [d]
                      far<T, 2> y, far<T, 1> inverse);                          // [T, d], [T]
template <class T>
void rms_norm_backward(const Gpu& gpu, far<const T, 2> x, far<const T, 1> gain,  // [T, d], [d]
                       far<const T, 1> inverse, far<const T, 2> dy,              // [T], [T, d]
                       far<T, 2> dx, far<T, 1> dgain);                           // [T, d]  +=, [d]  +=

template <class T>
void rotary(const Gpu& gpu, far<T, 2> qkv, far<const T, 3> table, T direction);  // [T, 3d], [L, 2, half]

// ---- attention.hpp, cross_entropy.hpp -------------------------------------------------------------------

/// All: there is room for the scores' gradients of every query.
inline index_t queries_at_once(const Gpu&, index_t length) { return length; }
template <class T>
void attention_forward(const Gpu& gpu, far<const T, 2> qkv,    // [S·L, 3d]
                       far<T, 4> probabilities, far<T, 2> y);  // [S, H, L, L], [S·L, d]
template <class T>
void attention_backward(const Gpu& gpu, far<const T, 2> qkv,  // [S·L, 3d]
                        far<const T, 4> probabilities,        // [S, H, L, L]
                        far<const T, 2> dy,                   // [S·L, d]
                        far<T, 3> dscores, far<T, 2> dqkv);   // [S·H, L, L]  workspace, [S·L, 3d]

/// `losses` are pinned.
template <class T>
void cross_entropy_forward(const Gpu& gpu, far<const std::uint8_t, 1> targets,  // [T]
                           far<T, 2> logits, view<T, 1> losses);                // [T, V]  -> probabilities, [T]
template <class T>
void cross_entropy_backward(const Gpu& gpu, far<const std::uint8_t, 1> targets, T weight,  // [T]
                            far<T, 2> probabilities);                                      // [T, V]  -> dlogits

// ---- Between float and bf16 -----------------------------------------------------------------------------

/// Tensors that there are twice, one launch for all.
struct Twins {
    static constexpr int most = 8;
    struct Pair {
        float* wide = nullptr;
        steelyard::bf16* narrow = nullptr;
        index_t size = 0;
    };
    Pair of[most] = {};
    int count = 0;
};

/// narrow (=) wide, to the nearest.
void narrow(const Gpu& gpu, const Twins& twins);
/// wide (=) narrow.
void widen(const Gpu& gpu, const Twins& twins);
/// wide (+=) narrow, narrow (=) 0.
void drain(const Gpu& gpu, const Twins& twins);

}  // namespace pretrain
