// What a model asks of its device beside its layers' mathematics, on the CPU: where nothing is far and nothing is late.
#pragma once

#include <algorithm>
#include <span>

#include "adamw.hpp"
#include "linear.hpp"
#include "steelyard/core/status.hpp"

namespace pretrain {

/// `given` where the device's kernels reach it; `room` is memory of the device for it, where that is needed.
inline view<const std::uint8_t, 1> brought(const Threads&, view<const std::uint8_t, 1> given, view<std::uint8_t, 1>) {
    return given;
}
/// to (=) from. Waits.
template <class T, int Rank>
void upload(const Threads&, view<const T, Rank> from, view<T, Rank> to) {
    std::copy_n(from.data, from.size(), to.data);
}

/// sum (=) a + b.
template <class T>
void add(const Threads& threads, view<const T, 2> a, view<const T, 2> b,  // [T, d]
         view<T, 2> sum) {                                                // [T, d]
    threads.tiles(a.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte*) {
        matrix(sum.slice(begin, end)) = matrix(a.slice(begin, end)) + matrix(b.slice(begin, end));
    });
}
template <class T>
void clear(const Threads&, view<T, 2> all) {
    matrix(all).setZero();
}
inline void clear(const Threads&, const Bytes& memory) { std::fill_n(memory.data(), memory.size(), std::byte{}); }

/// sum (=) the parts added up in their order, each from `begin` on; squares[i] (=) the sum of the squares of the block
/// that begins at begin + i · block.
template <class T>
void sum_parts(const Threads&, std::span<const Bytes* const> parts, index_t begin, view<T, 1> sum) {
    const index_t count = sum.extents[0];
    for (index_t at = 0; at < count; at += 4096) {  // as much as the first cache holds
        const index_t n = std::min<index_t>(4096, count - at);
        auto total = row(sum.data + at, n);
        total = row(parts[0]->as<T>().data() + begin + at, n);
        for (const Bytes* part : parts.subspan(1)) total += row(part->as<T>().data() + begin + at, n);
    }
}
template <class T>
void sum_squares(const Threads&, view<const T, 1> numbers, index_t block, double* squares) {
    for (index_t at = 0; at < numbers.extents[0]; at += block)
        *squares++ = sum_of_squares(numbers.data + at, std::min(block, numbers.extents[0] - at));
}
/// The step of adamw.hpp, of as many numbers as `params` has.
template <class T>
void adamw(const Threads&, const AdamWFactors<T>& by, view<T, 1> params, const T* gradient, T* first_moment,
           T* second_moment) {
    adamw_update<T>(by, params.extents[0], params.data, gradient, first_moment, second_moment);
}

/// A place in the device's work, and until it has come so far.
inline void mark(const Threads&) {}
inline steelyard::Status await_mark(const Threads&) { return {}; }
/// Until all work is done.
inline steelyard::Status finish(const Threads&) { return {}; }

}  // namespace pretrain
