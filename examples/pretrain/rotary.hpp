// Rotary positions (Su et al., 2104.09864): pairs of a head's channels turn with the position.
#pragma once

#include <cmath>

#include "linear.hpp"

namespace pretrain {

/// Fills the angles' cosines and sines: position p turns pair i by p · 10000^(−2i / head width).
template <class T>
void rotary_table(view<T, 3> table) {  // [L, 2, half]
    const index_t half = table.extents[2];
    for (index_t p = 0; p < table.extents[0]; ++p)
        for (index_t i = 0; i < half; ++i) {
            const double angle = static_cast<double>(p) *
                                 std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
            table(p, 0, i) = static_cast<T>(std::cos(angle));
            table(p, 1, i) = static_cast<T>(std::sin(angle));
        }
}

/// Turns one head's channels in place; channel i pairs with channel i + half. `direction` is 1 in forward and
/// −1 in backward: the transpose of a rotation turns the other way.
template <class T>
void rotate(T* head, view<const T, 3> table, index_t position, T direction) {
    const index_t half = table.extents[2];
    const T* cosine = &table(position, 0, 0);
    const T* sine = &table(position, 1, 0);
    for (index_t i = 0; i < half; ++i) {
        const T a = head[i], b = head[half + i], s = direction * sine[i];
        head[i] = a * cosine[i] - b * s;
        head[half + i] = a * s + b * cosine[i];
    }
}

/// Turns the queries and keys of whole sequences of length L, in place.
template <class T>
void rotary(const Threads& threads, view<T, 2> qkv,  // [T, 3d]  queries, keys, values; each of H heads
            view<const T, 3> table,                  // [L, 2, half]
            T direction) {
    const index_t length = table.extents[0], head = 2 * table.extents[2], width = qkv.extents[1] / 3;
    threads.tiles(qkv.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte*) {
        for (index_t t = begin; t < end; ++t)
            for (index_t c = 0; c < 2 * width; c += head) rotate(&qkv(t, c), table, t % length, direction);
    });
}

}  // namespace pretrain
