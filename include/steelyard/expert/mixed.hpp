// Mixed: experts of several kinds in one layer.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "steelyard/expert/concept.hpp"

namespace steelyard {

/// So many experts of one kind.
template <Expert X>
struct Several {
    index_t count = 0;
    X expert = {};

    friend bool operator==(const Several&, const Several&) = default;
};

template <Expert X>
Several(index_t, X) -> Several<X>;
template <Expert X>
Several(int, X) -> Several<X>;

/// Experts of several kinds: the first `count` experts of the layer are of the first kind, the next of the second,
/// and so on; the counts add up to E.
///
///     Mixed{Several{12, SwiGlu{1408}}, Several{1, ZeroExpert{}}, Several{1, CopyExpert{}}, Several{2,
///     ConstantExpert{}}}
///
/// is the layer of MoE++ (2410.07348). A kind sees its own part of the plan, and its rows alone; its tensors stand
/// under "part0", "part1", ... with its count as E. Kept and Work of every kind have room for all rows: any kind may
/// get them.
template <Expert... X>
struct Mixed {
    std::tuple<Several<X>...> parts;

    constexpr Mixed() = default;
    constexpr Mixed(Several<X>... several) requires(sizeof...(X) > 0) : parts(std::move(several)...) {}

private:
    template <std::size_t I>
    using Kind = std::tuple_element_t<I, std::tuple<X...>>;

    /// Calls body(constant I, count) for each kind.
    template <class Body>
    constexpr void each(Body&& body) const {
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            (body(std::integral_constant<std::size_t, I>{}, std::get<I>(parts)), ...);
        }
        (std::index_sequence_for<X...>{});
    }
    static LayerShape with_experts(LayerShape shape, index_t experts) {
        shape.experts = experts;
        return shape;
    }
    template <class Bundle, class Field, class... Rows>
    static void groups(Bundle& bundle, Field&& field, const Mixed& expert, const LayerShape& shape, Rows... rows) {
        expert.each([&](auto i, const auto& part) {
            field.group("part" + std::to_string(i()), std::get<i()>(bundle.parts), part.expert,
                        with_experts(shape, part.count), rows...);
        });
    }
    /// Experts [first, first + count) of a plan.
    template <class Space>
    static Plan<Space> slice(Plan<Space> plan, index_t first, index_t count) {
        plan.offsets = plan.offsets.slice(first, first + count + 1);
        return plan;
    }

public:
    template <class T, class Space = HostSpace>
    struct Params {
        std::tuple<typename X::template Params<T, Space>...> parts;

        template <class Field>
        void fields(Field&& field, const Mixed& expert, const LayerShape& shape) {
            groups(*this, field, expert, shape);
        }
    };

    template <class T, class Space = HostSpace>
    struct Kept {
        std::tuple<typename X::template Kept<T, Space>...> parts;

        template <class Field>
        void fields(Field&& field, const Mixed& expert, const LayerShape& shape, index_t rows) {
            groups(*this, field, expert, shape, rows);
        }
    };

    template <class T, class Space = HostSpace>
    struct Work {
        std::tuple<typename X::template Work<T, Space>...> parts;

        template <class Field>
        void fields(Field&& field, const Mixed& expert, const LayerShape& shape, index_t rows) {
            groups(*this, field, expert, shape, rows);
        }
    };

    [[nodiscard]] Status check(const LayerShape& shape) const {
        Status status;
        index_t sum = 0;
        each([&](auto i, const auto& part) {
            if (!status) return;
            sum += part.count;
            if (part.count < 1)
                status = Status::refuse(Code::invalid_argument, "Mixed", "count of part" + std::to_string(i()),
                                        "at least 1", std::to_string(part.count));
            else
                status = part.expert.check(with_experts(shape, part.count));
        });
        if (status && sum != shape.experts)
            return Status::refuse(Code::invalid_argument, "Mixed", "counts",
                                  "a sum of " + std::to_string(shape.experts) + ", the number of experts",
                                  std::to_string(sum));
        return status;
    }

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        index_t most = 0;
        each([&](auto, const auto& part) {
            most = std::max(most, part.expert.template scratch_bytes<T>(device, with_experts(shape, part.count)));
        });
        return most;
    }

    template <class T, class Device, class Space = typename Device::space>
    void forward(const Device& device, const Params<const T, Space>& params,
                 std::type_identity_t<view<const T, 2, Space>> x,      // [T, d]
                 const Plan<Space>& plan, const Kept<T, Space>& kept,  // (=)
                 std::type_identity_t<view<T, 2, Space>> rows,         // [N, d] (=), or absent
                 std::byte* scratch) const {
        index_t first = 0;
        each([&](auto i, const auto& part) {
            part.expert.template forward<T>(device, matrices(std::get<i()>(params.parts)), x,
                                            slice(plan, first, part.count), std::get<i()>(kept.parts), rows, scratch);
            first += part.count;
        });
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
        index_t first = 0;
        each([&](auto i, const auto& part) {
            part.expert.template backward<T>(device, matrices(std::get<i()>(params.parts)), x,
                                             slice(plan, first, part.count), std::get<i()>(kept.parts), weight, dy,
                                             std::get<i()>(work.parts), drows, dweight, std::get<i()>(grads.parts),
                                             scratch);
            first += part.count;
        });
    }

    friend bool operator==(const Mixed&, const Mixed&) = default;

private:
    /// A part without its packed copy: nobody has checked that it is one of the part's own sizes.
    template <class Part>
    static Part matrices(Part params) {
        if constexpr (requires { params.packed; }) params.packed = {};
        return params;
    }
};

template <Expert... X>
Mixed(Several<X>...) -> Mixed<X...>;

}  // namespace steelyard
