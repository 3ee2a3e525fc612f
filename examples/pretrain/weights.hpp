// The weights that the ranks of one process share, and the optimizer step that they take together.
//
// Ranks in threads share one copy of the weights, and each sums and updates its own part of it. Under MPI every
// process has a copy of its own, sums the gradient over the ranks and updates all. Both add the ranks'
// gradients in rank order, so that both give the same bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "adamw.hpp"
#include "memory.hpp"
#include "moe_block.hpp"

namespace pretrain {

/// The ranks of this process among themselves.
struct Team {
    int member = 0, size = 1;
};

template <class T>
class Weights {
public:
    /// `tensors` are those of `params`; blocks of memory have `bytes` bytes.
    Weights(index_t bytes, int team)
        : params(bytes), first_moment(bytes), second_moment(bytes), sum_(bytes),
          gradients_(static_cast<std::size_t>(team)),
          squares_(static_cast<std::size_t>(tiles_of(size(), block))) {}

    Bytes params, first_moment, second_moment;  // one layout for all
    std::vector<Tensor<T>> tensors;             // of params

    [[nodiscard]] index_t size() const { return params.size() / static_cast<index_t>(sizeof(T)); }
    /// Where a member of the team accumulates its gradient.
    void set_gradient(Team team, Bytes& gradient) { gradients_[static_cast<std::size_t>(team.member)] = &gradient; }

    /// One step by the sum of all ranks' gradients, which are zeroed. Called by every rank; returns the norm of
    /// the whole gradient, before clipping, on each. `t` counts from 1.
    template <class Comm>
    [[nodiscard]] Status step(const Comm& comm, Team team, const Settings& settings, std::int64_t t, double& norm) {
        const index_t blocks = tiles_of(size(), block), count = size();
        const index_t begin = blocks * team.member / team.size * block;
        const index_t end = std::min(count, blocks * (team.member + 1) / team.size * block);
        T* sum = sum_.template as<T>().data();

        if (Status s = meet(comm, team); !s) return s;  // every gradient is complete
        for (index_t at = begin; at < end; at += block) {
            const index_t n = std::min(block, end - at);
            auto total = row(sum + at, n);
            total = row(gradients_[0]->template as<T>().data() + at, n);
            for (std::size_t r = 1; r < gradients_.size(); ++r)
                total += row(gradients_[r]->template as<T>().data() + at, n);
        }
        if (comm.size() > team.size) {
            const auto all = sum_.template as<T>();
            if (Status s = comm.begin_sum(all); !s) return s;
            if (Status s = comm.end_sum(all); !s) return s;
        }
        for (index_t at = begin; at < end; at += block)
            squares_[static_cast<std::size_t>(at / block)] = sum_of_squares(sum + at, std::min(block, end - at));

        if (Status s = meet(comm, team); !s) return s;  // every part is summed
        gradients_[static_cast<std::size_t>(team.member)]->clear();
        double squares = 0;
        for (const double part : squares_) squares += part;
        norm = std::sqrt(squares);
        const double clip = settings.clip > 0 && norm > settings.clip ? settings.clip / norm : 1.0;
        update(settings, t, clip, begin, end);
        return meet(comm, team);  // every part is updated
    }

private:
    static constexpr index_t block = 4096;  // numbers whose squares are added together: fixed, whatever the team

    template <class Comm>
    static Status meet(const Comm& comm, Team team) {
        return team.size > 1 ? comm.barrier() : Status();
    }

    /// Matrices decay; gains and the embedding don't.
    void update(const Settings& settings, std::int64_t t, double clip, index_t begin, index_t end) {
        T* base = params.template as<T>().data();
        const double rate = learning_rate(settings, t - 1);
        for (const Tensor<T>& tensor : tensors) {
            const index_t from = std::max(begin, tensor.data - base);
            const index_t to = std::min(end, tensor.data - base + tensor.size());
            if (from >= to) continue;
            const bool decays = tensor.shape.size() > 1 && tensor.name != "embedding";
            adamw_update<T>(AdamW{}, t, rate, decays ? settings.weight_decay : 0.0, clip, to - from, base + from,
                            sum_.template as<T>().data() + from, first_moment.template as<T>().data() + from,
                            second_moment.template as<T>().data() + from);
        }
    }

    Bytes sum_;
    std::vector<Bytes*> gradients_;  // [team]
    std::vector<double> squares_;    // [blocks]
};

}  // namespace pretrain
