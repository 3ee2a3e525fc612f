// The sizes of a layer, and whether what a call brings fits them: the checks before its stages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "steelyard/layer/check.hpp"
#include "steelyard/layer/memory.hpp"
#include "steelyard/ops/balance_ops.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard {

/// What `MoE` refuses, and by which sizes. `Types` is a LayerTypes.
template <class Types>
class LayerBoundary {
protected:
    using T = typename Types::T;
    using Parts = typename Types::Parts;
    using Balance = typename Types::Balance;
    using Config = typename Types::Config;
    using Context = typename Types::Context;
    using Workspace = typename Types::Workspace;
    using State = typename Types::State;
    using ForwardArgs = typename Types::ForwardArgs;
    using BackwardArgs = typename Types::BackwardArgs;

    explicit LayerBoundary(const Config& config)
        : config_(config),
          dims_{config.shape, Types::routed_of(config), Types::shared_of(config), config.balance, 0},
          context_layout_(fingerprint_of<Context>(dims_)),
          state_layout_(fingerprint_of<State>(dims_)) {
        dims_.scratch = scratch_bytes();
    }

    /// Sizes of the layer and options of its policies.
    [[nodiscard]] Status check_all() const {
        if (Status s = check_config(config_); !s) return s;
        if (Status s = dims_.routed.check(); !s) return s;
        if (Status s = dims_.shared.check(); !s) return s;
        if (Parts::has_shared && dims_.routed.outputs() != 1)
            return Status::refuse(Code::invalid_argument, "layer.config", "expert",
                                  "no shared expert beside a mixture with several outputs", "WithShared");
        return {};
    }

    [[nodiscard]] index_t scratch_bytes() const {
        if (!check_all()) return 0;  // policies are asked for sizes only after they have accepted the shape
        return std::max({dims_.routed.scratch_bytes(), dims_.shared.scratch_bytes(),
                         balance_ops<typename Types::Device>::scratch_bytes(config_.device, config_.shape)});
    }

    [[nodiscard]] StateHeader state_header() const {
        return {StateHeader::expected_magic,
                StateHeader::current_version,
                static_cast<std::int64_t>(config_.layer),
                config_.shape.experts,
                config_.shape.micro_steps,
                bytes_of<State>(dims_),
                state_layout_};
    }
    /// Whether `state` belongs to this layer.
    Status check_state(std::string_view stage, std::span<const std::byte> state) const {
        if (Status s = check_block(stage, "state", state, bytes_of<State>(dims_)); !s) return s;
        if constexpr (Balance::remembers) {
            const auto* found = reinterpret_cast<const StateHeader*>(state.data());
            return check_header(stage, *found, state_header());
        }
        return {};
    }

    /// The caller's tensors are all there, but for matrices of experts that a packed copy stands in for.
    Status check_params(std::string_view stage, const typename Types::template Params<const T>& params,
                        PackedFor purpose) const {
        const auto& routed = dims_.routed.config();
        if (Status s =
                check_bundle(stage, "params.router", Absent::refused, params.router, routed.router, routed.shape);
            !s)
            return s;
        // Merged experts are made of the matrices.
        constexpr bool merges = requires { Types::Routed::merges_experts; };
        if (Status s = check_experts<!merges>(stage, "params.experts", params.experts, routed, purpose); !s) return s;
        if constexpr (Parts::has_shared) {
            const auto& beside = dims_.shared.config();
            if (Status s = check_experts<true>(stage, "params.shared", params.shared, beside, purpose); !s) return s;
            return check_bundle(stage, "params.shared_router", Absent::refused, params.shared_router, beside.router,
                                beside.shape);
        }
        return {};
    }
    template <bool ReadsPacked, class Bundle, class Of>
    Status check_experts(std::string_view stage, std::string_view name, const Bundle& params, const Of& of,
                         [[maybe_unused]] PackedFor purpose) const {
        Absent matrices = Absent::refused;
        if constexpr (requires { params.packed; }) {
            if (params.packed.present()) {
                if (Status s = of.expert.template check_packed<T>(of.device, stage, name, of.shape, params); !s)
                    return s;
                if (ReadsPacked && of.expert.template packed_serves<T>(of.device, params, purpose))
                    matrices = Absent::fine;
            }
        }
        return check_bundle(stage, name, matrices, params, of.expert, of.shape);
    }

