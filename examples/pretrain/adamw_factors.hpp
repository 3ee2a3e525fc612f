// The numbers of an AdamW update, for every device: this header is read by nvcc too.
#pragma once

#include <cmath>
#include <cstdint>

namespace pretrain {

struct AdamW {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
};

/// The factors of one update, rounded once from double: the same on every device.
template <class T>
struct AdamWFactors {
    T scale, b1, b2;
    T to_m, to_v;  ///< rate / (1 − β1^t), 1 / (1 − β2^t)
    T keep;        ///< 1 − rate · decay
    T epsilon;

    AdamWFactors(const AdamW& adam, std::int64_t t, double rate, double decay, double gradient_scale)
        : scale(static_cast<T>(gradient_scale)),
          b1(static_cast<T>(adam.beta1)),
          b2(static_cast<T>(adam.beta2)),
          to_m(static_cast<T>(rate / (1.0 - std::pow(adam.beta1, static_cast<double>(t))))),
          to_v(static_cast<T>(1.0 / (1.0 - std::pow(adam.beta2, static_cast<double>(t))))),
          keep(static_cast<T>(1.0 - rate * decay)),
          epsilon(static_cast<T>(adam.epsilon)) {}
};

}  // namespace pretrain
