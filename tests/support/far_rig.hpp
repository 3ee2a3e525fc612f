// Layers on the fake device of support/far_device.hpp, and calls to make on them.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "support/far_device.hpp"
#include "support/rig.hpp"

namespace steelyard::testing {

inline constexpr LayerShape shape{.tokens = 12, .width = 6, .experts = 5, .sequences = 3, .micro_steps = 2, .ranks = 2};

template <class ExpertT, class BalanceT, class CommT, class RetentionT, class DeviceT>
using LayerOn = MoE<float, TopK, ExpertT, BalanceT, CommT, Dropless, RetentionT, DeviceT>;

/// What one call left behind, whatever the device.
struct Outcome {
    std::vector<float> y, dx;
    std::vector<std::byte> record;
    double loss = 0;
    bool operator==(const Outcome& other) const {
        return same_bits(y, other.y) && same_bits(dx, other.dx) && record == other.record &&
               std::memcmp(&loss, &other.loss, sizeof loss) == 0;
    }
};

template <class Bundle, class... Dims>
std::vector<std::byte> bytes_of_tensors(Bundle bundle, const Dims&... dims) {
    std::vector<std::byte> all;
    const auto add = [&](const auto&, const auto& tensor) {
        const auto* from = reinterpret_cast<const std::byte*>(tensor.data);
        all.insert(all.end(), from, from + static_cast<std::size_t>(tensor.size()) * sizeof(*tensor.data));
    };
    for_each_tensor(bundle, add, dims...);
    return all;
}

/// One call of a script, and what it is made with.
struct Call {
    Batch<float> batch;
    Mode mode = Mode::train;
    bool backward = true;
    Write write_grads = Write::add;
};

/// Two micro-steps, the second replayed, and an evaluation. Every rank has tokens of its own.
inline std::vector<Call> script_of(std::int64_t step, int rank, bool masked) {
    std::vector<Call> calls;
    for (const std::int64_t m : {0, 1, 1}) {
        const auto seed = static_cast<std::uint64_t>(10 * step + m + 100 * rank);
        Batch<float> batch(12 - m, shape.width, seed,
                           {.step = step, .micro_step = m, .total_tokens = 60, .token_offset = 20 * m + 10 * rank});
        if (masked) {
            batch.mask.assign(static_cast<std::size_t>(batch.tokens()), 1);
            batch.mask[1] = batch.mask[7] = 0;
            batch.sequences = {0, 4, 4, batch.tokens()};
        }
        batch.ids.resize(static_cast<std::size_t>(batch.tokens()));
        for (std::size_t t = 0; t < batch.ids.size(); ++t) batch.ids[t] = static_cast<std::int32_t>(t % 2);
        batch.dlogits.assign(static_cast<std::size_t>(batch.tokens() * shape.experts), m == 1 ? 0.25f : 0.0f);
        // The second step's gradients replace the first's.
        calls.push_back({.batch = batch, .write_grads = step > 0 && calls.empty() ? Write::assign : Write::add});
    }
    calls.push_back({calls[0].batch, Mode::evaluate, false});
    return calls;
}

/// A rig whose layer lives on `Far`. Nothing is waited for until `outcomes`.
template <class Layer>
class FarRig {
public:
    using Comm = typename Layer::Comm;

    FarRig(const typename Layer::Config& config, const Comm& comm, FarMachine& machine)
        : layer(config),
          comm_(comm),
          machine_(machine),
          param_memory_(machine.allocate(layer.param_bytes())),
          grad_memory_(machine.allocate(layer.param_bytes())),
          state_(layer.state_bytes()),
          workspace_host_(layer.workspace_bytes().host),
          workspace_{workspace_host_, machine.allocate(layer.workspace_bytes().device)},
          params_(layer.place_params(param_memory_.data())),
          grads_(layer.place_params(grad_memory_.data())) {
        REQUIRE(layer.init_state(state_).ok());
    }

    void set_params(std::span<const std::byte> values) {
        machine_.open([&] { std::memcpy(param_memory_.data(), values.data(), values.size()); });
    }