    /// Sizes, the call's tokens and the caller's tensors. `Args` are those of forward.
    template <class Args>
    Status check_forward_tensors(std::string_view stage, const Args& args) const {
        if (Status s = check_all(); !s) return s;
        const index_t count = args.x.extents[0];
        if (Status s = check_tokens(stage, config_.shape, count, args.tokens, step_needs<Balance>); !s) return s;
        if (Status s = check_view(stage, "x", args.x, count, config_.shape.width); !s) return s;
        if (Status s = check_view(stage, "y", args.y, count, outputs() * config_.shape.width); !s) return s;
        if (Types::uses_ids)
            if (Status s = check_view(stage, "ids", args.tokens.ids, count); !s) return s;
        if (args.prior.present())
            if (Status s = check_view(stage, "prior", args.prior, count, config_.shape.experts); !s) return s;
        if (Status s = check_apart(stage, "y", args.y, "x", args.x); !s) return s;
        return check_params(stage, args.params, PackedFor::inference);
    }
    /// The call that backward belongs to, and the caller's tensors. `Args` are those of backward.
    template <class Args>
    Status check_backward_tensors(std::string_view stage, const Args& args, const CallInfo& call) const {
        if (Status s = check_call(stage, call, context_layout_, CallInfo::Phase::ready); !s) return s;
        if (Status s = check_view(stage, "x", args.x, call.tokens, config_.shape.width); !s) return s;
        if (Status s = check_view(stage, "dy", args.dy, call.tokens, outputs() * config_.shape.width); !s) return s;
        if (Status s = check_view(stage, "dx", args.dx, call.tokens, config_.shape.width); !s) return s;
        if (Status s = check_apart(stage, "dx", args.dx, "x", args.x); !s) return s;
        if (Status s = check_apart(stage, "dx", args.dx, "dy", args.dy); !s) return s;
        const auto check_logits = [&](std::string_view name, const auto& tensor) {
            return tensor.present() ? check_view(stage, name, tensor, call.tokens, config_.shape.experts) : Status{};
        };
        if (Status s = check_logits("prior", args.prior); !s) return s;
        if (Status s = check_logits("dprior", args.dprior); !s) return s;
        if (Status s = check_logits("dlogits", args.dlogits); !s) return s;
        if (args.dlogits.present() && !Types::Routed::has_routing)
            return Status::refuse(Code::invalid_argument, stage, "dlogits",
                                  "none: this router has no logits for each token", "a tensor");
        if (Status s = check_params(stage, args.params, PackedFor::training); !s) return s;
        return check_bundle(stage, "grads", Absent::fine, args.grads, dims_);
    }

    Status check_forward(const ForwardArgs& args) const {
        constexpr std::string_view stage = "layer.forward";
        if (Status s = check_forward_tensors(stage, args); !s) return s;
        if (Status s = check_block(stage, "context", args.context, bytes_of<Context>(dims_)); !s) return s;
        if (Status s = check_block(stage, "workspace", args.workspace, bytes_of<Workspace>(dims_)); !s) return s;
        if (Balance::communicates && args.stack != nullptr)
            if (Status s = check_stack(stage, *args.stack, args.row, dims_.wire_words()); !s) return s;
        return check_state(stage, args.state);
    }
    Status check_backward(const BackwardArgs& args) const {
        constexpr std::string_view stage = "layer.backward";
        if (Status s = check_block(stage, "context", args.context, bytes_of<Context>(dims_)); !s) return s;
        if (Status s = check_block(stage, "workspace", args.workspace, bytes_of<Workspace>(dims_)); !s) return s;
        return check_backward_tensors(stage, args, place<Context>(args.context.data(), dims_).call[0]);
    }

    /// Columns of y, in widths of x.
    [[nodiscard]] index_t outputs() const { return dims_.routed.outputs(); }

    Config config_;
    typename Types::Dims dims_;
    std::int64_t context_layout_, state_layout_;
};

}  // namespace steelyard
