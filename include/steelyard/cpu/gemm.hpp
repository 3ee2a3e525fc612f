// Matrix products of one thread, with one fixed order of addition.
//
// Every element of the result is one chain of multiply-adds by ascending k, starting from 0 or from what c held: it
// depends only on its own row of a, its own column of b, k, and c: not on m, n, the position in a tile, the strides or
// the alignment of a pointer. Bits change with the instruction set and the compiler.
//
// Why not Eigen's products: they allocate their packing blocks, start threads of their own, and switch to other
// code with another order of accumulation where a matrix is small.
#pragma once

#include <cstddef>
#include <cstdint>

#include "steelyard/cpu/kernels.hpp"

namespace steelyard::cpu {

using steelyard::Write;

/// Bytes of scratch that one product needs, whatever its sizes and the instruction set. Any alignment.
template <class T>
[[nodiscard]] constexpr index_t gemm_scratch_bytes() {
    return widest_pack_room<T> * static_cast<index_t>(sizeof(T)) + 64;
}

namespace detail {

/// A matrix, or its transpose, as the left operand of a product.
template <class T>
struct Left {
    view<const T, 2> matrix;
    bool transposed = false;
};

/// c (= or +=) left right, the right one being b [k, n], or the transpose of b [n, k].
template <class T>
void product(const Left<T>& left, view<const T, 2> b, bool b_transposed, view<T, 2> c, Write write, std::byte* scratch,
             Isa isa) {
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    with_kernels(isa, [&](auto kernels) {
        typename decltype(kernels)::template ProductOf<T> call;
        call.rows = c.extents[0];
        // Rows of a are only read.
        call.a = {const_cast<T*>(left.matrix.data), left.matrix.strides[left.transposed ? 1 : 0]};
        call.a_step = left.matrix.strides[left.transposed ? 0 : 1];
        call.b.depth = left.matrix.extents[left.transposed ? 0 : 1];
        call.b.columns = c.extents[1];
        call.b.from[0] = b.data;
        call.b.stride = b.strides[0];
        call.b.transposed = b_transposed;
        call.c = c.data;
        call.c_row = c.strides[0];
        call.add = write == Write::add;
        call.room = reinterpret_cast<T*>(scratch + (64 - address % 64) % 64);
        decltype(kernels)::product(call);
    });
}

}  // namespace detail

/// c (= or +=) a b^T. Rows are contiguous, at any stride; m, n and k may be 0 (k = 0 assigns zeros).
/// `b` is read in place, once for all rows of a: the form for weights [out, in].
template <class T>
void gemm_nt(view<const T, 2> a,  // [m, k]
             view<const T, 2> b,  // [n, k]
             view<T, 2> c,        // [m, n]
             Write write, std::byte* scratch, Isa isa = Isa::automatic) {
    detail::product<T>({a}, b, true, c, write, scratch, isa);
}

/// c (= or +=) a b. Otherwise as gemm_nt.
template <class T>
void gemm_nn(view<const T, 2> a,  // [m, k]
             view<const T, 2> b,  // [k, n]
             view<T, 2> c,        // [m, n]
             Write write, std::byte* scratch, Isa isa = Isa::automatic) {
    detail::product<T>({a}, b, false, c, write, scratch, isa);
}

/// c (= or +=) a^T b. Otherwise as gemm_nt.
template <class T>
void gemm_tn(view<const T, 2> a,  // [k, m]
             view<const T, 2> b,  // [k, n]
             view<T, 2> c,        // [m, n]
             Write write, std::byte* scratch, Isa isa = Isa::automatic) {
    detail::product<T>({a, true}, b, false, c, write, scratch, isa);
}

}  // namespace steelyard::cpu
