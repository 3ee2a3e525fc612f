// Lora: a linear map of low rank, to stand beside a frozen layer.
#pragma once

#include "steelyard/expert/ffn.hpp"

namespace steelyard {

namespace detail::expert {

inline Status check_rank(std::string_view stage, index_t rank, double alpha) {
    if (rank < 1) return Status::refuse(Code::invalid_argument, stage, "rank", "at least 1", std::to_string(rank));
    if (!std::isfinite(alpha))
        return Status::refuse(Code::invalid_argument, stage, "alpha", "a finite number", std::to_string(alpha));
    return {};
}

}  // namespace detail::expert

/// An expert of low rank.
///
///     f(x) = (alpha / r) B A x            A = a[e] [r, d], B = b[e] [d, r]
///
/// Gradient, from dy of the row's output, with c = alpha / r:
///
///     dB += c dy (A x)^T,   dA += c B^T dy x^T,   dx = c A^T B^T dy
///
/// Beside a frozen base it is a mixture of LoRA: `WithShared<Lora, SwiGlu>` whose gradients of the shared expert are
/// absent. With B = 0, as LoRA begins, every row is exactly 0 and the layer gives the base's output. The sum over
/// experts of p_e f_e is one LoRA of rank E r; constant weights merge into the base as (alpha / r) sum p_e B_e A_e.
///
/// Cost of n rows: 4 n d r floating-point operations forward, 8 n d r backward. Kept: r elements a row.
///
/// Source: Hu et al., "LoRA" (2106.09685); as experts: MoLoRA (Zadouri et al., 2309.05444), LoRAMoE (2312.09979).
struct Lora {
    /// r, at least 1.
    index_t rank = 0;
    double alpha = 1.0;

    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 3, Space> a;  // [E, r, d]
        view<T, 3, Space> b;  // [E, d, r]

        template <class Field>
        void fields(Field&& field, const Lora& expert, const LayerShape& shape) {
            field("a", a, shape.experts, expert.rank, shape.width);
            field("b", b, shape.experts, shape.width, expert.rank);
        }
    };

    template <class T, class Space = HostSpace>
    struct Kept {
        view<T, 2, Space> low;  // [N, r]  A x

        template <class Field>
        void fields(Field&& field, const Lora& expert, const LayerShape&, index_t rows) {
            field("low", low, rows, expert.rank);
        }
    };

    template <class T, class Space = HostSpace>
    struct Work {
        view<T, 2, Space> low;    // [N, r]  gradient of A x
        view<T, 2, Space> inner;  // [N, r]  (alpha / r) A x times its combine weight

        template <class Field>
        void fields(Field&& field, const Lora& expert, const LayerShape&, index_t rows) {
            field("low", low, rows, expert.rank);
            field("inner", inner, rows, expert.rank);
        }
    };

    [[nodiscard]] Status check(const LayerShape&) const { return detail::expert::check_rank("Lora", rank, alpha); }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return expert_ops<Device>::template scratch_bytes<T>(device, shape.tokens, shape.width, rank);
    }

    template <class T, class Device, class Space = typename Device::space>
    void forward(const Device& device, const Params<const T, Space>& params,
                 std::type_identity_t<view<const T, 2, Space>> x,      // [T, d]
                 const Plan<Space>& plan, const Kept<T, Space>& kept,  // (=)
                 std::type_identity_t<view<T, 2, Space>> rows,         // [N, d] (=), or absent
                 std::byte* scratch) const {
        expert_ops<Device>::template ffn_forward<T>(device, function(), weights<const T>(params), x, plan,
                                                    FfnKept<T, Space>{{}, kept.low}, rows, scratch);
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
            device, function(), weights<const T>(params), x, plan, FfnKept<const T, Space>{{}, kept.low}, weight, dy,
            FfnGradRows<T, Space>{{}, work.low, work.inner}, drows, dweight, weights<T>(grads), scratch);
    }

    friend bool operator==(const Lora&, const Lora&) = default;

private:
    /// A network of two matrices with nothing between them but the factor.
    [[nodiscard]] FfnFunction function() const { return FfnFunction::linear(alpha / static_cast<double>(rank)); }

    template <class T, class Space>
    static FfnWeights<T, Space> weights(const Params<T, Space>& params) {
        return {{}, params.a, params.b, {}, {}};
    }
};

static_assert(Expert<Lora>);

}  // namespace steelyard
