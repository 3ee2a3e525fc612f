// What balance must give, worked out token by token from the formulas alone.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "contract/splits.hpp"

namespace steelyard::testing::contract {

/// Softmax routing of one step's global batch, in plain loops.
struct Routed {
    std::array<std::array<double, experts>, tokens> probs{};
    std::array<std::array<index_t, top_k>, tokens> chosen{};
    std::array<double, tokens> log_sum_exp{};

    Routed(const Batch<double>& batch, view<const double, 2> weight) {  // [E, d]
        for (std::size_t t = 0; t < tokens; ++t) {
            double sum = 0;
            for (index_t e = 0; e < experts; ++e) {
                double z = 0;
                for (index_t j = 0; j < width; ++j)
                    z += batch.x[t * width + static_cast<std::size_t>(j)] * weight(e, j);
                probs[t][static_cast<std::size_t>(e)] = std::exp(z);
                sum += std::exp(z);
            }
            for (double& p : probs[t]) p /= sum;
            log_sum_exp[t] = std::log(sum);
            std::array<index_t, experts> order{};
            std::iota(order.begin(), order.end(), index_t{0});
            std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) {
                return probs[t][static_cast<std::size_t>(a)] > probs[t][static_cast<std::size_t>(b)];
            });
            std::copy_n(order.begin(), top_k, chosen[t].begin());
        }
    }
};

/// The parameters' gradient by the router alone, the gradient by x, and the loss.
struct Expected {
    std::vector<double> router = std::vector<double>(static_cast<std::size_t>(experts * width));  // [E, d]
    std::vector<double> dx = std::vector<double>(static_cast<std::size_t>(tokens * width));       // [T, d]
    double loss = 0;
};

/// Whether the token at `other` counts for the f that the token at `own` meets: the definition of a scope.
using Sees = std::function<bool(const Place& own, const Place& other)>;

/// The last step of `steps` steps that are all split alike.
class Reference {
public:
    Reference(const Split& split, std::int64_t steps, view<const double, 2> router_weight) : weight_(router_weight) {
        for (std::int64_t step = 0; step < steps; ++step) {
            batches_.push_back(global_batch(step));
            routed_.emplace_back(batches_.back(), router_weight);
            places_.push_back(places(split, step));
        }
    }

    /// The load that a token at `own` meets.
    [[nodiscard]] Counts counts(const Place& own, const Sees& sees) const {
        Counts sum(static_cast<std::size_t>(experts + 1));
        for (std::size_t s = 0; s < routed_.size(); ++s)
            for (std::size_t t = 0; t < tokens; ++t) {
                if (!sees(own, places_[s][t])) continue;
                for (const index_t e : routed_[s].chosen[t]) ++sum[static_cast<std::size_t>(e)];
                ++sum.back();
            }
        return sum;
    }

    /// Adds coefficient * mean_t (E sum_i f_i p_ti) and its gradient, each token with the f of its scope.
    void add_balance_loss(Expected& expected, double coefficient, const Sees& sees) const {
        const auto& now = routed_.back();
        for (std::size_t t = 0; t < tokens; ++t) {
            const Counts load = counts(places_.back()[t], sees);
            if (load.back() == 0) continue;
            std::array<double, experts> f{};
            double mean = 0;  // sum_i f_i p_ti
            for (std::size_t i = 0; i < experts; ++i) {
                f[i] = static_cast<double>(load[i]) / static_cast<double>(top_k * load.back());
                mean += f[i] * now.probs[t][i];
            }
            expected.loss += coefficient * experts * mean / tokens;
            for (std::size_t i = 0; i < experts; ++i)
                add_logit(expected, t, i, coefficient * experts / tokens * now.probs[t][i] * (f[i] - mean));
        }
    }

    /// Adds coefficient * mean_t lse_t^2 and its gradient.
    void add_z_loss(Expected& expected, double coefficient) const {
        const auto& now = routed_.back();
        for (std::size_t t = 0; t < tokens; ++t) {
            expected.loss += coefficient * now.log_sum_exp[t] * now.log_sum_exp[t] / tokens;
            for (std::size_t i = 0; i < experts; ++i)
                add_logit(expected, t, i, coefficient * 2 * now.log_sum_exp[t] * now.probs[t][i] / tokens);
        }
    }

private:
    void add_logit(Expected& expected, std::size_t t, std::size_t expert, double dlogit) const {
        for (std::size_t j = 0; j < width; ++j) {
            expected.router[expert * width + j] += dlogit * batches_.back().x[t * width + j];
            expected.dx[t * width + j] += dlogit * weight_(static_cast<index_t>(expert), static_cast<index_t>(j));
        }
    }

    view<const double, 2> weight_;
    std::vector<Batch<double>> batches_;
    std::vector<Routed> routed_;
    std::vector<std::vector<Place>> places_;
};

// The scopes, in one line each.

inline bool same_step(const Place& a, const Place& b) { return a.step == b.step; }
inline bool of_micro_batch(const Place& a, const Place& b) {
    return same_step(a, b) && a.micro_step == b.micro_step && a.rank == b.rank;
}
inline bool of_micro_step(const Place& a, const Place& b) { return same_step(a, b) && a.micro_step == b.micro_step; }
inline bool of_prefix(const Place& a, const Place& b) { return same_step(a, b) && b.micro_step <= a.micro_step; }
inline bool of_own_prefix(const Place& a, const Place& b) { return of_prefix(a, b) && a.rank == b.rank; }
inline bool of_sequence(const Place& a, const Place& b) {
    return same_step(a, b) && a.token / sequence_length == b.token / sequence_length;
}
inline bool of_last_two_steps(const Place& a, const Place& b) { return b.step < a.step && b.step >= a.step - 2; }

}  // namespace steelyard::testing::contract
