// A causal transformer language model on bytes whose feed-forward parts are mixture-of-experts layers.
//
//     x = embedding[bytes]
//     each layer:  x += out · attention(rotary(qkv · norm(x)));   x += moe(norm(x))
//     logits = head · norm(x)
//
// Forward leaves in the activations what backward needs. Parameter gradients accumulate (+=), activation
// gradients are written (=). Nothing here allocates after construction.
//
// Every operation is a function on the model's device (parallel.hpp); which one it is, its overload decides.
#pragma once

#include <memory>
#include <utility>

#include "attention.hpp"
#include "cross_entropy.hpp"
#include "embedding.hpp"
#include "host.hpp"
#include "memory.hpp"
#include "rms_norm.hpp"
#include "rotary.hpp"
#include "transformer_memory.hpp"

namespace pretrain {

template <class T, class Device = Threads>
class Transformer {
public:
    using Space = typename Device::space;
    using Params = ModelParams<T, Space>;
    using Blocks = std::vector<std::unique_ptr<MoeBlock<T, Space>>>;  ///< one for each layer

    Transformer(const ModelShape& shape, Blocks blocks, Device device)
        : shape_(shape), device_(std::move(device)), blocks_(std::move(blocks)),
          losses_(shape.tokens() * static_cast<index_t>(sizeof(T))) {
        const index_t queries = queries_at_once(device_, shape_.length);
        memory_ = Memory(steelyard::bytes_of<Activations<T, Space>>(shape_, queries));
        act_ = steelyard::place<Activations<T, Space>>(memory_.data(), shape_, queries);
        std::vector<T> turns(static_cast<std::size_t>(act_.rotary.size()));
        const view<T, 3> table(turns.data(), shape_.length, 2, shape_.half_head());
        rotary_table(table);
        upload<T, 3>(device_, table, act_.rotary);
        std::vector<index_t> begins(static_cast<std::size_t>(shape_.sequences + 1));
        for (index_t s = 0; s <= shape_.sequences; ++s) begins[static_cast<std::size_t>(s)] = s * shape_.length;
        upload<index_t, 1>(device_, view<index_t, 1>(begins.data(), shape_.sequences + 1), act_.offsets);
        index_t bytes = 0;
        for (const auto& block : blocks_) bytes = std::max(bytes, block->workspace_bytes());
        moe_workspace_ = Memory(bytes);
    }

    [[nodiscard]] const ModelShape& shape() const { return shape_; }
    [[nodiscard]] const Device& device() const { return device_; }
    [[nodiscard]] MoeBlock<T, Space>& block(index_t layer) { return *blocks_[static_cast<std::size_t>(layer)]; }

    [[nodiscard]] index_t param_bytes() const {
        return steelyard::bytes_of<Params>(shape_, blocks_.front()->param_bytes());
    }
    [[nodiscard]] Params place_params(std::byte* block) const {
        return steelyard::place<Params>(block, shape_, blocks_.front()->param_bytes());
    }

    /// Every tensor in a block of parameters, with a name such as "1.moe.experts.up". Looks at no number in it, so that
    /// the block may be memory of any kind.
    [[nodiscard]] std::vector<Tensor<T>> tensors(std::byte* block) const {
        std::vector<Tensor<T>> all;
        auto params = place_params(block);
        const auto visit = [&]<class U, int Rank>(const std::string& name, const view<U, Rank, Space>& v) {
            if constexpr (std::is_same_v<U, T>) {
                all.push_back({name, v.data, std::vector<index_t>(v.extents, v.extents + Rank)});
            } else {  // the bytes of an MoE layer; names begin with the layer's number
                for (auto& inner : blocks_[std::stoul(name)]->tensors(v.data)) {
                    inner.name = name + "." + inner.name;
                    all.push_back(std::move(inner));
                }
            }
        };
        steelyard::for_each_tensor(params, visit, shape_, blocks_.front()->param_bytes());
        return all;
    }

    /// Cross entropy of each target byte, in nats: losses().
    ///
    /// What a device that works in its own time leaves, is there after `await`. It reads the bytes until then.
    Status forward(const Params& params, view<const std::uint8_t, 1> tokens,  // [s·L], s ≤ S
                   view<const std::uint8_t, 1> targets,                       // [s·L]
                   view<const std::int32_t, 1> ids,                           // [s·L]  for routers that ask
                   const steelyard::StepInfo& step, steelyard::Mode mode) {
        const index_t count = tokens.extents[0];
        const auto call = call_of(count, ids, step, mode);
        const auto branch = act_.branch.slice(0, count);
        used_ = count;
        tokens_ = brought(device_, tokens, act_.tokens);
        targets_ = brought(device_, targets, act_.targets);
        embedding_forward<T>(device_, tokens_, params.embedding, layer(0, count).x);
        for (index_t l = 0; l < shape_.layers; ++l) {
            const auto& p = params.layers[static_cast<std::size_t>(l)];
            const auto a = layer(l, count);
            rms_norm_forward<T>(device_, a.x, p.attention_norm, a.attention_in, a.attention_inverse);
            linear_forward<T>(device_, a.attention_in, p.qkv, a.qkv);
            rotary<T>(device_, a.qkv, act_.rotary, T(1));
            attention_forward<T>(device_, a.qkv, a.probabilities, a.attended);
            linear_forward<T>(device_, a.attended, p.out, branch);
            add<T>(device_, a.x, branch, a.middle);

            rms_norm_forward<T>(device_, a.middle, p.moe_norm, a.moe_in, a.moe_inverse);
            Status status =
                block(l).forward(a.moe_in, p.moe.data, branch, moe_workspace_.span(), call, {.prior = prior(l)});
            if (!status) return status;
            add<T>(device_, a.middle, branch, stream_after(l, count));
        }
        const auto x = act_.x.slice(0, count), head_in = act_.head_in.slice(0, count);
        rms_norm_forward<T>(device_, x, params.norm, head_in, act_.inverse.slice(0, count));
        linear_forward<T>(device_, head_in, params.head, act_.logits.slice(0, count));
        cross_entropy_forward<T>(device_, targets_, act_.logits.slice(0, count), all_losses().slice(0, count));
        mark(device_);
        return {};
    }

