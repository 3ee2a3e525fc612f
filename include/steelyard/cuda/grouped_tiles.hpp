// Which tile of which expert a block computes: shared by the host, which tests it, and by kernels.
#pragma once

#include <cstdint>

#include "steelyard/core/view.hpp"

namespace steelyard::cuda {

constexpr int tiles_of(index_t items, index_t tile) { return static_cast<int>((items + tile - 1) / tile); }

/// Divides numbers from 0 to 2^31 - 1 by one that is known beforehand, at least 1: a multiplication and a shift.
/// Division itself is some twenty instructions on a GPU, more than what a loader has to do for a row beside it.
/// (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.)
struct Divisor {
    std::uint32_t by = 1, factor = 0, shift = 0;

    constexpr Divisor() = default;
    explicit constexpr Divisor(int divisor) : by(static_cast<std::uint32_t>(divisor)) {
        std::uint32_t bits = 0;
        while ((std::uint64_t{1} << bits) < by) ++bits;
        if (by == 1) return;
        shift = bits - 1;
        factor = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + bits)) + by - 1) / by);
    }
    [[nodiscard]] constexpr int quotient(int number) const {
        if (by == 1) return number;
        return static_cast<int>((static_cast<std::uint64_t>(static_cast<std::uint32_t>(number)) * factor >> 32) >>
                                shift);
    }
    [[nodiscard]] constexpr int remainder(int number) const { return number - quotient(number) * static_cast<int>(by); }
};

/// A tile of one expert's product, in tiles.
struct TilePlace {
    int m = 0, n = 0;
};

/// Tile `index` of an expert's m_tiles x n_tiles. Tiles that run at the same time lie close together, so that what they
/// read is read from the L2 cache: up to `together` tiles of rows take turns before the next columns come.
constexpr TilePlace place_of(int index, int m_tiles, int n_tiles) {
    constexpr int together = 16;
    const int group = index / (together * n_tiles), first = group * together;
    const int height = m_tiles - first < together ? m_tiles - first : together;
    const int within = index - group * together * n_tiles;
    return {first + within % height, within / height};
}

/// Walks over the tiles of all experts, an ascending number at a time. `first` [E + 1] are the experts' first tiles.
struct TileWalk {
    const int* first = nullptr;
    int expert = 0;

    /// Moves on to the expert of tile `index`, which is below first[E] and not below that of the call before.
    constexpr void seek(int index) {
        while (first[expert + 1] <= index) ++expert;
    }
};

/// Tiles of an expert that has `rows` rows. Where rows are summed over, the number of tiles is that of the result.
struct TileCount {
    int m_tile = 128;
    int n_tiles = 1;
    int m_tiles = 0;  ///< of a result that rows are summed into; 0: rows are the result's

    [[nodiscard]] constexpr int m(index_t rows) const {
        if (m_tiles > 0) return rows > 0 ? m_tiles : 0;
        return tiles_of(rows, m_tile);
    }
    [[nodiscard]] constexpr int operator()(index_t rows) const { return m(rows) * n_tiles; }
};

}  // namespace steelyard::cuda
