// A routing in memory of its own, with padded rows that nothing may write to.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/cpu/router.hpp"

namespace reference {

using steelyard::expert_t;
using steelyard::index_t;
using steelyard::SelectionRule;
using steelyard::view;

template <class T>
struct Matrix {
    index_t rows, columns, stride;
    std::vector<T> data;

    Matrix(index_t r, index_t c, T poison, index_t padding = 0)
        : rows(r), columns(c), stride(c + padding), data(static_cast<std::size_t>(r * (c + padding) + 1), poison) {}
    view<T, 2> mutable_view() {
        view<T, 2> v(data.data(), rows, columns);
        v.strides[0] = stride;
        return v;
    }
    view<const T, 2> get() const {
        view<const T, 2> v(data.data(), rows, columns);
        v.strides[0] = stride;
        return v;
    }
    T& operator()(index_t r, index_t c) { return data[static_cast<std::size_t>(r * stride + c)]; }
    const T& operator()(index_t r, index_t c) const { return data[static_cast<std::size_t>(r * stride + c)]; }
    bool padding_is(T poison) const {
        for (index_t r = 0; r < rows; ++r)
            for (index_t c = columns; c < stride; ++c)
                if (std::memcmp(&(*this)(r, c), &poison, sizeof(T)) != 0) return false;
        return true;
    }
};

template <class T>
struct RoutingCase {
    Matrix<T> logits, probs, weight;
    Matrix<expert_t> expert;

    RoutingCase(index_t tokens, index_t experts, index_t top_k, index_t padding = 0)
        : logits(tokens, experts, T(-99), padding),
          probs(tokens, experts, T(-99), padding),
          weight(tokens, top_k, T(-99), padding),
          expert(tokens, top_k, expert_t{-99}, padding) {}

    steelyard::Routing<T> routing() {
        return {logits.mutable_view(), probs.mutable_view(), expert.mutable_view(), weight.mutable_view()};
    }
    /// Runs the selection on the logits that are there.
    index_t select(const SelectionRule& rule, const std::vector<float>& bias = {},
                   const std::vector<std::uint8_t>& mask = {}, steelyard::Cpu device = {}) {
        using ops = steelyard::router_ops<steelyard::Cpu>;
        const steelyard::Bytes scratch(
            ops::scratch_bytes<T>(device, {.tokens = logits.rows, .width = 4, .experts = logits.columns}));
        return ops::select<T>(device, rule, view<const float, 1>(bias.empty() ? nullptr : bias.data(), logits.columns),
                              view<const std::uint8_t, 1>(mask.empty() ? nullptr : mask.data(), logits.rows), routing(),
                              scratch.data());
    }
    bool same_bits(const RoutingCase& o) const {
        const auto same = [](const auto& a, const auto& b) {
            return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
        };
        return same(probs.data, o.probs.data) && same(weight.data, o.weight.data) && same(expert.data, o.expert.data);
    }
};

}  // namespace reference
