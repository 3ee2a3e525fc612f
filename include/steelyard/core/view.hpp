// A view: a pointer with extents and strides, and the memory space in its type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace steelyard {

/// Signed index for every extent, stride, offset and count of rows.
using index_t = std::int64_t;

/// Memory that host code may dereference.
struct HostSpace {};
/// Memory that only CUDA kernels may dereference.
struct CudaSpace {};

/// Whether a result is written over a tensor or added to it.
enum class Write { assign, add };

/// A non-owning, trivially copyable tensor: pointer, extents and strides (in elements).
///
/// Const-ness is in `T`: `view<const float, 2>` is a read-only matrix. A view with a null pointer is
/// *absent*, which is how optional tensors are passed. The memory space is part of the type, so that
/// device memory cannot reach host code.
template <class T, int Rank, class Space = HostSpace>
struct view {
    static_assert(Rank >= 1, "steelyard: a view has at least one dimension");
    using value_type = T;
    using space = Space;
    static constexpr int rank = Rank;

    T* data = nullptr;
    index_t extents[Rank] = {};
    index_t strides[Rank] = {};

    constexpr view() = default;

    /// A dense row-major view: the last dimension is contiguous.
    template <class... Extents>
        requires(sizeof...(Extents) == Rank && (std::is_convertible_v<Extents, index_t> && ...))
    constexpr view(T* pointer, Extents... sizes) : data(pointer), extents{static_cast<index_t>(sizes)...} {
        index_t stride = 1;
        for (int r = Rank - 1; r >= 0; --r) {
            strides[r] = stride;
            stride *= extents[r];
        }
    }

    /// The read-only twin of a mutable view.
    template <class U>
        requires(std::is_same_v<const U, T> && !std::is_const_v<U>)
    constexpr view(const view<U, Rank, Space>& other) : data(other.data) {
        for (int r = 0; r < Rank; ++r) {
            extents[r] = other.extents[r];
            strides[r] = other.strides[r];
        }
    }

    /// Whether a tensor was given at all. A tensor of zero elements may be present or absent.
    [[nodiscard]] constexpr bool present() const { return data != nullptr; }

    [[nodiscard]] constexpr index_t size() const {
        index_t n = 1;
        for (int r = 0; r < Rank; ++r) n *= extents[r];
        return n;
    }

    template <class... Index>
        requires(sizeof...(Index) == Rank)
    [[nodiscard]] constexpr T& operator()(Index... index) const {
        const index_t at[] = {static_cast<index_t>(index)...};
        index_t offset = 0;
        for (int r = 0; r < Rank; ++r) offset += at[r] * strides[r];
        return data[offset];
    }

    /// The element (rank 1) or sub-view at index `i` of the first dimension.
    [[nodiscard]] constexpr decltype(auto) operator[](index_t i) const {
        if constexpr (Rank == 1) {
            return (data[i * strides[0]]);  // an element is returned by reference
        } else {
            view<T, Rank - 1, Space> sub;
            sub.data = data + i * strides[0];
            for (int r = 1; r < Rank; ++r) {
                sub.extents[r - 1] = extents[r];
                sub.strides[r - 1] = strides[r];
            }
            return sub;
        }
    }

    /// Rows `[begin, end)` of the first dimension.
    [[nodiscard]] constexpr view slice(index_t begin, index_t end) const {
        view sub = *this;
        sub.data = data + begin * strides[0];
        sub.extents[0] = end - begin;
        return sub;
    }

    /// The last dimension is contiguous, which every kernel asks for; rows may be padded.
    [[nodiscard]] constexpr bool contiguous_rows() const {
        return extents[Rank - 1] <= 1 || strides[Rank - 1] == 1;
    }

    /// Every stride is that of a dense row-major tensor.
    [[nodiscard]] constexpr bool dense() const {
        index_t stride = 1;
        for (int r = Rank - 1; r >= 0; --r) {
            if (extents[r] != 1 && strides[r] != stride) return false;
            stride *= extents[r];
        }
        return true;
    }
};

}  // namespace steelyard
