// Mlp: linear, activation, linear.
#pragma once

#include <string>
#include <type_traits>

#include "steelyard/expert/concept.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard {

/// Two-layer feed-forward expert, with or without biases.
///
///     u = U x + b,   a = act(u),   f(x) = D a + c          U = up[e] [h, d], D = down[e] [d, h]
///
///     relu   max(u, 0)                        derivative 0 at 0
///     relu2  max(u, 0)^2                      squared ReLU (So et al., "Primer", 2109.08668)
///     gelu   u Phi(u), Phi(u) = (1 + erf(u / sqrt 2)) / 2, the exact form (Hendrycks and Gimpel, 1606.08415)
///     silu   u / (1 + exp(-u))                (Elfwing et al., 1702.03118; Ramachandran et al., 1710.05941)
///
/// Gradient, from dy of the row's output:
///
///     da = D^T dy,   du = da * act'(u),   dx = U^T du
///     dD += dy a^T,  dc += dy,  dU += du x^T,  db += du
///
/// Cost of n rows: 4 n d h floating-point operations forward, 8 n d h backward, 2 n d h more when recomputed.
/// Kept: h elements a row. Sources of the MoE form: GShard (2006.16668), Switch Transformer (2101.03961).
struct Mlp {
    /// h: the inner width, at least 1.
    index_t hidden = 0;
    Activation activation = Activation::relu;
    /// With biases b and c. Without, "up_bias" and "down_bias" have no elements.
    bool bias = false;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 3, Space> up;         // [E, h, d]
        view<T, 3, Space> down;       // [E, d, h]
        view<T, 2, Space> up_bias;    // [E, h], or [0, h]
        view<T, 2, Space> down_bias;  // [E, d], or [0, d]

        template <class Field>
        void fields(Field&& field, const Mlp& expert, const LayerShape& shape) {
            const index_t biases = expert.bias ? shape.experts : 0;
            field("up", up, shape.experts, expert.hidden, shape.width);
            field("down", down, shape.experts, shape.width, expert.hidden);
            field("up_bias", up_bias, biases, expert.hidden);
            field("down_bias", down_bias, biases, shape.width);
        }
    };

    /// The pre-activation.
    template <class T, class Space = HostSpace>
    struct Kept {
        view<T, 2, Space> up;  // [N, h]

        template <class Field>
        void fields(Field&& field, const Mlp& expert, const LayerShape&, index_t rows) {
            field("up", up, rows, expert.hidden);
        }
    };

    template <class T, class Space = HostSpace>
    struct Work {
        view<T, 2, Space> up;     // [N, h]  gradient of u
        view<T, 2, Space> inner;  // [N, h]  a times its combine weight

        template <class Field>
        void fields(Field&& field, const Mlp& expert, const LayerShape&, index_t rows) {
            field("up", up, rows, expert.hidden);
            field("inner", inner, rows, expert.hidden);
        }
    };

    [[nodiscard]] Status check(const LayerShape&) const {
        if (hidden < 1)
            return Status::refuse(Code::invalid_argument, "Mlp", "hidden", "at least 1", std::to_string(hidden));
        if (activation < Activation::relu || activation > Activation::silu)
            return Status::refuse(Code::invalid_argument, "Mlp", "activation", "relu, relu2, gelu or silu",
                                  "the value " + std::to_string(static_cast<int>(activation)));
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
        expert_ops<Device>::template ffn_forward<T>(device, activation, weights<const T>(params), x, plan,
                                                    FfnKept<T, Space>{{}, kept.up}, rows, scratch);
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
        expert_ops<Device>::template ffn_backward<T>(
            device, activation, weights<const T>(params), x, plan, FfnKept<const T, Space>{{}, kept.up}, weight, dy,
            FfnGradRows<T, Space>{{}, work.up, work.inner}, drows, dweight, weights<T>(grads), scratch);
    }

    friend bool operator==(const Mlp&, const Mlp&) = default;

private:
    /// A bias of no elements may come with a pointer; the kernels are told that there is none.
    template <class T, class Space>
    static FfnWeights<T, Space> weights(const Params<T, Space>& params) {
        FfnWeights<T, Space> w{{}, params.up, params.down, {}, {}};
        if (params.up_bias.size() != 0) w.up_bias = params.up_bias;
        if (params.down_bias.size() != 0) w.down_bias = params.down_bias;
        return w;
    }
};

static_assert(Expert<Mlp>);

}  // namespace steelyard
