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
    bool shares_b = false;  ///< with the other block of its pair: the same columns
};

/// Tile `index` of an expert's m_tiles x n_tiles. Tiles that run at the same time lie close together, so that what they
/// read is read from the L2 cache: up to `together` tiles of rows take turns before the next columns come.
constexpr TilePlace place_of(int index, int m_tiles, int n_tiles, int together = 16) {
    const int group = index / (together * n_tiles), first = group * together;
    const int height = m_tiles - first < together ? m_tiles - first : together;
    const int within = index - group * together * n_tiles;
    return {first + within % height, within / height};
}

/// Pairs of tiles, for blocks that work in pairs: two tiles of rows of the same columns; and where the number of tiles
/// of rows is odd, two tiles of columns of the last.
constexpr int pairs_of(int m_tiles, int n_tiles) { return m_tiles / 2 * n_tiles + m_tiles % 2 * ((n_tiles + 1) / 2); }
/// Tile 0 or 1 of pair `index`. Where n_tiles is odd too, one pair has but one tile: the other is n_tiles, which is
/// none.
constexpr TilePlace place_in_pair(int index, int which, int m_tiles, int n_tiles) {
    const int whole = m_tiles / 2 * n_tiles;
    if (index >= whole) return {m_tiles - 1, 2 * (index - whole) + which, false};
    const TilePlace pair = place_of(index, m_tiles / 2, n_tiles, 8);
    return {2 * pair.m + which, pair.n, true};
}

/// Walks over the tiles of all experts, an ascending number at a time. `first` [E + 1] are the experts' first tiles.
struct TileWalk {
    const int* first;
    int experts;
    int expert = 0;

    constexpr TileWalk(const int* first_tiles, int of_experts) : first(first_tiles), experts(of_experts) {}

    /// Moves on to the expert of tile `index`, which is below first[E] and not below that of the call before. In steps
    /// that double: most often it is the next one, but few tokens leave most experts without a tile.
    constexpr void seek(int index) {
        if (first[expert + 1] > index) return;
        ++expert;
        int step = 1;
        for (; expert + step <= experts && first[expert + step] <= index; step *= 2) expert += step;
        for (step /= 2; step > 0; step /= 2)
            if (expert + step <= experts && first[expert + step] <= index) expert += step;
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
    [[nodiscard]] constexpr int pairs(index_t rows) const { return pairs_of(m(rows), n_tiles); }
};

}  // namespace steelyard::cuda
