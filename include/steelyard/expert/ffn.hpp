// FeedForward: the one implementation behind Mlp, SwiGlu and ClampedSwiGlu.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "steelyard/expert/concept.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard {

namespace detail::expert {

inline Status check_hidden(std::string_view stage, index_t hidden) {
    if (hidden >= 1) return {};
    return Status::refuse(Code::invalid_argument, stage, "hidden", "at least 1", std::to_string(hidden));
}

inline Status check_function(std::string_view stage, Activation activation) {
    if (activation >= Activation::relu && activation <= Activation::identity) return {};
    return Status::refuse(Code::invalid_argument, stage, "activation", "relu, relu2, gelu, silu, gelu_tanh or identity",
                          "the value " + std::to_string(static_cast<int>(activation)));
}

inline Status check_function(std::string_view stage, const ClampedSwish& clamp) {
    if (!(clamp.limit > 0))
        return Status::refuse(Code::invalid_argument, stage, "activation.limit", "a number above 0",
                              std::to_string(clamp.limit));
    if (!std::isfinite(clamp.alpha))
        return Status::refuse(Code::invalid_argument, stage, "activation.alpha", "a finite number",
                              std::to_string(clamp.alpha));
    return {};
}

}  // namespace detail::expert

/// A feed-forward expert: linear, a function of each element, linear. `Form` says which one, as `Mlp`, `SwiGlu` and
/// `ClampedSwiGlu` do:
///
///     name                            for refusals
///     gated                           whether there is a gate beside `up`
///     names_biases                    whether biases are listed, without elements, also where there are none
///     default_bias                    of the option `bias`
///     Function, default_function      of the option `activation`: Activation or ClampedSwish
///
/// Cost of n rows, with m = 2 matrices, or 3 where gated: 2 m n d h floating-point operations forward, 4 m n d h
/// backward, 2 (m - 1) n d h more when recomputed. Every weight of an expert that has rows is read once for each
/// block of 192 rows: about 2 n floating-point operations a weight, so that an expert of few rows is bound by memory.
/// Kept: m - 1 times h elements a row.
template <class Form>
struct FeedForward {
    static constexpr bool kept_is_optional = true;

    /// h: the inner width, at least 1.
    index_t hidden = 0;
    typename Form::Function activation = Form::default_function;
    /// With a bias beside every matrix.
    bool bias = Form::default_bias;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 3, Space> gate;            // [E, h, d]  where gated
        view<T, 3, Space> up;              // [E, h, d]
        view<T, 3, Space> down;            // [E, d, h]
        view<T, 2, Space> up_bias = {};    // [E, h], or [0, h]
        view<T, 2, Space> down_bias = {};  // [E, d], or [0, d]
        view<T, 2, Space> gate_bias = {};  // [E, h]     where gated, or [0, h]
        /// No parameter: a copy of the matrices that `pack` made, which forward reads instead of them, or absent.
        view<const std::byte, 1, Space> packed = {};
        /// Of gradients: whether backward adds to what is there or replaces it. A layer sets it: see
        /// BackwardArgs::write_grads.
        Write write = Write::add;

