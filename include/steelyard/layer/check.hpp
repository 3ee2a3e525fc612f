// What a layer checks at its boundary before it touches anything.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/layer/memory.hpp"
#include "steelyard/layer/stack.hpp"

namespace steelyard {

namespace detail {

inline Status refuse_number(std::string_view stage, std::string_view name, std::string expected, std::int64_t came) {
    return Status::refuse(Code::invalid_argument, stage, name, std::move(expected), std::to_string(came));
}

/// The bytes from a view's first to its last element.
template <class T, int Rank, class Space>
std::span<const std::byte> extent_of(const view<T, Rank, Space>& tensor) {
    if (tensor.size() == 0) return {};
    index_t last = 0;
    for (int r = 0; r < Rank; ++r) last += (tensor.extents[r] - 1) * tensor.strides[r];
    return {reinterpret_cast<const std::byte*>(tensor.data), static_cast<std::size_t>(last + 1) * sizeof(T)};
}

}  // namespace detail

/// Refuses a matrix that is written while another, read one shares memory with it. Columns of one wider matrix may
/// be given side by side.
template <class T, class Space>
Status check_apart(std::string_view stage, std::string_view written_name, const view<T, 2, Space>& written,
                   std::string_view read_name, const view<const std::remove_const_t<T>, 2, Space>& read) {
    const auto a = detail::extent_of(written), b = detail::extent_of(read);
    bool apart = a.empty() || b.empty() || a.data() + a.size() <= b.data() || b.data() + b.size() <= a.data();
    if (const index_t stride = written.strides[0]; !apart && stride > 0 && stride == read.strides[0]) {
        const index_t ahead = ((read.data - written.data) % stride + stride) % stride;  // columns from one to the other
        apart = ahead >= written.extents[1] && ahead + read.extents[1] <= stride;
    }
    if (apart) return {};
    return Status::refuse(Code::invalid_argument, stage, written_name, "memory apart from " + std::string(read_name),
                          "memory that overlaps it");
}

/// Sizes of a layer.
inline Status check_shape(std::string_view stage, const LayerShape& shape) {
    const auto at_least = [&](std::string_view name, index_t value, index_t least) {
        return value >= least ? Status{}
                              : detail::refuse_number(stage, name, "at least " + std::to_string(least), value);
    };
    if (Status s = at_least("shape.tokens", shape.tokens, 0); !s) return s;
    if (Status s = at_least("shape.width", shape.width, 1); !s) return s;
    if (Status s = at_least("shape.experts", shape.experts, 1); !s) return s;
    if (Status s = at_least("shape.sequences", shape.sequences, 1); !s) return s;
    if (Status s = at_least("shape.micro_steps", shape.micro_steps, 1); !s) return s;
    if (Status s = at_least("shape.ranks", shape.ranks, 1); !s) return s;
    constexpr index_t most = std::numeric_limits<std::int32_t>::max();
    if (shape.experts > most) return detail::refuse_number(stage, "shape.experts", "below 2^31", shape.experts);
    return {};
}

/// Sizes of a layer, its device and its balance. What its mixtures need they check themselves.
template <class Config>
Status check_config(const Config& config) {
    if (Status s = check_shape("layer.config", config.shape); !s) return s;
    if (Status s = config.device.check(); !s) return s;
    return config.balance.check(config.shape);
}

/// What a balance policy needs to know of the step that a call is part of: all its tokens, for a loss; which of its
/// micro-steps, to remember them.
struct StepNeeds {
    bool total_tokens, micro_steps;
};
template <class BalanceT>
inline constexpr StepNeeds step_needs{BalanceT::has_loss, BalanceT::remembers};

/// The call's token count, mask, packed sequences and place in the step.
template <class Space>
Status check_tokens(std::string_view stage, const LayerShape& shape, index_t count, const TokenInfo<Space>& tokens,
                    StepNeeds needs) {
    if (count > shape.tokens)
        return detail::refuse_number(stage, "x", "at most shape.tokens = " + std::to_string(shape.tokens) + " rows",
                                     count);
    std::int64_t valid = count;
    if (tokens.mask.present()) {
        if (Status s = check_view(stage, "mask", tokens.mask, count); !s) return s;
        valid = 0;
        if constexpr (std::is_same_v<Space, HostSpace>) {
            for (index_t t = 0; t < count; ++t) valid += tokens.mask[t] != 0;
        } else if (needs.total_tokens && tokens.mode == Mode::train && tokens.step.total_tokens == 0) {
            return detail::refuse_number(stage, "step.total_tokens",
                                         "the valid tokens of the whole step, which the host cannot count",
                                         tokens.step.total_tokens);
        }
    }
    if (tokens.sequences.present()) {
        const auto& offsets = tokens.sequences;
        const index_t sequences = offsets.extents[0] - 1;
        if (sequences < 1 || sequences > shape.sequences)
            return detail::refuse_number(
                stage, "sequences", "2 to shape.sequences + 1 = " + std::to_string(shape.sequences + 1) + " offsets",
                offsets.extents[0]);
        if (!offsets.contiguous_rows())
            return Status::refuse(Code::invalid_argument, stage, "sequences", "contiguous offsets", "a stride");
        if constexpr (std::is_same_v<Space, HostSpace>) {
            const auto refuse_offsets = [&](std::string came) {
                return Status::refuse(Code::invalid_argument, stage, "sequences",
                                      "ascending offsets from 0 to " + std::to_string(count), std::move(came));
            };
            if (offsets[0] != 0 || offsets[sequences] != count)
                return refuse_offsets("offsets from " + std::to_string(offsets[0]) + " to " +
                                      std::to_string(offsets[sequences]));
            for (index_t s = 0; s < sequences; ++s)
                if (offsets[s] > offsets[s + 1])
                    return refuse_offsets(std::to_string(offsets[s]) + " before " + std::to_string(offsets[s + 1]));
        }
    }
    const StepInfo& at = tokens.step;
    if (at.step < 0) return detail::refuse_number(stage, "step.step", "at least 0", at.step);
    if (at.micro_step < 0 || (needs.micro_steps && at.micro_step >= shape.micro_steps))
        return detail::refuse_number(stage, "step.micro_step",
                                     "below shape.micro_steps = " + std::to_string(shape.micro_steps), at.micro_step);
    if (at.token_offset < 0) return detail::refuse_number(stage, "step.token_offset", "at least 0", at.token_offset);
    if (!std::isfinite(at.grad_scale))
        return Status::refuse(Code::invalid_argument, stage, "step.grad_scale", "a finite number",
                              std::to_string(at.grad_scale));
    if (needs.total_tokens && tokens.mode == Mode::train && at.micro_step > 0 && at.total_tokens == 0)
        return detail::refuse_number(stage, "step.total_tokens",
                                     "the valid tokens of the whole step, which has several micro-steps",
                                     at.total_tokens);
    if (at.total_tokens != 0 && at.total_tokens < valid)
        return detail::refuse_number(stage, "step.total_tokens",
                                     "0, or at least this call's " + std::to_string(valid) + " valid tokens",
                                     at.total_tokens);
    return {};
}

/// A context that is in the phase which the stage needs.
inline Status check_call(std::string_view stage, const CallInfo& call, std::int64_t layout, CallInfo::Phase needed) {
    if (call.is(needed, layout)) return {};
    const bool written = call.magic == CallInfo::expected_magic && call.layout == layout;
    std::string came = "a context that no forward has written";
    if (call.magic == CallInfo::expected_magic && call.layout != layout) came = "the context of another layer";
    if (written && call.phase == CallInfo::Phase::spent) came = "a context that backward has used already";
    if (written && call.phase == CallInfo::Phase::evaluated) came = "the context of an evaluation";
    if (written && call.phase == CallInfo::Phase::counted) came = "a deferred forward that was not concluded";
    if (written && call.phase == CallInfo::Phase::ready) came = "a context that is concluded already";
    if (written && call.phase == CallInfo::Phase::none) came = "the context of a forward that was refused";
    return Status::refuse(
        Code::invalid_argument, stage, "context",
        needed == CallInfo::Phase::ready ? "the context of a training forward" : "the context of a deferred forward",
        std::move(came));
}

inline Status check_header(std::string_view stage, const StateHeader& found, const StateHeader& expected) {
    if (found == expected) return {};
    const auto text = [](const StateHeader& header) {
        if (header.magic != StateHeader::expected_magic) return std::string("bytes that init_state has not written");
        return "version " + std::to_string(header.version) + ", " + std::to_string(header.experts) + " experts, " +
               std::to_string(header.micro_steps) + " micro-steps, " + std::to_string(header.bytes) + " bytes, layer " +
               std::to_string(header.layer) + ", layout " + std::to_string(header.layout);
    };
    return Status::refuse(Code::bad_state, stage, "state", text(expected), text(found));
}

inline Status check_stack(std::string_view stage, const Stack& stack, index_t row, index_t words) {
    if (row < 0 || row >= stack.layers())
        return detail::refuse_number(stage, "row", "a row of the stack's " + std::to_string(stack.layers()), row);
    if (stack.words() < words)
        return detail::refuse_number(stage, "stack", "rows of at least " + std::to_string(words) + " words",
                                     stack.words());
    return {};
}

/// A stack whose rows are read must have been summed.
inline Status check_summed(std::string_view stage, const Stack& stack, index_t row, index_t words) {
    if (Status s = check_stack(stage, stack, row, words); !s) return s;
    if (!stack.summed())
        return Status::refuse(Code::invalid_argument, stage, "stack", "the sum of what was posted: begin, then end",
                              "a stack that was not summed");
    return {};
}

/// For scopes that draw over ranks. `valid_tokens` is below 0 where the host did not count.
inline Status check_ranks(std::string_view stage, const LayerShape& shape, index_t ranks, int rank,
                          std::int64_t valid_tokens, const view<const std::int64_t, 1>& tokens_of_rank) {
    if (ranks > shape.ranks)
        return detail::refuse_number(stage, "comm", "at most shape.ranks = " + std::to_string(shape.ranks) + " ranks",
                                     ranks);
    if (!tokens_of_rank.present()) return {};
    if (Status s = check_view(stage, "tokens_of_rank", tokens_of_rank, ranks); !s) return s;
    for (index_t r = 0; r < ranks; ++r)
        if (tokens_of_rank[r] < 0 || (r == rank && valid_tokens >= 0 && tokens_of_rank[r] != valid_tokens))
            return detail::refuse_number(stage, "tokens_of_rank[" + std::to_string(r) + "]",
                                         r == rank && valid_tokens >= 0
                                             ? "this call's " + std::to_string(valid_tokens) + " valid tokens"
                                             : "at least 0",
                                         tokens_of_rank[r]);
    return {};
}

}  // namespace steelyard
