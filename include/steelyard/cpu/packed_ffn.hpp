// Packed weights of feed-forward experts: the panels of the products, made once and read by every forward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "steelyard/core/layout.hpp"
#include "steelyard/core/status.hpp"
#include "steelyard/cpu/kernels.hpp"

namespace steelyard::cpu {

/// What a packed block is: its first bytes.
struct PackedHeader {
    std::int64_t magic = 0;
    std::int64_t format = 0;   // PackedFormat
    std::int64_t element = 0;  // bytes of the layer's element type
    std::int64_t panel = 0;    // columns of a panel
    std::int64_t experts = 0, width = 0, hidden = 0, gated = 0, backward = 0;

    static constexpr std::int64_t expected_magic = 0x53544c595041434b;

    [[nodiscard]] bool found() const { return magic == expected_magic; }
    [[nodiscard]] PackedFormat as_format() const { return static_cast<PackedFormat>(format); }
    /// Elements of a weight in one word.
    [[nodiscard]] index_t per_word() const { return format == 0 ? 1 : format == 1 ? 2 : 4; }
    [[nodiscard]] index_t word_bytes() const { return format == 0 ? element : 4; }

    /// Panels of an operand [depth, columns], of one matrix or of two side by side.
    [[nodiscard]] index_t panels(index_t columns, bool paired) const {
        const index_t each = paired ? panel / 2 : panel;
        return (columns + each - 1) / each;
    }
    /// Words of depth, and scale groups of it.
    [[nodiscard]] index_t steps(index_t depth) const { return (depth + per_word() - 1) / per_word(); }
    [[nodiscard]] index_t groups(index_t depth) const {
        return format == 2 ? (depth + int8_group - 1) / int8_group : 0;
    }

    /// Bytes of all panels of an operand, then of their scales.
    [[nodiscard]] index_t operand_bytes(index_t depth, index_t columns, bool paired) const {
        return panels(columns, paired) * panel *
               (steps(depth) * word_bytes() + groups(depth) * static_cast<index_t>(sizeof(float)));
    }

    friend bool operator==(const PackedHeader&, const PackedHeader&) = default;
};

/// The panels of E experts, as `Right` (kernels/pack.inl) reads them.
struct PackedFfn {
    view<PackedHeader, 1> header;  // [1]
    view<std::byte, 2> hidden;     // [E, bytes]  gate and up side by side, or up: [d, h]
    view<std::byte, 2> down;       // [E, bytes]  [h, d]
    // For backward, where the block has them: absent otherwise.
    view<std::byte, 2> down_back;  // [E, bytes]  [d, h]
    view<std::byte, 2> up_back;    // [E, bytes]  [h, d]
    view<std::byte, 2> gate_back;  // [E, bytes]  [h, d]

    template <class Field>
    void fields(Field&& field, const PackedHeader& of) {
        field("header", header, index_t{1});
        field("hidden", hidden, of.experts, of.operand_bytes(of.width, of.hidden, of.gated != 0));
        field("down", down, of.experts, of.operand_bytes(of.hidden, of.width, false));
        if (of.backward == 0) return;
        field("down_back", down_back, of.experts, of.operand_bytes(of.width, of.hidden, false));
        field("up_back", up_back, of.experts, of.operand_bytes(of.hidden, of.width, false));
        if (of.gated != 0) field("gate_back", gate_back, of.experts, of.operand_bytes(of.hidden, of.width, false));
    }
};

/// The panels of a packed block that was checked; absent where it is.
inline PackedFfn packed_ffn(view<const std::byte, 1> packed) {
    if (!packed.present()) return {};
    // The views are never written through.
    std::byte* const block = const_cast<std::byte*>(packed.data);
    return place<PackedFfn>(block, *reinterpret_cast<const PackedHeader*>(block));
}

/// Refuses a block that was not packed for what `expected` says, in whatever format.
inline Status check_packed(std::string_view stage, std::string_view name, view<const std::byte, 1> packed,
                           PackedHeader expected) {
    const auto refuse = [&](std::string wanted, std::string came) {
        return Status::refuse(Code::invalid_argument, stage, name, std::move(wanted), std::move(came));
    };
    if (packed.extents[0] < static_cast<index_t>(sizeof(PackedHeader)) || !is_aligned(packed.data))
        return refuse("a block that pack() wrote, aligned to " + std::to_string(layout_alignment) + " bytes",
                      packed.extents[0] < static_cast<index_t>(sizeof(PackedHeader))
                          ? std::to_string(packed.extents[0]) + " bytes"
                          : "a misaligned pointer");
    const auto& found = *reinterpret_cast<const PackedHeader*>(packed.data);
    if (!found.found()) return refuse("a block that pack() wrote", "other bytes");
    if (found.format < 0 || found.format > static_cast<std::int64_t>(PackedFormat::int8))
        return refuse("a format of PackedFormat", std::to_string(found.format));
    const auto text = [](const PackedHeader& of) {
        return std::to_string(of.experts) + " experts of width " + std::to_string(of.width) + ", hidden " +
               std::to_string(of.hidden) + (of.gated ? ", gated" : ", not gated") + ", elements of " +
               std::to_string(of.element) + " bytes, panels of " + std::to_string(of.panel) + " columns";
    };
    expected.format = found.format;
    expected.backward = found.backward;
    if (!(found == expected)) return refuse(text(expected), text(found));
    const index_t bytes = bytes_of<PackedFfn>(found);
    if (packed.extents[0] < bytes)
        return refuse("at least " + std::to_string(bytes) + " bytes", std::to_string(packed.extents[0]));
    return {};
}

}  // namespace steelyard::cpu