        template <class Field>
        void fields(Field&& field, const FeedForward& expert, const LayerShape& shape) {
            const index_t biases = expert.bias ? shape.experts : 0;
            if constexpr (Form::gated) field("gate", gate, shape.experts, expert.hidden, shape.width);
            field("up", up, shape.experts, expert.hidden, shape.width);
            field("down", down, shape.experts, shape.width, expert.hidden);
            if (!expert.bias && !Form::names_biases) return;
            field("up_bias", up_bias, biases, expert.hidden);
            field("down_bias", down_bias, biases, shape.width);
            if constexpr (Form::gated) field("gate_bias", gate_bias, biases, expert.hidden);
        }
    };

    /// The pre-activations.
    template <class T, class Space = HostSpace>
    struct Kept {
        view<T, 2, Space> gate;  // [N, h]  where gated
        view<T, 2, Space> up;    // [N, h]

        template <class Field>
        void fields(Field&& field, const FeedForward& expert, const LayerShape&, index_t rows) {
            if constexpr (Form::gated) field("gate", gate, rows, expert.hidden);
            field("up", up, rows, expert.hidden);
        }
    };

    template <class T, class Space = HostSpace>
    struct Work {
        view<T, 2, Space> gate;   // [N, h]  gradient of the gate's pre-activation, where gated
        view<T, 2, Space> up;     // [N, h]  gradient of u
        view<T, 2, Space> inner;  // [N, h]  a times its combine weight

        template <class Field>
        void fields(Field&& field, const FeedForward& expert, const LayerShape&, index_t rows) {
            if constexpr (Form::gated) field("gate", gate, rows, expert.hidden);
            field("up", up, rows, expert.hidden);
            field("inner", inner, rows, expert.hidden);
        }
    };

    [[nodiscard]] Status check(const LayerShape&) const {
        if (Status s = detail::expert::check_hidden(Form::name, hidden); !s) return s;
        return detail::expert::check_function(Form::name, activation);
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return expert_ops<Device>::template scratch_bytes<T>(device, shape.tokens, shape.width, hidden);
    }

    /// Bytes of a packed copy of the weights. Pure.
    template <class T, class Device>
    [[nodiscard]] index_t packed_bytes(const Device& device, const LayerShape& shape,
                                       PackedFormat format = PackedFormat::full,
                                       PackedFor purpose = PackedFor::inference) const {
        return expert_ops<Device>::template ffn_packed_bytes<T>(device, format, purpose, shape.experts, shape.width,
                                                                hidden, Form::gated);
    }

    /// Writes (=) the copy of the matrices that `Params::packed` takes: in the order in which they are read, which
    /// saves the packing in every call, and in fewer bits if asked. To be made again whenever the weights have changed.
    /// Without it forward and backward give the same bits as with PackedFormat::full, slower. Biases are not part of
    /// it; other formats are for inference, and backward goes through the matrices themselves where it has no panels of
    /// its own.
    template <class T, class Device, class Space = typename Device::space>
    Status pack(const Device& device, const LayerShape& shape, const Params<const T, Space>& params,
                std::span<std::byte> packed, PackedFormat format = PackedFormat::full,
                PackedFor purpose = PackedFor::inference) const {
        if (format != PackedFormat::full && (purpose == PackedFor::training || sizeof(T) != sizeof(float)))
            return Status::refuse(Code::invalid_argument, "expert.pack", "format",
                                  "PackedFormat::full for training, and for elements other than float", "another");
        if (Status s = check_block("expert.pack", "packed", packed, packed_bytes<T>(device, shape, format, purpose));
            !s)
            return s;
        Params<const T, Space> matrices = params;
        if (Status s = check_bundle("expert.pack", "params", Absent::refused, matrices, *this, shape); !s) return s;
        expert_ops<Device>::template ffn_pack<T>(device, format, purpose, weights<const T>(params), packed.data());
        return {};
    }

    /// Refuses a packed copy that belongs to other sizes or another device, and biases that are not there: they are no
    /// part of it. `name` is that of `params`.
    template <class T, class Device, class Space = typename Device::space>
    [[nodiscard]] Status check_packed(const Device& device, std::string_view stage, std::string_view name,
                                      const LayerShape& shape, const Params<const T, Space>& params) const {
        const std::string prefix = std::string(name) + ".";
        if (Status s = expert_ops<Device>::template ffn_check_packed<T>(
                device, stage, prefix + "packed", params.packed, shape.experts, shape.width, hidden, Form::gated);
            !s)
            return s;
        if (!bias) return {};
        if (Status s = check_view(stage, prefix + "up_bias", params.up_bias, shape.experts, hidden); !s) return s;
        if (Status s = check_view(stage, prefix + "down_bias", params.down_bias, shape.experts, shape.width); !s)
            return s;
        return Form::gated ? check_view(stage, prefix + "gate_bias", params.gate_bias, shape.experts, hidden)
                           : Status{};
    }
    /// Whether the packed copy of `params` does without the matrices. It was checked.
    template <class T, class Device, class Space = typename Device::space>
    [[nodiscard]] static bool packed_serves(const Device&, const Params<const T, Space>& params, PackedFor purpose) {
        return expert_ops<Device>::ffn_packed_serves(params.packed, purpose);
    }

    template <class T, class Device, class Space = typename Device::space>
    void forward(const Device& device, const Params<const T, Space>& params,
                 std::type_identity_t<view<const T, 2, Space>> x,      // [T, d]
                 const Plan<Space>& plan, const Kept<T, Space>& kept,  // (=)
                 std::type_identity_t<view<T, 2, Space>> rows,         // [N, d] (=), or absent
                 std::byte* scratch) const {
        expert_ops<Device>::template ffn_forward<T>(device, activation, weights<const T>(params), x, plan,
                                                    FfnKept<T, Space>{kept.gate, kept.up}, rows, scratch);
    }

    template <class T, class Device, class Space = typename Device::space>
    void backward(const Device& device, const Params<const T, Space>& params,
                  std::type_identity_t<view<const T, 2, Space>> x,  // [T, d]
                  const Plan<Space>& plan, const Kept<T, Space>& kept,
                  std::type_identity_t<view<const gate_t<T>, 2, Space>> weight,               // [T, K], or absent: 1
                  std::type_identity_t<view<const T, 2, Space>> dy,                           // [T, d]
                  const Work<T, Space>& work, std::type_identity_t<view<T, 2, Space>> drows,  // [N, d] (=)
                  std::type_identity_t<view<gate_t<T>, 2, Space>> dweight,                    // [T, K] (+=), or absent
                  const Params<T, Space>& grads,  // (+=), or by its `write`; absent members are frozen
                  std::byte* scratch) const {
        expert_ops<Device>::template ffn_backward<T>(
            device, activation, weights<const T>(params), x, plan, FfnKept<const T, Space>{kept.gate, kept.up}, weight,
            dy, FfnGradRows<T, Space>{work.gate, work.up, work.inner}, drows, dweight, weights<T>(grads), scratch);
    }

    friend bool operator==(const FeedForward&, const FeedForward&) = default;

private:
    /// A bias of no elements may come with a pointer; the kernels are told that there is none.
    template <class T, class Space>
    static FfnWeights<T, Space> weights(const Params<T, Space>& params) {
        FfnWeights<T, Space> w{params.gate, params.up, params.down, {}, {}};
        if (params.up_bias.size() != 0) w.up_bias = params.up_bias;
        if (params.down_bias.size() != 0) w.down_bias = params.down_bias;
        if (params.gate_bias.size() != 0) w.gate_bias = params.gate_bias;
        w.packed = params.packed;
        w.write = params.write;
        return w;
    }
};

}  // namespace steelyard
