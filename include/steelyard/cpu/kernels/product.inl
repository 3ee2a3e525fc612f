// Matrix products of one thread, with one order of addition whatever the sizes of the blocks.

/// c (= or +=) a b: an element is one chain of multiply-adds by ascending depth, starting from 0 or from what c held.
template <class T>
struct Product {
    using F = Format<T>;
    index_t rows = 0;
    Operand<T> a = {};  // row r, word p at words[r * stride + p * a_step]
    index_t a_step = 1;
    Right<T> b = {};               // [depth, columns]
    typename F::sum* c = nullptr;  // [rows, columns]
    index_t c_row = 0;
    bool add = false;
    bool past_caches = false;          // c is too much to be found in a cache again
    typename F::word* room = nullptr;  // pack_room words, where b is not stored
};

/// The tile of rows of `a`, beginning `word` words in, with panel `q` of `b`, beginning at word `depth` of it.
template <class T>
[[nodiscard]] TileCall<T> tile_of(const Operand<T>& a, index_t word, const Right<T>& right, index_t q, index_t depth,
                                  const typename Format<T>::word* b, index_t b_panel, index_t steps) {
    TileCall<T> call;
    call.steps = steps;
    call.a = a.words + word;
    call.a_row = a.stride;
    call.b = b;
    call.b_panel = b_panel;
    if constexpr (Format<T>::grouped) {
        constexpr index_t group = Format<T>::group_steps;
        call.groups = a.groups;
        call.a_scale = a.scale + word / group;
        call.a_begin = a.beginning + word / group;
        call.b_groups = right.groups() * panel_width<T>;
        call.b_scale = right.scales + q * call.b_groups + depth / group * panel_width<T>;
    }
    return call;
}

/// The tiles of panels of which c has only the first `columns`: columns beyond them would be written too, so that they
/// go by way of a block that has them all.
template <class T>
void partial_tiles(index_t rows, index_t panels, index_t columns, TileCall<T> call, const Ahead& ahead) {
    using sum_t = typename Format<T>::sum;
    sum_t block[register_rows * panel_width<T>] = {};  // room for as many panels as few rows take at once
    const auto bytes = static_cast<std::size_t>(columns) * sizeof(sum_t);
    for (index_t r = 0; r < rows; r += register_rows) {
        const index_t high = std::min<index_t>(register_rows, rows - r);
        TileCall<T> whole = call;
        whole.c = block;
        whole.past_caches = false;
        whole.c_row = panels * panel_width<T>;
        if (call.add)
            for (index_t i = 0; i < high; ++i) std::memcpy(block + i * whole.c_row, call.c + i * call.c_row, bytes);
        tiles(high, panels, whole, ahead);
        for (index_t i = 0; i < high; ++i) std::memcpy(call.c + i * call.c_row, block + i * whole.c_row, bytes);
        call.skip(high);
    }
}

/// The product over words [begin, end) of b's depth, which `a` begins at, and over its panels [first, last).
template <class T>
void multiply(const Product<T>& product, index_t first, index_t last, index_t begin, index_t end) {
    constexpr index_t width = panel_width<T>;
    const index_t columns = product.b.columns;
    const index_t block_depth = product.b.stored != nullptr ? depth_block<T> : packed_depth_block<T>;
    const bool stream = !Format<T>::grouped && product.past_caches && !product.add && end - begin <= block_depth &&
                        part::streams(product.c, product.c_row);
    for (index_t p0 = begin; p0 == begin || p0 < end; p0 += block_depth) {
        const index_t p1 = std::min(end, p0 + block_depth);
        for_panels(product.b, product.rows, first, last, p0, p1, product.room,
                   [&](index_t q, index_t count, const auto* b, index_t apart, const Ahead& ahead) {
                       const index_t j0 = q * width, here = std::min(columns - j0, count * width);
                       auto call =
                           tile_of(product.a, (p0 - begin) * product.a_step, product.b, q, p0, b, apart, p1 - p0);
                       call.a_step = product.a_step;
                       call.c = product.c + j0;
                       call.c_row = product.c_row;
                       call.add = product.add || p0 > begin;
                       call.past_caches = stream;
                       if (here == count * width)
                           tiles(product.rows, count, call, ahead);
                       else
                           partial_tiles(product.rows, count, here, call, ahead);
                   });
    }
    if (stream) part::end_stream();
}

template <class T>
void multiply(const Product<T>& product) {
    multiply(product, index_t{0}, product.b.panels(), index_t{0}, product.b.words());
}

/// Panels whose sums are taken together. They are computed in `parts`, of which this is number `part`.
struct PanelGroup {
    index_t panel = 0, count = 0, parts = 1, part = 0;
};

