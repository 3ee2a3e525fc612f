// The layer of policies that do not fit: empty, so that only the sentences of its diagnosis are left to read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "steelyard/core/routing.hpp"
#include "steelyard/core/status.hpp"
#include "steelyard/layer/memory.hpp"
#include "steelyard/layer/stack.hpp"

namespace steelyard {

namespace detail {

/// Made from anything. Stands for a tensor or a bundle of a layer that cannot exist.
struct Anything {
    template <class... Given>
    constexpr Anything(Given&&...) {}
};

/// Everything that can be named, called or passed on a `MoE`, without a meaning: `diagnose.hpp` has said what to mend.
/// A program that uses it has failed to compile already, so nothing here ever runs.
template <class T, class CommT, class BalanceT, class ConfigT>
class UnsoundLayer {
public:
    using value_type = T;
    using Comm = CommT;
    using Balance = BalanceT;
    using Config = ConfigT;
    using Params = Anything;
    using ConstParams = Anything;
    using Stack = steelyard::Stack;

    struct ForwardArgs {
        Anything x, params, y, context, workspace, state;
        TokenInfo<> tokens = {};
        Anything stack = {};
        index_t row = 0;
        Anything tokens_of_rank;
    };
    struct BackwardArgs {
        Anything x, params, dy, dx, grads, context, workspace;
    };

    explicit UnsoundLayer(const Config& config) : config_(config) {}

    [[nodiscard]] const Config& config() const { return config_; }
    [[nodiscard]] const LayerShape& shape() const { return config_.shape; }

    [[nodiscard]] index_t param_bytes() const { return 0; }
    [[nodiscard]] index_t state_bytes() const { return 0; }
    [[nodiscard]] index_t context_bytes() const { return 0; }
    [[nodiscard]] index_t workspace_bytes() const { return 0; }
    [[nodiscard]] index_t wire_words() const { return 0; }
    [[nodiscard]] index_t step_words() const { return 0; }

    [[nodiscard]] Params place_params(std::byte*) const { return {}; }
    template <class Visit>
    void each_param(Params&, Visit&&) const {}
    [[nodiscard]] ConstParams read_only_params(const Params&) const { return {}; }

    [[nodiscard]] Status check() const { return {}; }
    [[nodiscard]] Status check_state(Anything, Anything) const { return {}; }
    Status init_state(Anything) const { return {}; }
    Status forward(const Comm&, const ForwardArgs&) const { return {}; }
    Status backward(const BackwardArgs&) const { return {}; }
    template <class... Given>
    Status conclude(const Given&...) const {
        return {};
    }
    template <class... Given>
    Status post_step(const Given&...) const {
        return {};
    }
    template <class... Given>
    Status end_step(const Given&...) const {
        return {};
    }

    [[nodiscard]] double balance_loss(Anything) const { return 0.0; }
    [[nodiscard]] Routing<T> routing(Anything) const { return {}; }
    [[nodiscard]] Plan<> plan(Anything) const { return {}; }
    [[nodiscard]] Anything balance_record(Anything) const { return {}; }
    [[nodiscard]] Anything balance_state(Anything) const { return {}; }

private:
    Config config_;
};

}  // namespace detail

}  // namespace steelyard
