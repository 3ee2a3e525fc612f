// Every: each token visits every expert with weight 1.
#pragma once

#include "steelyard/ops/router_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/options.hpp"

namespace steelyard {

/// All experts for all valid tokens, each with weight 1 and probability 1 / E. Nothing to learn, no parameters.
///
/// With one expert it is what sends tokens to a shared expert (see WithShared).
struct Every {
    static constexpr bool learns = false;

    template <class T, class Space = HostSpace>
    struct Params {
        template <class Field>
        void fields(Field&&, const Every&, const LayerShape&) {}
    };

    [[nodiscard]] int top_k(const LayerShape& shape) const { return static_cast<int>(shape.experts); }

    [[nodiscard]] Status check(const LayerShape& shape) const { return detail::check_experts(shape); }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device&, const LayerShape&) const {
        return 0;
    }

    template <class T, class Device, class Space = typename Device::space>
    Status route(const Device& device, const Params<const T, Space>&, const RouterInput<T, Space>& input,
                 const Routing<gate_t<T>, Space>& routing, std::byte*) const {
        router_ops<Device>::template take_all<gate_t<T>>(device, input.tokens.mask, routing);
        return {};
    }

    template <class T, class Device, class Space = typename Device::space>
    void backward(const Device&, const Params<const T, Space>&, const RouterInput<T, Space>&,
                  const Routing<gate_t<T>, Space>&, const RoutingGrad<gate_t<T>, Space>&,
                  const RouterInputGrad<T, Space>&, const Params<T, Space>&, std::byte*) const {}

    friend bool operator==(const Every&, const Every&) = default;
};

static_assert(Router<Every>, "steelyard: Every is a Router");

}  // namespace steelyard
