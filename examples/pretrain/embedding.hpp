// The embedding: a row of the table for each byte.
#pragma once

#include <cstdint>

#include "linear.hpp"

namespace pretrain {

/// y[t] = table[token[t]]. Writes y (=).
template <class T>
void embedding_forward(const Threads& threads, view<const std::uint8_t, 1> tokens,  // [T]
                       view<const T, 2> table,                                      // [V, d]
                       view<T, 2> y) {                                              // [T, d]
    const index_t width = table.extents[1];
    threads.tiles(tokens.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte*) {
        for (index_t t = begin; t < end; ++t) row(&y(t, 0), width) = row(&table(tokens(t), 0), width);
    });
}

/// dtable[token[t]] += dy[t], in the order of the tokens: one byte may come many times.
template <class T>
void embedding_backward(const Threads&, view<const std::uint8_t, 1> tokens,  // [T]
                        view<const T, 2> dy,                                 // [T, d]
                        view<T, 2> dtable) {                                 // [V, d]
    const index_t width = dtable.extents[1];
    for (index_t t = 0; t < tokens.extents[0]; ++t) row(&dtable(tokens(t), 0), width) += row(&dy(t, 0), width);
}

}  // namespace pretrain
