// Memory of the CPU device, which is the host's.
#pragma once

#include <algorithm>
#include <type_traits>

#include "steelyard/cpu/device.hpp"
#include "steelyard/ops/memory_ops.hpp"

namespace steelyard {

template <>
struct memory_ops<Cpu> {
    static constexpr bool asynchronous = false;

    template <class T, int Rank>
    static void fill(const Cpu& device, view<T, Rank> tensor, std::type_identity_t<T> value) {
        if (tensor.dense()) {
            std::fill_n(tensor.data, tensor.size(), value);
        } else if constexpr (Rank > 1) {
            for (index_t i = 0; i < tensor.extents[0]; ++i) fill(device, tensor[i], value);
        }
    }
    template <class T, int Rank>
    static void copy(const Cpu& device, view<const T, Rank> from, view<T, Rank> to) {
        if (from.dense() && to.dense()) {
            std::copy_n(from.data, from.size(), to.data);
        } else if constexpr (Rank > 1) {
            for (index_t i = 0; i < from.extents[0]; ++i) copy(device, from[i], to[i]);
        }
    }
    template <class T, int Rank>
    static void upload(const Cpu& device, view<const T, Rank> from, view<T, Rank> to) {
        copy(device, from, to);
    }
};

}  // namespace steelyard
