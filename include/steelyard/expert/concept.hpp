// The Expert axis: what a layer asks of the function that its experts compute.
#pragma once

#include <concepts>
#include <cstddef>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/core/status.hpp"

namespace steelyard {

namespace detail::expert {

/// A device in name only, so that an expert can be checked against the concept without one.
struct AnyDevice {
    using space = HostSpace;
};

template <class X, class T>
concept ComputesWith = requires(const X& expert, const AnyDevice& device, const LayerShape& shape,
                                const typename X::template Params<const T, HostSpace>& params,
                                const typename X::template Params<T, HostSpace>& grads,
                                const typename X::template Kept<T, HostSpace>& kept,
                                const typename X::template Work<T, HostSpace>& work, const Plan<>& plan,
                                view<const T, 2> in, view<T, 2> out, std::byte* scratch) {
    { expert.template scratch_bytes<T>(device, shape) } -> std::same_as<index_t>;
    expert.template forward<T>(device, params, in, plan, kept, out, scratch);
    expert.template backward<T>(device, params, in, plan, kept, in, in, work, out, out, grads, scratch);
};

template <class X, class T>
concept HasBundles = requires(const X& expert, const LayerShape& shape, index_t rows) {
    bytes_of<typename X::template Params<T, HostSpace>>(expert, shape);
    bytes_of<typename X::template Kept<T, HostSpace>>(expert, shape, rows);
    bytes_of<typename X::template Work<T, HostSpace>>(expert, shape, rows);
};

}  // namespace detail::expert

/// An expert: an immutable value, the function that each of E experts computes with its own weights on its own
/// rows. Contract, for T in {float, double} and a device whose memory space is `space`; N is the capacity of rows
/// (T K), of which a plan fills the first n = plan.offsets[E]; row r is choice (t, k) = plan.choice[r]:
///
/// 1. It is a value: copyable, compared with `==`, without state.
/// 2. `Status check(const LayerShape&) const` refuses, in one sentence, every option that cannot work with these
///    sizes. Everything below is called only with shapes that passed.
/// 3. Three bundles (core/layout.hpp), templates on <class T, class Space>. `Params`: the weights of all E experts,
///    `fields(field, const X&, const LayerShape&)`; with `const T` they are read, with `T` they are gradients. `Kept`:
///    what backward needs beside x, and `Work`: backward's own rows, both `fields(field, const X&, const LayerShape&,
///    index_t rows)`. The first extent of every weight is E, or what the expert documents: 0 where an option leaves
///    the tensor out, 1 where all experts share it, a part of E where only some experts have it.
/// 4. `scratch_bytes<T>(device, shape)` is pure, `shape.tokens` being the most grouped rows; `scratch` below has that
///    many bytes, aligned to `layout_alignment`, and keeps nothing between calls.
/// 5. `forward<T>(device, params, x[T,d], plan, kept (=), rows[N,d] (=) or absent, scratch)` writes
///    rows[r] = f_e(x[t]) without the combine weight, e being the expert of row r. With `rows` absent it only fills
///    `kept`, with the same bits: this is how activations are recomputed. An expert that says
///    `static constexpr bool kept_is_optional = true` may be given absent `kept` views, where no backward follows.
/// 6. `backward<T>(device, params, x, plan, kept, weight[T,K] or absent, dy[T,d], work, drows[N,d] (=),
///    dweight[T,K] (+=) or absent, grads (+=), scratch)` gets what `forward` kept with the same arguments. With
///    w = weight[t,k], or 1 where weights are absent:
///      - drows[r] = w dy[t] df_e/dx (x[t]), the gradient of the gathered row, for the caller to bring together;
///      - dweight[t,k] += <dy[t], f_e(x[t])>;
///      - grads += w dy[t] df_e/dparams, over the rows of each expert. A member that is absent is frozen. Where
///        `Params` has a member `Write write`, grads.write may be Write::assign: then grads = that sum, whatever was
///        there. A layer clears the gradients of other experts itself.
/// 7. Rows at and beyond n, and rows below plan.offsets[0] (0 for a layer's plan, more for a part of one), are neither
///    read nor written. An expert without rows reads none of its weights and gets exactly no gradient.
/// 8. f_e sees one row at a time: what a row gives does not depend on the other rows, nor on their order.
/// 9. Pure functions of their arguments, bit for bit, for any number of threads. Nothing is allocated, nothing
///    communicated.
///
/// `check_expert_laws` (expert/laws.hpp) tests an expert against 5 to 9.
template <class X>
concept Expert = std::copyable<X> && std::equality_comparable<X> && requires(const X& expert, const LayerShape& shape) {
    { expert.check(shape) } -> std::same_as<Status>;
} && detail::expert::HasBundles<X, float> && detail::expert::HasBundles<X, const double> &&
    detail::expert::ComputesWith<X, float> && detail::expert::ComputesWith<X, double>;

}  // namespace steelyard
