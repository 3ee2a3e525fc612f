// Cross entropy of the next byte, in nats.
#pragma once

#include <cmath>
#include <cstdint>

#include "linear.hpp"

namespace pretrain {

/// loss[t] = log Σ_v exp(logits[t, v]) − logits[t, target[t]]. Writes the losses and turns the logits into
/// probabilities in place, which is what backward needs.
template <class T>
void cross_entropy_forward(const Threads& threads, view<const std::uint8_t, 1> targets,  // [T]
                           view<T, 2> logits,                                            // [T, V]  -> probabilities
                           view<T, 1> losses) {                                          // [T]
    const index_t vocabulary = logits.extents[1];
    threads.tiles(targets.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte*) {
        for (index_t t = begin; t < end; ++t) {
            auto z = row(&logits(t, 0), vocabulary);
            const T top = z.maxCoeff(), at_target = z(targets(t)) - top;
            z = (z - top).exp();
            const T sum = z.sum();
            losses(t) = std::log(sum) - at_target;
            z *= T(1) / sum;
        }
    });
}

/// dlogits[t, v] = weight · (probability[t, v] − [v = target[t]]), in place of the probabilities (=).
template <class T>
void cross_entropy_backward(const Threads& threads, view<const std::uint8_t, 1> targets,  // [T]
                            T weight,                                                     // of each token in the loss
                            view<T, 2> probabilities) {                                   // [T, V]  -> dlogits
    const index_t vocabulary = probabilities.extents[1];
    threads.tiles(targets.extents[0], tile_rows, [&](index_t begin, index_t end, std::byte*) {
        for (index_t t = begin; t < end; ++t) {
            auto p = row(&probabilities(t, 0), vocabulary);
            p *= weight;
            p(targets(t)) -= weight;
        }
    });
}

}  // namespace pretrain
