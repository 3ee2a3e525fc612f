// RMSNorm (Zhang and Sennrich, 1910.07467): y = gain ∘ x / sqrt(mean(x²) + 1e-5).
#pragma once

#include <cmath>

#include "linear.hpp"

namespace pretrain {

/// Writes y and the reciprocal of each row's root mean square, which backward needs.
template <class T>
void rms_norm_forward(const Threads& threads, view<const T, 2> x,  // [T, d]
                      view<const T, 1> gain,                       // [d]
                      view<T, 2> y,                                // [T, d]
                      view<T, 1> inverse) {                        // [T]
    const index_t width = x.extents[1];
    threads.tiles(x.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte*) {
        for (index_t t = begin; t < end; ++t) {
            const auto in = row(&x(t, 0), width);
            inverse(t) = T(1) / std::sqrt(in.square().mean() + T(1e-5));
            row(&y(t, 0), width) = in * row(gain.data, width) * inverse(t);
        }
    });
}

/// With n = x · inverse and g = dy ∘ gain: dx = inverse · (g − n · mean(g ∘ n)), dgain += Σ_t dy ∘ n.
/// Adds dx to what is there (+=): it joins the residual path, which skipped the norm.
template <class T>
void rms_norm_backward(const Threads& threads, view<const T, 2> x,  // [T, d]
                       view<const T, 1> gain,                       // [d]
                       view<const T, 1> inverse,                    // [T]
                       view<const T, 2> dy,                         // [T, d]
                       view<T, 2> dx,                               // [T, d]  +=
                       view<T, 1> dgain) {                          // [d]     +=
    const index_t tokens = x.extents[0], width = x.extents[1];
    threads.tiles(tokens, tile_rows, [&](index_t begin, index_t end, std::byte*) {
        for (index_t t = begin; t < end; ++t) {
            const auto in = row(&x(t, 0), width);
            const auto g = row(&dy(t, 0), width) * row(gain.data, width);
            const T r = inverse(t), along = (g * in).mean() * r * r * r;
            row(&dx(t, 0), width) += g * r - in * along;
        }
    });
    threads.tiles(width, 32, [&](index_t begin, index_t end, std::byte*) {  // columns, each over all tokens in order
        auto sum = row(&dgain(begin), end - begin);
        for (index_t t = 0; t < tokens; ++t)
            sum += row(&dy(t, begin), end - begin) * row(&x(t, begin), end - begin) * inverse(t);
    });
}

}  // namespace pretrain