    /// The gradient of Σ_t weight · loss[t], of the last forward. Balance losses add theirs, by `step`.
    Status backward(const Params& params, T weight, const steelyard::StepInfo& step, const Params& grads) {
        const index_t count = used_;
        const auto call = call_of(count, {}, step, steelyard::Mode::train);
        const auto dx = act_.dx.slice(0, count), branch = act_.branch.slice(0, count);
        const auto dqkv = act_.dqkv.slice(0, count), dlogits = act_.logits.slice(0, count);
        const auto head_in = act_.head_in.slice(0, count);

        cross_entropy_backward<T>(device_, targets_, weight, dlogits);
        linear_backward_weight<T>(device_, dlogits, head_in, grads.head);
        linear_backward_input<T>(device_, dlogits, params.head, branch);
        clear<T>(device_, dx);
        rms_norm_backward<T>(device_, act_.x.slice(0, count), params.norm, act_.inverse.slice(0, count), branch, dx,
                             grads.norm);
        for (index_t l = shape_.layers - 1; l >= 0; --l) {
            const auto& p = params.layers[static_cast<std::size_t>(l)];
            const auto& g = grads.layers[static_cast<std::size_t>(l)];
            const auto a = layer(l, count);
            Status status = block(l).backward(a.moe_in, p.moe.data, dx, branch, g.moe.data, moe_workspace_.span(),
                                              call, handed_on(l, count));
            if (!status) return status;
            rms_norm_backward<T>(device_, a.middle, p.moe_norm, a.moe_inverse, branch, dx, g.moe_norm);

            linear_backward_weight<T>(device_, dx, a.attended, g.out);
            linear_backward_input<T>(device_, dx, p.out, branch);
            attention_backward<T>(device_, a.qkv, a.probabilities, branch, act_.dscores, dqkv);
            rotary<T>(device_, dqkv, act_.rotary, T(-1));
            linear_backward_weight<T>(device_, dqkv, a.attention_in, g.qkv);
            linear_backward_input<T>(device_, dqkv, p.qkv, branch);
            rms_norm_backward<T>(device_, a.x, p.attention_norm, a.attention_inverse, branch, dx, g.attention_norm);
        }
        embedding_backward<T>(device_, tokens_, dx, grads.embedding);
        return {};
    }

    /// Until the device has come to the end of the last forward.
    [[nodiscard]] Status await() const { return await_mark(device_); }
    /// Before a forward with other values in `params` than at the last call.
    void take_params(const Params& params) {
        for (std::size_t l = 0; l < blocks_.size(); ++l) blocks_[l]->take_params(params.layers[l].moe.data);
    }
    /// Once after every optimizer step.
    Status end_step(const steelyard::StepInfo& step) {
        for (const auto& block : blocks_)
            if (Status s = block->end_step(step, moe_workspace_.span()); !s) return s;
        return {};
    }

    /// Of the last forward.
    [[nodiscard]] view<const T, 1> losses() const { return all_losses().slice(0, used_); }               // [T]
    /// Of the last forward, before its backward.
    [[nodiscard]] view<const T, 2, Space> probabilities() const { return act_.logits.slice(0, used_); }  // [T, V]

private:
    using Memory = typename Device::Memory;

    [[nodiscard]] BlockCall<Space> call_of(index_t count, view<const std::int32_t, 1> ids,
                                           const steelyard::StepInfo& step, steelyard::Mode mode) const {
        return {act_.offsets.slice(0, count / shape_.length + 1), ids, step, mode};
    }
    [[nodiscard]] LayerActivations<T, Space> layer(index_t l, index_t count) const {
        return act_.layers[static_cast<std::size_t>(l)].first(count / shape_.length, shape_.length);
    }
    [[nodiscard]] view<T, 2, Space> stream_after(index_t l, index_t count) const {
        return l + 1 < shape_.layers ? layer(l + 1, count).x : act_.x.slice(0, count);
    }
    [[nodiscard]] view<T, 1> all_losses() const {
        return {reinterpret_cast<T*>(losses_.data()), shape_.tokens()};
    }
    /// What the router of a layer hears from the layer before.
    [[nodiscard]] view<const T, 2, Space> prior(index_t l) {
        return l > 0 ? block(l - 1).logits_to_hand_on() : view<const T, 2, Space>{};
    }
    /// Gradients by logits go from layer to layer in two buffers that take turns.
    [[nodiscard]] HandedOn<T, Space> handed_on(index_t l, index_t count) {
        if (shape_.handed_on == 0) return {};
        HandedOn<T, Space> handed{.prior = prior(l)};
        if (l > 0) handed.dprior = act_.dlogits[l % 2].slice(0, count);
        if (l + 1 < shape_.layers) handed.dlogits = act_.dlogits[(l + 1) % 2].slice(0, count);
        return handed;
    }

    ModelShape shape_;
    Device device_;
    Blocks blocks_;
    Memory memory_, moe_workspace_;
    typename Device::HostMemory losses_;  // [T]
    Activations<T, Space> act_;
    view<const std::uint8_t, 1, Space> tokens_, targets_;  // [T]  of the last forward
    index_t used_ = 0;
};

}  // namespace pretrain
