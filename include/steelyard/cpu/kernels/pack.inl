// The right operand of a product: panels that lie ready, or columns of matrices that are packed into panels.

/// Words of depth that are packed or multiplied at once: a panel of them and the rows beside it stay in the
/// second-level cache. Whole groups of int8.
template <class T>
inline constexpr index_t depth_block = 8192 / static_cast<index_t>(sizeof(typename Format<T>::word));
/// The same where panels are packed on the way: fewer steps of more columns, so that rows of a matrix are read in
/// pieces that are worth a visit.
template <class T>
inline constexpr index_t packed_depth_block = depth_block<T> / 4;

namespace part {

/// to[p][j] = from[p][j] for one vector of columns; missing columns 0. Rows of `to` are a panel's.
template <class T>
void pack_rows(const T* from, index_t stride, index_t steps, index_t columns, T* to) {
    constexpr index_t lanes = Simd<T>::lanes;
    if (columns >= lanes) {
        for (index_t p = 0; p < steps; ++p) store(to + p * panel_width<T>, load(from + p * stride));
    } else {
        for (index_t p = 0; p < steps; ++p)
            store(to + p * panel_width<T>, load_some<T>(from + p * stride, std::max<index_t>(0, columns)));
    }
}

/// to[p][j] = from[j][p] for one vector of columns; missing columns 0.
template <class T>
void pack_columns(const T* from, index_t stride, index_t steps, index_t columns, T* to) {
    constexpr index_t lanes = Simd<T>::lanes;
    for (index_t p = 0; p < steps; p += lanes) {
        const index_t depth = std::min(lanes, steps - p);
        typename Simd<T>::vec block[lanes];
        if (columns >= lanes && depth == lanes) {
#pragma GCC unroll 16
            for (index_t j = 0; j < lanes; ++j) block[j] = load(from + j * stride + p);
        } else {
            for (index_t j = 0; j < lanes; ++j)
                block[j] = j < columns ? load_some<T>(from + j * stride + p, depth) : typename Simd<T>::vec{};
        }
        transpose<T>(block);
        for (index_t i = 0; i < depth; ++i) store(to + (p + i) * panel_width<T>, block[i]);
    }
}

}  // namespace part

/// The right operand [depth, columns] of a product. A panel takes its two vectors from neighbouring columns of one
/// matrix, or, where there are two matrices, one from each: so that a gate and its up meet in one tile. Panels of
/// formats other than the layer's own are always stored.
template <class T>
struct Right {
    using word = typename Format<T>::word;
    const word* stored = nullptr;   // panels [panels][words][panel_width], or null: packed from `from` when needed
    const float* scales = nullptr;  // of stored panels of int8: [panels][groups][panel_width]
    index_t depth = 0;              // elements
    index_t columns = 0;            // of each matrix
    const T* from[2] = {};          // element (p, j) at from[p * stride + j], or at from[j * stride + p] if transposed
    index_t stride = 0;
    bool paired = false, transposed = false;

    /// Columns of a matrix in one panel.
    [[nodiscard]] index_t panel_columns() const { return paired ? panel_width<T> / panel_vectors : panel_width<T>; }
    [[nodiscard]] index_t panels() const { return (columns + panel_columns() - 1) / panel_columns(); }
    [[nodiscard]] index_t words() const { return words_of<T>(depth); }
    [[nodiscard]] index_t groups() const { return (depth + int8_group - 1) / int8_group; }
    [[nodiscard]] bool out_of_cache() const {
        return stored != nullptr && panels() * words() * panel_width<T> * index_t{sizeof(word)} > panels_in_cache_bytes;
    }
    /// Panels that `rows` rows take side by side, where there are as many. Memory is read as one run of addresses, or
    /// as four.
    [[nodiscard]] index_t at_once(index_t rows) const {
        const bool runs = rows == 1 && !Format<T>::grouped && best_fetches().side_by_side;
        if (out_of_cache() && !runs) return 1;
        return std::min<index_t>(panels_at_once(rows), stored != nullptr ? 4 : 2);
    }
    /// Whether `rows` rows, a tile, are told ahead of their panel.
    [[nodiscard]] bool told_ahead(index_t rows) const {
        const Fetches& best = best_fetches();
        if (rows > (best.lone_tiles_ahead ? register_rows : few_rows)) return false;
        return rows >= (Format<T>::grouped ? best.int8_run_ahead : best.run_ahead) && out_of_cache();
    }

