// The weights that the ranks of one process share, and the optimizer step that they take together.
//
// Ranks in threads share one copy of the weights, on one device, and each sums and updates its own part of it. Under MPI
// every process has a copy of its own, sums the gradient over the ranks and updates all. Both add the ranks'
// gradients in rank order, so that both give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "any_comm.hpp"
#include "host.hpp"
#include "moe_block.hpp"

namespace pretrain {

/// The ranks of this process among themselves.
struct Team {
    int member = 0, size = 1;
};

template <class T, class Device = Threads>
class Weights {
    using Memory = typename Device::Memory;

public:
    /// `tensors` are those of `params`; blocks of memory have `bytes` bytes.
    Weights(index_t bytes, int team)
        : params(bytes), first_moment(bytes), second_moment(bytes), sum_(bytes),
          gradients_(static_cast<std::size_t>(team)),
          squares_(tiles_of(size(), block) * static_cast<index_t>(sizeof(double))) {}

    Memory params, first_moment, second_moment;  // one layout for all
    std::vector<Tensor<T>> tensors;              // of params

    [[nodiscard]] index_t size() const { return params.size() / static_cast<index_t>(sizeof(T)); }
    /// Where a member of the team accumulates its gradient.
    void set_gradient(Team team, Memory& gradient) { gradients_[static_cast<std::size_t>(team.member)] = &gradient; }

    /// One step by the sum of all ranks' gradients, which are zeroed. Called by every rank, with its own access to the
    /// device; returns the norm of the whole gradient, before clipping, on each. `t` counts from 1.
    [[nodiscard]] Status step(const Device& device, const AnyComm& comm, Team team, const Settings& settings,
                              std::int64_t t, double& norm) {
        const index_t blocks = tiles_of(size(), block), count = size();
        const index_t begin = blocks * team.member / team.size * block;
        const index_t end = std::min(count, blocks * (team.member + 1) / team.size * block);
        const view<T, 1, typename Device::space> sum(numbers(sum_) + begin, end - begin);
        const std::span<double> squares = squares_.template as<double>();

        if (Status s = meet(device, comm, team); !s) return s;  // every gradient is complete
        sum_parts<T>(device, gradients_, begin, sum);
        if constexpr (std::is_same_v<Device, Threads>) {
            if (comm.size() > team.size) {
                const auto all = sum_.template as<T>();
                if (Status s = comm.begin_sum(all); !s) return s;
                if (Status s = comm.end_sum(all); !s) return s;
            }
        }
        sum_squares<T>(device, sum, block, squares.data() + begin / block);

        if (Status s = finish(device); !s) return s;
        if (Status s = meet(device, comm, team); !s) return s;  // every part is summed
        clear(device, *gradients_[static_cast<std::size_t>(team.member)]);
        double total = 0;
        for (const double part : squares) total += part;
        norm = std::sqrt(total);
        const double clip = settings.clip > 0 && norm > settings.clip ? settings.clip / norm : 1.0;
        update(device, settings, t, clip, begin, end);
        return meet(device, comm, team);  // every part is updated
    }

private:
    static constexpr index_t block = 4096;  // numbers whose squares are added together: fixed, whatever the team

    [[nodiscard]] static T* numbers(const Memory& memory) { return reinterpret_cast<T*>(memory.data()); }

    static Status meet(const Device& device, const AnyComm& comm, Team team) {
        if (team.size == 1) return {};  // what comes next, the device does next
        if (Status s = finish(device); !s) return s;
        return comm.barrier();
    }

    /// Matrices decay; gains and the embedding don't.
    void update(const Device& device, const Settings& settings, std::int64_t t, double clip, index_t begin,
                index_t end) {
        const T* base = numbers(params);
        const double rate = learning_rate(settings, t - 1);
        for (const Tensor<T>& tensor : tensors) {
            const index_t from = std::max(begin, tensor.data - base);
            const index_t to = std::min(end, tensor.data - base + tensor.size());
            if (from >= to) continue;
            const bool decays = tensor.shape.size() > 1 && tensor.name != "embedding";
            const AdamWFactors<T> factors({}, t, rate, decays ? settings.weight_decay : 0.0, clip);
            adamw<T>(device, factors, {numbers(params) + from, to - from}, numbers(sum_) + from,
                     numbers(first_moment) + from, numbers(second_moment) + from);
        }
    }

    Memory sum_;
    std::vector<const Memory*> gradients_;  // [team]
    typename Device::HostMemory squares_;   // [blocks]
};

}  // namespace pretrain