    /// `again`: the memory of an earlier call's context, which may be under way.
    Status forward(const Call& of, typename Layer::Stack* stack = nullptr, index_t row = 0, index_t again = -1) {
        auto& c = *calls_.emplace_back(std::make_unique<InFlight>());
        const index_t tokens = of.batch.tokens();
        c.call = of;
        if (again >= 0) {
            c.context = calls_[static_cast<std::size_t>(again)]->context;
        } else {
            c.context_host = Bytes(layer.context_bytes().host);
            c.context = {c.context_host, machine_.allocate(layer.context_bytes().device)};
        }
        const auto matrix = [&](const std::vector<float>& values) {
            return view<float, 2, FarSpace>(put(values).data, tokens, static_cast<index_t>(values.size()) / tokens);
        };
        c.x = matrix(of.batch.x), c.dy = matrix(of.batch.dy), c.dlogits = matrix(of.batch.dlogits);
        c.y = matrix(std::vector<float>(of.batch.x.size(), 7.0f)), c.dx = matrix(std::vector<float>(of.batch.x.size()));
        TokenInfo<FarSpace> info{.step = of.batch.step, .mode = of.mode};
        if (!of.batch.mask.empty()) info.mask = put(of.batch.mask);
        if (!of.batch.sequences.empty()) info.sequences = put(of.batch.sequences);
        if (!of.batch.ids.empty()) info.ids = put(of.batch.ids);
        std::vector<std::int64_t> of_rank;  // every rank masks as many
        if (Layer::Balance::needs_rank_tokens && gives_rank_tokens && !of.batch.mask.empty())
            of_rank.assign(static_cast<std::size_t>(comm_.size()),
                           std::count(of.batch.mask.begin(), of.batch.mask.end(), std::uint8_t{1}));
        return layer.forward(comm_, {.x = c.x,
                                     .params = layer.read_only_params(params_),
                                     .y = c.y,
                                     .context = c.context,
                                     .workspace = workspace_,
                                     .state = state_,
                                     .tokens = info,
                                     .stack = stack,
                                     .row = row,
                                     .tokens_of_rank = {of_rank.data(), std::ssize(of_rank)}});
    }
    /// Of the last forward, as the next two.
    Status conclude(const typename Layer::Stack& stack, index_t row) {
        return layer.conclude(stack, row, calls_.back()->context, workspace_, state_);
    }
    Status backward() {
        const InFlight& c = *calls_.back();
        return layer.backward({.x = c.x,
                               .params = layer.read_only_params(params_),
                               .dy = c.dy,
                               .dx = c.dx,
                               .grads = grads_,
                               .context = c.context,
                               .workspace = workspace_,
                               .dlogits = c.dlogits,
                               .write_grads = c.call.write_grads});
    }
    Status call(const Call& of, index_t again = -1) {
        if (Status s = forward(of, nullptr, 0, again); !s || !of.backward) return s;
        return backward();
    }

    Status post_step(typename Layer::Stack& stack, index_t row, std::int64_t step) {
        return layer.post_step(stack, row, step, state_);
    }
    Status end_step(const typename Layer::Stack& stack, index_t row, std::int64_t step) {
        return layer.end_step(stack, row, step, state_);
    }
    Status end_step(std::int64_t step) { return layer.end_step(comm_, step, state_, workspace_); }

    /// Waits for both lines of work.
    void rest() const {
        memory_ops<Far>::wait({&machine_});
        memory_ops<Far>::wait(memory_ops<Far>::beside({&machine_}));
    }
    std::vector<Outcome> outcomes() {
        rest();
        std::vector<Outcome> all;
        for (const auto& c : calls_) {
            Outcome& one = all.emplace_back();
            machine_.open([&] {
                one.y.assign(c->y.data, c->y.data + c->y.size()), one.dx.assign(c->dx.data, c->dx.data + c->dx.size());
            });
            if (c->call.mode == Mode::train)
                one.record = bytes_of_tensors(layer.balance_record(c->context), layer.config().balance, shape);
            one.loss = layer.balance_loss(c->context);
        }
        return all;
    }
    [[nodiscard]] double loss(std::size_t call) const { return layer.balance_loss(calls_[call]->context); }
    [[nodiscard]] Status summed(std::size_t call) const { return layer.summed(calls_[call]->context); }
    [[nodiscard]] std::vector<std::byte> grad_bytes() {
        std::vector<std::byte> bytes;
        rest();
        machine_.open([&] { bytes.assign(grad_memory_.begin(), grad_memory_.end()); });
        return bytes;
    }
    [[nodiscard]] auto balance_state() const { return layer.balance_state(state_); }

    Layer layer;
    bool gives_rank_tokens = true;  ///< where there is a mask

private:
    struct InFlight {
        Call call;
        Bytes context_host;
        QueuedBlock context;
        view<float, 2, FarSpace> x, y, dy, dx, dlogits;
    };

    /// A copy in far memory; work may be under way, so the copy is work too.
    template <class U>
    view<U, 1, FarSpace> put(const std::vector<U>& values) {
        const auto block = machine_.allocate(static_cast<index_t>(values.size() * sizeof(U)));
        machine_.enqueue(FarMachine::main_line,
                         [block, values] { std::memcpy(block.data(), values.data(), block.size()); });
        return {reinterpret_cast<U*>(block.data()), std::ssize(values)};
    }

    Comm comm_;
    FarMachine& machine_;
    std::span<std::byte> param_memory_, grad_memory_;
    Bytes state_, workspace_host_;
    QueuedBlock workspace_;
    typename Layer::Params params_, grads_;
    std::vector<std::unique_ptr<InFlight>> calls_;
};

}  // namespace steelyard::testing