    /// Packs steps [begin, end) of `count` panels from `panel` on, side by side.
    void pack(index_t panel, index_t count, index_t begin, index_t end, T* to) const {
        constexpr index_t lanes = Simd<T>::lanes;
        for (index_t q = panel; q < panel + count; ++q, to += (end - begin) * panel_width<T>)
            for (index_t v = 0; v < panel_vectors; ++v) {
                const T* const matrix = paired ? from[v] : from[0];
                const index_t j = q * panel_columns() + (paired ? 0 : v * lanes);
                if (transposed)
                    part::pack_columns(matrix + j * stride + begin, stride, end - begin, columns - j, to + v * lanes);
                else
                    part::pack_rows(matrix + begin * stride + j, stride, end - begin, columns - j, to + v * lanes);
            }
    }
};

/// Brings the matrices' part under a panel nearer, steps [begin, end) of it: by two tiles, a vector of columns each.
template <class T>
[[nodiscard]] Ahead ahead_of_packing(const Right<T>& right, index_t panel, index_t begin, index_t end) {
    constexpr index_t lanes = Simd<T>::lanes, bytes = sizeof(T);
    Ahead ahead{.from = {}, .step = right.stride * bytes, .first_two = true};
    if (right.transposed) ahead.step = lanes * right.stride * bytes / std::max<index_t>(1, end - begin);
    for (index_t v = 0; v < panel_vectors; ++v) {
        const index_t j = panel * right.panel_columns() + (right.paired ? 0 : v * lanes);
        if (j >= right.columns) break;
        const T* const matrix = right.paired ? right.from[v] : right.from[0];
        ahead.from[v] = right.transposed ? matrix + j * right.stride + begin : matrix + begin * right.stride + j;
    }
    return ahead;
}

/// Elements of the room that for_panels packs into.
template <class T>
inline constexpr index_t pack_room = 2 * depth_block<T>* panel_width<T>;

/// Calls body(panel, count, b, b_panel, ahead) for panels [first, last) of words [begin, end) of the depth, in turn and
/// as many at once as `rows` rows want: where they lie, how far apart, and what will be needed after them. Panels that
/// are not stored are packed into `room`, so at most depth_block words of them at once.
template <class T, class Body>
void for_panels(const Right<T>& right, index_t rows, index_t first, index_t last, index_t begin, index_t end,
                typename Format<T>::word* room, Body&& body) {
    using word = typename Format<T>::word;
    const index_t wanted = right.at_once(rows), steps = end - begin;
    if (right.stored != nullptr) {
        const index_t apart = right.words() * panel_width<T>;
        const bool told = right.told_ahead(rows);
        for (index_t q = first; q < last;) {
            const index_t count = last - q >= wanted ? wanted : 1;
            const word* const b = right.stored + q * apart + begin * panel_width<T>;
            body(q, count, b, apart,
                 told || rows <= few_rows
                     ? Ahead{.panel = told}
                     : Ahead::run(b + count * apart, count * steps * panel_width<T> * index_t{sizeof(word)}, rows,
                                  steps));
            q += count;
        }
        return;
    }
    if constexpr (std::is_same_v<word, T>) {
        // A block of panels, so that neighbouring columns of the matrix are read together. Its successor is brought
        // nearer meanwhile.
        const index_t apart = steps * panel_width<T>;
        const index_t block = std::max(wanted, pack_room<T> / 2 / std::max<index_t>(1, apart) / wanted * wanted);
        for (index_t q0 = first; q0 < last; q0 += block) {
            const index_t q1 = std::min(last, q0 + block);
            right.pack(q0, q1 - q0, begin, end, room);
            for (index_t q = q0; q < q1;) {
                const index_t count = q1 - q >= wanted ? wanted : 1;
                const index_t next = q + block;
                body(q, count, room + (q - q0) * apart, apart,
                     next < last ? ahead_of_packing(right, next, begin, end) : Ahead{});
                q += count;
            }
        }
    }
}
