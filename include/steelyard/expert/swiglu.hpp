// SwiGlu: the gated feed-forward expert of most mixture-of-experts language models.
#pragma once

#include <string>
#include <type_traits>

#include "steelyard/expert/concept.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard {

/// Gated feed-forward expert with SiLU (Swish) gate.
///
///     g = G x,  u = U x                   G = gate[e], U = up[e]                            [h, d]
///     a = silu(g) * u                     silu(z) = z / (1 + exp(-z)), element by element
///     f(x) = D a                          D = down[e]                                       [d, h]
///
/// Gradient, from dy of the row's output, with s = 1 / (1 + exp(-g)):
///
///     da = D^T dy,   du = da * silu(g),   dg = da * u * s (1 + g (1 - s))
///     dD += dy a^T,  dU += du x^T,  dG += dg x^T,  dx = G^T dg + U^T du
///
/// Cost of n rows: 6 n d h floating-point operations forward, 12 n d h backward, 4 n d h more when recomputed.
/// Kept: 2 h elements a row. No biases.
///
/// Source: Shazeer, "GLU Variants Improve Transformer" (2002.05202). Experts of Mixtral, Qwen-MoE, DeepSeekMoE.
struct SwiGlu {
    /// h: the inner width, at least 1.
    index_t hidden = 0;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 3, Space> gate;  // [E, h, d]
        view<T, 3, Space> up;    // [E, h, d]
        view<T, 3, Space> down;  // [E, d, h]

        template <class Field>
        void fields(Field&& field, const SwiGlu& expert, const LayerShape& shape) {
            field("gate", gate, shape.experts, expert.hidden, shape.width);
            field("up", up, shape.experts, expert.hidden, shape.width);
            field("down", down, shape.experts, shape.width, expert.hidden);
        }
    };

    /// The two pre-activations.
    template <class T, class Space = HostSpace>
    struct Kept {
        view<T, 2, Space> gate;  // [N, h]
        view<T, 2, Space> up;    // [N, h]

        template <class Field>
        void fields(Field&& field, const SwiGlu& expert, const LayerShape&, index_t rows) {
            field("gate", gate, rows, expert.hidden);
            field("up", up, rows, expert.hidden);
        }
    };

    template <class T, class Space = HostSpace>
    struct Work {
        view<T, 2, Space> gate;   // [N, h]  gradient of g
        view<T, 2, Space> up;     // [N, h]  gradient of u
        view<T, 2, Space> inner;  // [N, h]  a times its combine weight

        template <class Field>
        void fields(Field&& field, const SwiGlu& expert, const LayerShape&, index_t rows) {
            field("gate", gate, rows, expert.hidden);
            field("up", up, rows, expert.hidden);
            field("inner", inner, rows, expert.hidden);
        }
    };

    [[nodiscard]] Status check(const LayerShape&) const {
        if (hidden < 1)
            return Status::refuse(Code::invalid_argument, "SwiGlu", "hidden", "at least 1", std::to_string(hidden));
        return {};
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return expert_ops<Device>::template scratch_bytes<T>(device, shape.width, hidden);
    }

    template <class T, class Device, class Space = typename Device::space>
    void forward(const Device& device, const Params<const T, Space>& params,
                 std::type_identity_t<view<const T, 2, Space>> x,      // [T, d]
                 const Plan<Space>& plan, const Kept<T, Space>& kept,  // (=)
                 std::type_identity_t<view<T, 2, Space>> rows,         // [N, d] (=), or absent
                 std::byte* scratch) const {
        expert_ops<Device>::template ffn_forward<T>(device, Activation::silu, weights<const T>(params), x, plan,
                                                    FfnKept<T, Space>{kept.gate, kept.up}, rows, scratch);
    }

    template <class T, class Device, class Space = typename Device::space>
    void backward(const Device& device, const Params<const T, Space>& params,
                  std::type_identity_t<view<const T, 2, Space>> x,  // [T, d]
                  const Plan<Space>& plan, const Kept<T, Space>& kept,
                  std::type_identity_t<view<const T, 2, Space>> weight,                       // [T, K], or absent: 1
                  std::type_identity_t<view<const T, 2, Space>> dy,                           // [T, d]
                  const Work<T, Space>& work, std::type_identity_t<view<T, 2, Space>> drows,  // [N, d] (=)
                  std::type_identity_t<view<T, 2, Space>> dweight,                            // [T, K] (+=), or absent
                  const Params<T, Space>& grads,  // (+=), absent members are frozen
                  std::byte* scratch) const {
        expert_ops<Device>::template ffn_backward<T>(device, Activation::silu, weights<const T>(params), x, plan,
                                                     FfnKept<const T, Space>{kept.gate, kept.up}, weight, dy,
                                                     FfnGradRows<T, Space>{work.gate, work.up, work.inner}, drows,
                                                     dweight, weights<T>(grads), scratch);
    }

    friend bool operator==(const SwiGlu&, const SwiGlu&) = default;

private:
    template <class T, class Space>
    static FfnWeights<T, Space> weights(const Params<T, Space>& params) {
        return {params.gate, params.up, params.down, {}, {}};
    }
};

static_assert(Expert<SwiGlu>);

}  // namespace steelyard
