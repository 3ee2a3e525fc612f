// The stages between router and experts, each to be called alone: make_plan, dispatch, combine.
#pragma once

#include <limits>
#include <string>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/ops/plan_ops.hpp"

namespace steelyard {

namespace detail {

/// Refuses a plan whose tensors do not belong together.
template <class Space>
Status check_plan(std::string_view stage, const Plan<Space>& plan) {
    if (plan.offsets.extents[0] < 2)
        return Status::refuse(Code::invalid_argument, stage, "plan.offsets", "one expert at least, and so two offsets",
                              std::to_string(plan.offsets.extents[0]));
    return check_bundle(stage, "plan", Absent::refused, plan, plan.row.extents[0], plan.experts(), plan.row.extents[1]);
}

/// Refuses rows that a plan's choices do not fit into. How many there are only host code can see.
template <class T, class Space>
Status check_rows(std::string_view stage, const Plan<Space>& plan, const view<T, 2, Space>& rows, index_t width) {
    if constexpr (std::is_same_v<Space, HostSpace>)
        if (const index_t filled = plan.offsets(plan.experts()); rows.extents[0] < filled)
            return Status::refuse(Code::invalid_argument, stage, "rows", "at least " + std::to_string(filled) + " rows",
                                  std::to_string(rows.extents[0]));
    return check_view(stage, "rows", rows, rows.extents[0], width);
}

}  // namespace detail

/// Bytes of scratch of `make_plan`. Pure.
template <class Device>
[[nodiscard]] index_t plan_scratch_bytes(const Device& device, const LayerShape& shape, int top_k) {
    return plan_ops<Device>::scratch_bytes(device, shape, top_k);
}

/// Groups the choices by expert: writes the plan (=). See `Plan` for what it says.
///
/// Laws: offsets begin with 0, rise, and end with the number of choices that are not -1; the rows of an expert are
/// in ascending order of tokens; `row[choice[r]] == r`. `scratch` has `plan_scratch_bytes` and is aligned to
/// `layout_alignment`. Refuses choices outside -1 .. E-1 (host memory only) and more than 2^31 - 1 choices.
template <class Device>
Status make_plan(const Device& device, view<const expert_t, 2, typename Device::space> choices,  // [T, K]
                 const Plan<typename Device::space>& plan, std::byte* scratch) {
    if (Status s = detail::check_plan("plan", plan); !s) return s;
    if (Status s = check_view("plan", "choices", choices, plan.row.extents[0], plan.row.extents[1]); !s) return s;
    if (choices.size() > std::numeric_limits<std::int32_t>::max())
        return Status::refuse(Code::invalid_argument, "plan", "choices", "fewer than 2^31 choices",
                              std::to_string(choices.size()));
    if constexpr (std::is_same_v<typename Device::space, HostSpace>)
        for (index_t t = 0; t < choices.extents[0]; ++t)
            for (index_t k = 0; k < choices.extents[1]; ++k)
                if (choices(t, k) < -1 || choices(t, k) >= plan.experts())
                    return Status::refuse(Code::invalid_argument, "plan",
                                          "choice " + std::to_string(k) + " of token " + std::to_string(t),
                                          "-1 or an expert below " + std::to_string(plan.experts()),
                                          std::to_string(choices(t, k)));
    plan_ops<Device>::make_plan(device, choices, plan, scratch);
    return {};
}

/// rows[r] = x[choice[r] / K] (=) for the first offsets[E] rows; rows beyond stay as they are.
template <class T, class Device>
Status dispatch(const Device& device, const Plan<typename Device::space>& plan,
                view<const T, 2, typename Device::space> x,  // [T, d]
                view<T, 2, typename Device::space> rows) {   // [N, d]
    if (Status s = detail::check_plan("dispatch", plan); !s) return s;
    if (Status s = check_view("dispatch", "x", x, plan.row.extents[0], x.extents[1]); !s) return s;
    if (Status s = detail::check_rows("dispatch", plan, rows, x.extents[1]); !s) return s;
    plan_ops<Device>::template dispatch<T>(device, plan, x, rows);
    return {};
}

/// y[t] = sum_k weight[t,k] rows[row[t,k]] (=), added in the order of k; choices without a row add 0.
///
/// Absent weights are 1: then combine is the transpose of dispatch, <dispatch(x), r> = <x, combine(r)>, and
/// combine(dispatch(x))[t] = x[t] times the number of token t's rows.
template <class T, class Device>
Status combine(const Device& device, const Plan<typename Device::space>& plan,
               view<const T, 2, typename Device::space> rows,    // [N, d]
               view<const T, 2, typename Device::space> weight,  // [T, K] or absent
               view<T, 2, typename Device::space> y) {           // [T, d]
    if (Status s = detail::check_plan("combine", plan); !s) return s;
    if (Status s = check_view("combine", "y", y, plan.row.extents[0], y.extents[1]); !s) return s;
    if (Status s = detail::check_rows("combine", plan, rows, y.extents[1]); !s) return s;
    if (weight.present())
        if (Status s = check_view("combine", "weight", weight, plan.row.extents[0], plan.row.extents[1]); !s) return s;
    plan_ops<Device>::template combine<T>(device, plan, rows, weight, y);
    return {};
}

}  // namespace steelyard
