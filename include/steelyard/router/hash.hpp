// Hash: the experts of a token follow from its id.
#pragma once

#include <algorithm>
#include <string>

#include "steelyard/ops/assign_ops.hpp"
#include "steelyard/router/concept.hpp"
#include "steelyard/router/fixed_weight.hpp"

namespace steelyard {

/// Hash layer: the experts of a token follow from its id (`TokenInfo::ids`), the same in training and evaluation.
///
/// Without a table, K distinct experts drawn by a hash keyed by (seed, layer, id): another one in each layer. With a
/// table, those of row `id`; `balanced_table` makes one from the ids' frequencies. Nothing is learned. Weights are 1 /
/// K or 1; probs are 1 / K for the chosen experts, so balance losses can be measured; the selection bias is not read.
///
/// Ids are 0 or above, below V with a table. A masked token needs none.
///
/// Source: Roller et al., "Hash Layers for Large Sparse Models" (2106.04426).
struct Hash {
    /// K: experts of a token. With a table, its columns.
    int k = 1;
    FixedWeight weight = FixedWeight::mean;
    /// Of the hash; a table does not read it.
    std::uint64_t seed = 0;
    /// Experts of each id, best first, in host memory that outlives the router. Absent: the hash.  [V, K]
    view<const expert_t, 2> table = {};

    static constexpr bool uses_ids = true, learns = false;

    /// Tables are equal where they are one piece of memory.
    friend bool operator==(const Hash& a, const Hash& b) {
        return a.k == b.k && a.weight == b.weight && a.seed == b.seed && a.table.data == b.table.data &&
               std::equal(a.table.extents, a.table.extents + 2, b.table.extents) &&
               std::equal(a.table.strides, a.table.strides + 2, b.table.strides);
    }

    template <class T, class Space = HostSpace>
    struct Params {
        template <class Field>
        void fields(Field&&, const Hash&, const LayerShape&) {}
    };

    [[nodiscard]] int top_k(const LayerShape&) const { return k; }

    [[nodiscard]] Status check(const LayerShape& shape) const {
        if (Status s = detail::fixed::check(k, weight, shape); !s || !table.present()) return s;
        if (table.extents[1] != k)
            return detail::refuse_option("table", std::to_string(k) + " columns (k)", std::to_string(table.extents[1]));
        for (index_t id = 0; id < table.extents[0]; ++id)
            for (index_t i = 0; i < k; ++i) {
                const expert_t e = table(id, i);
                if (e < 0 || e >= shape.experts)
                    return detail::refuse_option("table, id " + std::to_string(id),
                                                 "experts from 0 to " + std::to_string(shape.experts - 1),
                                                 std::to_string(e));
                for (index_t j = 0; j < i; ++j)
                    if (table(id, j) == e)
                        return detail::refuse_option("table, id " + std::to_string(id), "distinct experts",
                                                     std::to_string(e) + " twice");
            }
        return {};
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device&, const LayerShape&) const {
        return 0;
    }

    /// Writes the routing (=). See contract 5 to 8 of Router.
    template <class T, class Device, class Space = typename Device::space>
    Status route(const Device& device, const Params<const T, Space>&, const RouterInput<T, Space>& input,
                 const Routing<T, Space>& routing, std::byte*) const {
        using choose = assign_ops<Device>;
        const TokenInfo<Space>& info = input.tokens;
        const index_t tokens = input.x.extents[0], experts = routing.probs.extents[1];
        if (Status s = detail::fixed::check_ids(info, tokens); !s) return s;
        const index_t known = table.present() ? table.extents[0] : index_t{1} << 31;
        const index_t bad = table.present()
                                ? choose::table_choices(device, table, info.ids, info.mask, routing.expert)
                                : choose::keyed_choices(device, Philox(seed, Stream::choice, 0, input.layer), info.ids,
                                                        0, info.mask, experts, routing.expert);
        if (bad >= 0) return detail::fixed::refuse_id(info, bad, known);
        choose::template fixed_weights<T>(device, fixed_weight(weight, k), routing);
        return {};
    }

    template <class T, class Device, class Space = typename Device::space>
    void backward(const Device&, const Params<const T, Space>&, const RouterInput<T, Space>&, const Routing<T, Space>&,
                  const RoutingGrad<T, Space>&, const RouterInputGrad<T, Space>&, const Params<T, Space>&,
                  std::byte*) const {}
};

static_assert(Router<Hash>, "steelyard: Hash is a Router");

}  // namespace steelyard
