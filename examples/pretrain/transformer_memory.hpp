// What the transformer keeps in memory: parameters, and what forward leaves for backward.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "moe_block.hpp"
#include "steelyard/core/layout.hpp"

namespace pretrain {

/// The sizes of a model and of one micro-batch.
struct ModelShape {
    index_t vocabulary = 256;  ///< V: bytes
    index_t width = 96;        ///< d
    index_t layers = 3;
    index_t heads = 4;      ///< H: the head width d / H is even
    index_t sequences = 2;  ///< S: most sequences of one call
    index_t length = 128;   ///< L: bytes of a sequence
    index_t handed_on = 0;  ///< E where routers hear the logits of the layer before; else 0

    [[nodiscard]] index_t tokens() const { return sequences * length; }
    [[nodiscard]] index_t half_head() const { return width / heads / 2; }
};

template <class T, class Space = steelyard::HostSpace>
struct LayerParams {
    view<T, 1, Space> attention_norm;  // [d]
    view<T, 2, Space> qkv;             // [3d, d]  queries, keys, values
    view<T, 2, Space> out;             // [d, d]
    view<T, 1, Space> moe_norm;        // [d]
    view<std::byte, 1, Space> moe;     // the library's bundle

    template <class Field>
    void fields(Field&& field, const ModelShape& m, index_t moe_bytes) {
        field("attention_norm", attention_norm, m.width);
        field("qkv", qkv, 3 * m.width, m.width);
        field("out", out, m.width, m.width);
        field("moe_norm", moe_norm, m.width);
        field("moe", moe, moe_bytes);
    }
};

/// All parameters in one block of memory, so that optimizer, sums over ranks and checkpoints see one array.
template <class T, class Space = steelyard::HostSpace>
struct ModelParams {
    view<T, 2, Space> embedding;  // [V, d]
    std::vector<LayerParams<T, Space>> layers;
    view<T, 1, Space> norm;  // [d]
    view<T, 2, Space> head;  // [V, d]  not tied to the embedding

    template <class Field>
    void fields(Field&& field, const ModelShape& m, index_t moe_bytes) {
        layers.resize(static_cast<std::size_t>(m.layers));
        field("embedding", embedding, m.vocabulary, m.width);
        for (std::size_t l = 0; l < layers.size(); ++l) field.group(std::to_string(l), layers[l], m, moe_bytes);
        field("norm", norm, m.width);
        field("head", head, m.vocabulary, m.width);
    }
};

template <class T, class Space = steelyard::HostSpace>
struct LayerActivations {
    view<T, 2, Space> x;                  // [T, d]   residual stream at the layer's start
    view<T, 2, Space> attention_in;       // [T, d]   its norm
    view<T, 1, Space> attention_inverse;  // [T]
    view<T, 2, Space> qkv;                // [T, 3d]  turned by rotary positions
    view<T, 4, Space> probabilities;      // [S, H, L, L]
    view<T, 2, Space> attended;           // [T, d]
    view<T, 2, Space> middle;             // [T, d]   residual stream after attention
    view<T, 2, Space> moe_in;             // [T, d]   its norm
    view<T, 1, Space> moe_inverse;        // [T]

    template <class Field>
    void fields(Field&& field, const ModelShape& m) {
        const index_t tokens = m.tokens(), d = m.width;
        field("x", x, tokens, d);
        field("attention_in", attention_in, tokens, d);
        field("attention_inverse", attention_inverse, tokens);
        field("qkv", qkv, tokens, 3 * d);
        field("probabilities", probabilities, m.sequences, m.heads, m.length, m.length);
        field("attended", attended, tokens, d);
        field("middle", middle, tokens, d);
        field("moe_in", moe_in, tokens, d);
        field("moe_inverse", moe_inverse, tokens);
    }

    /// What the first `s` sequences of length L use.
    [[nodiscard]] LayerActivations first(index_t s, index_t length) const {
        const index_t t = s * length;
        return {x.slice(0, t),        attention_in.slice(0, t), attention_inverse.slice(0, t),
                qkv.slice(0, t),      probabilities.slice(0, s), attended.slice(0, t),
                middle.slice(0, t),   moe_in.slice(0, t),       moe_inverse.slice(0, t)};
    }
};

/// What forward leaves for backward, and backward's own workspace.
template <class T, class Space = steelyard::HostSpace>
struct Activations {
    std::vector<LayerActivations<T, Space>> layers;
    view<T, 2, Space> x;        // [T, d]  residual stream at the end
    view<T, 2, Space> head_in;  // [T, d]  its norm
    view<T, 1, Space> inverse;  // [T]
    view<T, 2, Space> logits;   // [T, V]  then probabilities, then their gradient
    view<T, 3, Space> rotary;   // [L, 2, half head]  constant
    view<T, 2, Space> dx;       // [T, d]  gradient of the residual stream
    view<T, 2, Space> branch;   // [T, d]  a branch's output, or the gradient of its input
    view<T, 2, Space> dqkv;     // [T, 3d]
    view<T, 3, Space> dscores;  // [S·H, queries that are worked on together, L]
    view<T, 2, Space> dlogits[2];  // [T, E]  gradients by the logits that one layer's router hands on, in turn
    view<index_t, 1, Space> offsets;               // [S + 1]  where sequences begin; constant
    view<std::uint8_t, 1, Space> tokens, targets;  // [T]  absent where the device reaches those that are given

    template <class Field>
    void fields(Field&& field, const ModelShape& m, index_t queries) {
        const index_t tokens_of_call = m.tokens(), d = m.width;
        const index_t brought = std::is_same_v<Space, steelyard::HostSpace> ? 0 : tokens_of_call;
        layers.resize(static_cast<std::size_t>(m.layers));
        for (std::size_t l = 0; l < layers.size(); ++l) field.group(std::to_string(l), layers[l], m);
        field("x", x, tokens_of_call, d);
        field("head_in", head_in, tokens_of_call, d);
        field("inverse", inverse, tokens_of_call);
        field("logits", logits, tokens_of_call, m.vocabulary);
        field("rotary", rotary, m.length, index_t{2}, m.half_head());
        field("dx", dx, tokens_of_call, d);
        field("branch", branch, tokens_of_call, d);
        field("dqkv", dqkv, tokens_of_call, 3 * d);
        field("dscores", dscores, m.sequences * m.heads, queries, m.length);
        for (auto& gradient : dlogits) field("dlogits", gradient, m.handed_on > 0 ? tokens_of_call : 0, m.handed_on);
        field("offsets", offsets, m.sequences + 1);
        field("tokens", tokens, brought);
        field("targets", targets, brought);
    }
};

}  // namespace pretrain
