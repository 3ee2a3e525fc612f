// Gradients of parameters that replace what was there.
#pragma once

#include <string>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/view.hpp"
#include "steelyard/ops/memory_ops.hpp"

namespace steelyard::detail {

/// Where a call's gradients are added: `grads`, a layer's. With Write::assign: after they were cleared, but for those
/// of experts that replace what is there themselves, which are told to.
template <bool has_shared, class Device, class Dims, class Grads>
[[nodiscard]] Grads begin_gradients(const Device& device, const Dims& dims, Grads grads, Write write) {
    if (write == Write::add) return grads;
    const auto clear = [&](auto& bundle, const auto&... of) {
        for_each_tensor(
            bundle,
            [&](const std::string&, const auto& tensor) {
                using T = std::remove_reference_t<decltype(*tensor.data)>;
                if (tensor.size() != 0) memory_ops<Device>::fill(device, tensor, T(0));
            },
            of...);
    };
    const auto begin = [&](const auto& mixture, auto& experts, auto& router) {
        const auto& own = mixture.config();
        if constexpr (requires { mixture.replace_gradients(experts); })
            mixture.replace_gradients(experts);
        else
            clear(experts, own.expert, own.shape);
        clear(router, own.router, own.shape);
    };
    begin(dims.routed, grads.experts, grads.router);
    if constexpr (has_shared) begin(dims.shared, grads.shared, grads.shared_router);
    return grads;
}

}  // namespace steelyard::detail