/// a times panels [first, last) of b, a few panels at a time, whose sums [rows, columns of these panels] are used up
/// while they are in a cache:
///
///     start(panel, count, sums, n)   writes what they begin with, or nothing where that is 0. Whether it wrote.
///     before(group)                  what `tiles` calls ahead of each tile of the last block of the depth
///     finish(panel, count, sums, n)  takes them; n apart from row to row
///
/// `side_by_side`: as many panels are taken together where the depth is one block, so that finish has longer pieces of
/// rows. `sums` has room for max(rows, 8) rows of their columns.
template <class T, class Start, class Before, class Finish>
void multiply_panels(const Operand<T>& a, index_t rows, const Right<T>& b, index_t first, index_t last,
                     index_t side_by_side, typename Format<T>::sum* sums, typename Format<T>::word* room, Start&& start,
                     Before&& before, Finish&& finish) {
    const index_t depth = b.words();
    // Where the depth is cut, sums of several panels wait side by side for the next block of it.
    const bool whole = depth <= depth_block<T>;
    const index_t at_once = b.at_once(rows), together = whole ? last - first : at_once;
    const index_t side = whole && at_once == 1 ? std::min(side_by_side, last - first) : 1;
    for (index_t q0 = first; q0 < last; q0 += together)
        for (index_t p0 = 0; p0 == 0 || p0 < depth; p0 += depth_block<T>) {
            const index_t p1 = std::min(depth, p0 + depth_block<T>);
            for_panels(b, rows, q0, std::min(last, q0 + together), p0, p1, room,
                       [&](index_t q, index_t count, const auto* panels, index_t apart, const Ahead& ahead) {
                           const index_t part = (q - first) % side, wide = std::max(side, count);
                           const PanelGroup group{q - part, std::min(wide, last - (q - part)), side, part};
                           auto* const all = sums + (whole ? 0 : (q - q0) * rows * panel_width<T>);
                           auto* const here = all + part * panel_width<T>;
                           auto call = tile_of(a, p0, b, q, p0, panels, apart, p1 - p0);
                           call.c = here;
                           call.c_row = wide * panel_width<T>;
                           call.add = p0 > 0 || start(q, count, here, call.c_row);
                           if (p1 < depth) return tiles(rows, count, call, ahead);
                           tiles(rows, count, call, ahead, before(group));
                           if (part + count == group.count) finish(group.panel, group.count, all, call.c_row);
                       });
        }
}

/// out (= or +=) left^T right, over rows in order: the gradient of a weight. `right` comes in panels.
template <class T>
struct OuterProduct {
    index_t rows = 0;         // what is summed over
    const T* left = nullptr;  // [rows, m]
    index_t left_row = 0, m = 0;
    const T* right = nullptr;  // panels [panels][rows][panel_width] of n columns
    index_t n = 0;
    T* out = nullptr;  // [m, n]
    index_t out_row = 0;
    bool add = true;
    bool past_caches = false;  // out is too much to be found in a cache again
    T* slab = nullptr;         // [rows, slab_width]
};

/// One row of a matrix into its place in the panels: to[q * apart + j] = from[q * panel_width + j], missing columns 0.
template <class T>
void spread_row(const T* from, index_t columns, T* to, index_t apart) {
    constexpr index_t width = panel_width<T>, lanes = Simd<T>::lanes;
    index_t j = 0;
    for (; j + width <= columns; j += width, to += apart)
        for (index_t v = 0; v < width; v += lanes) store(to + v, load(from + j + v));
    if (j == columns) return;
    for (index_t v = 0; v < width; v += lanes)
        store(to + v, load_some<T>(from + j + v, std::clamp<index_t>(columns - j - v, 0, lanes)));
}

/// Elements of a row of the slab: the columns of `left` that one tile takes, filled up to whole vectors.
template <class T>
inline constexpr index_t slab_width = (register_rows + Simd<T>::lanes - 1) / Simd<T>::lanes* Simd<T>::lanes;

namespace part {

/// slab[p][i] = left[p][i] for `columns` columns of `left`, of which `readable` may be read.
template <class T>
void fill_slab(const T* left, index_t stride, index_t rows, index_t columns, index_t readable, T* slab) {
    constexpr index_t lanes = Simd<T>::lanes, width = slab_width<T>;
    for (index_t p = 0; p < rows; ++p, left += stride, slab += width) {
        if (readable >= width)
            for (index_t i = 0; i < width; i += lanes) store(slab + i, load(left + i));
        else
            for (index_t i = 0; i < columns; ++i) slab[i] = left[i];
    }
}

}  // namespace part

template <class T>
void multiply(const OuterProduct<T>& product) {
    constexpr index_t width = panel_width<T>, high = register_rows;
    const index_t rows = product.rows, m = product.m;
    const bool stream = !product.add && product.past_caches && part::streams(product.out, Simd<T>::lanes) &&
                        part::streams(product.out + product.out_row, Simd<T>::lanes);
    for (index_t i = 0; i < m; i += high) {
        const index_t here_rows = std::min(high, m - i);
        part::fill_slab(product.left + i, product.left_row, rows, here_rows, m - i, product.slab);
        for (index_t j = 0; j < product.n; j += width) {
            T* const c = product.out + i * product.out_row + j;
            // The next tile of the result: it has this one's time to come from memory.
            if (!stream && j + width < product.n)
                prefetch_sums(c + width, product.out_row, here_rows, panel_vectors);
            else if (!stream && i + high < m)
                prefetch_sums(product.out + (i + high) * product.out_row, product.out_row, std::min(high, m - i - high),
                              panel_vectors);
            // The next slab: the first two tiles bring nearer where its vectors begin and end.
            Ahead ahead{.from = {}, .step = product.left_row * index_t{sizeof(T)}, .first_two = true};
            if (i + high + slab_width<T> <= m && j < 2 * width)
                ahead.from[0] = product.left + i + high + (j == 0 ? 0 : slab_width<T> - 1);
            TileCall<T> call;
            call.steps = rows;
            call.a = product.slab, call.a_row = 1, call.a_step = slab_width<T>;
            call.b = product.right + j * rows;
            call.c = c, call.c_row = product.out_row;
            call.add = product.add;
            call.past_caches = stream;
            const index_t here = std::min(width, product.n - j);
            if (here == width)
                tiles(here_rows, 1, call, ahead);
            else
                partial_tiles(here_rows, 1, here, call, ahead);
        }
    }
    if (stream) part::end_stream();
}
