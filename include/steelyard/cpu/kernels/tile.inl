// The register kernel of every matrix product: a few rows times one or two panels.

/// A panel holds, for each step of the depth, this many vectors of neighbouring columns.
inline constexpr int panel_vectors = 2;
/// Most rows of a tile: with two vectors of each, and the panel's own, they fill the registers.
inline constexpr int register_rows = vector_registers == 32 ? 12 : 6;
/// Rows of a tile that takes less time than its panel takes to come from memory. The processor fetches what is read in
/// order by itself, and mostly faster where nothing else is asked for: see Fetches.
inline constexpr int few_rows = register_rows / 2;

/// Columns of a panel.
template <class T>
inline constexpr index_t panel_width = panel_vectors* Simd<typename Format<T>::sum>::lanes;

/// Rows of the left operand, as their format has them.
template <class T>
struct Operand {
    typename Format<T>::left* words = nullptr;  // [rows, steps]
    index_t stride = 0;                         // words from one row to the next
    // Of int8, for each group of steps: what a word's elements are multiplied by, and what their sums begin with.
    float* scale = nullptr;             // [rows, groups]
    std::int32_t* beginning = nullptr;  // [rows, groups]
    index_t groups = 0;                 // from one row to the next
};

/// c[r][j] = (c[r][j] or 0) + sum over p of a[r][p] b[p][j]: one chain of multiply-adds for each element, by ascending
/// p.
template <class T>
struct TileCall {
    using F = Format<T>;
    index_t steps = 0;                    // words of depth
    const typename F::left* a = nullptr;  // row r, step p at a[r * a_row + p * a_step]
    index_t a_row = 0, a_step = 1;
    const typename F::word* b = nullptr;  // panels of [steps][panel_width], b_panel words from one to the next
    index_t b_panel = 0;
    typename F::sum* c = nullptr;  // row r at c[r * c_row]; the panels' columns side by side
    index_t c_row = 0;
    bool add = false;
    bool past_caches = false;  // c, aligned to whole registers, is written without reading it; not of int8
    // Of int8: scales of the rows and of the panels' columns, group by group.
    const float *a_scale = nullptr, *b_scale = nullptr;  // [rows, groups], panels of [groups, panel_width]
    const std::int32_t* a_begin = nullptr;               // [rows, groups]
    index_t groups = 0, b_groups = 0;                    // from one row, and one panel, to the next
    // What is needed next: with each step an address is brought nearer, `next_stride` bytes from one to the next. Null
    // for few_rows: nothing, and nothing of the panel.
    const char* next = nullptr;
    index_t next_stride = 0;
    bool panel_ahead = false;  // the panel comes from memory, and is fetched; many rows bring nothing else nearer

    void skip(index_t rows) {
        a += rows * a_row;
        c += rows * c_row;
        if (groups == 0) return;
        a_scale += rows * groups;
        a_begin += rows * groups;
    }
};

namespace part {

/// Steps of the depth that a round of the loop takes: what a round does beside them is shared. Processors that start
/// four instructions a cycle have none to spare; more than two steps are slower again.
inline constexpr int round_steps = 2;
/// Bytes of a panel's step, and those ahead of which it is fetched into the first-level cache: from the second level,
/// and from memory, for few rows and for a tile of more.
inline constexpr index_t panel_step_bytes = index_t{panel_vectors} * vector_bytes;
inline constexpr index_t second_level_ahead = 24 * panel_step_bytes, memory_ahead = 48 * panel_step_bytes,
                         lone_tile_ahead = 72 * panel_step_bytes;

/// Groups of int8 ahead of which scales are fetched, in elements: a line or two of each, too seldom for the processor
/// to do it by itself.
inline constexpr index_t scales_ahead = 4 * panel_vectors * Simd<float>::lanes;

/// Hides from the compiler where a value comes from, which it would otherwise work out anew or keep twice.
template <class Scalar>
[[gnu::always_inline]] inline void unrelated(Scalar& s) {
    asm("" : "+r"(s));
}

/// Where a tile reads its rows of the left operand: along them, or across, so that neighbours are of one step.
template <class T, int Rows, bool Across>
struct LeftRows {
    using word = typename Format<T>::left;
    // The pointers stand three rows apart: the addressing modes reach the two between. The compiler is not told how
    // they come from each other, or it would work them out anew for every step.
    static constexpr int pointers = Across ? 1 : (Rows + 2) / 3;
    const word* at[pointers];
    index_t stride, two_strides;  // from one row, or one step, to the next

    [[gnu::always_inline]] explicit LeftRows(const TileCall<T>& call)
        : stride(Across ? call.a_step : call.a_row), two_strides(2 * stride) {
#pragma GCC unroll 4
        for (int i = 0; i < pointers; ++i) {
            at[i] = call.a + 3 * i * call.a_row;
            unrelated(at[i]);
        }
        unrelated(stride);
        unrelated(two_strides);
    }
    /// Row `r` of step number `step` of a round.
    [[gnu::always_inline]] const word& get(int r, int step) const {
        if constexpr (Across) return at[0][r];
        return at[r / 3][(r % 3 == 0 ? 0 : r % 3 == 1 ? stride : two_strides) + step];
    }
    [[gnu::always_inline]] void end_step() {
        if constexpr (Across) {
            at[0] += stride;
            unrelated(at[0]);
        }
    }
    [[gnu::always_inline]] void end_round(int steps) {
        if constexpr (!Across) {
#pragma GCC unroll 4
            for (auto& pointer : at) {
                pointer += steps;
                unrelated(pointer);
            }
        }
    }
};

/// One step of the depth.
template <class T, int Rows, int Panels, class Sums, class Left>
[[gnu::always_inline]] inline void tile_step(Sums& sum, const Left& a, int step, const typename Format<T>::word* b,
                                             index_t b_panel) {
    using F = Format<T>;
    constexpr int lanes = Simd<typename F::sum>::lanes, vectors = panel_vectors * Panels;
    typename F::words right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        typename F::words one;
        std::memcpy(&one, b + v / panel_vectors * b_panel + (step * panel_vectors + v % panel_vectors) * lanes,
                    sizeof one);
        if constexpr (Rows > 1) in_register(one);  // g++ would load it again for each row
        right[v] = one;
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
        const typename F::left& left = a.get(r, step);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = F::madd(sum[r][v], left, right[v]);
    }
}

/// Brings nearer what `steps` steps ask for: a line for all of them where that is enough, or else two for each. Each
/// address comes from the last one, so that it takes no register that a row's address needs.
template <int steps>
[[gnu::always_inline]] inline void bring_nearer(const char*& next, index_t stride) {
    if (stride * steps <= 64) {
        __builtin_prefetch(next, 0, 2);
        next += stride * steps;
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < steps; ++i) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 64, 0, 2);
        next += stride;
        unrelated(next);
    }
}

/// What a tile brings nearer: nothing, if it has few rows; what is needed next; or its own panel alone.
enum class Bring { nothing, next, panel };

/// Steps of the depth, past which the pointers are moved.
template <class T, int Rows, int Panels, Bring bring = Bring::next, class Sums, class Left>
[[gnu::always_inline]] inline void tile_steps(Sums& sum, Left& a, const typename Format<T>::word*& b, index_t b_panel,
                                              index_t steps, const char*& next, index_t next_stride, bool panel_ahead) {
    constexpr bool few = Rows <= few_rows;
    if constexpr (bring == Bring::next) {
        constexpr Bring other = few ? Bring::nothing : Bring::panel;
        if (few ? next == nullptr : panel_ahead)
            return tile_steps<T, Rows, Panels, other>(sum, a, b, b_panel, steps, next, next_stride, false);
    }
    const index_t bytes_ahead = few                     ? (panel_ahead ? memory_ahead : 0)
                                : bring == Bring::panel ? lone_tile_ahead
                                                        : second_level_ahead;
    const auto round = [&]<int count>(std::integral_constant<int, count>) __attribute__((always_inline)) {
        if constexpr (bring == Bring::next) bring_nearer<count>(next, next_stride);
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
            if constexpr (bring != Bring::nothing)
                for (index_t line = 0; line < panel_step_bytes; line += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(b) + i * panel_step_bytes + line + bytes_ahead, 0,
                                       3);
            tile_step<T, Rows, Panels>(sum, a, i, b, b_panel);
            a.end_step();
        }
        a.end_round(count);
        b += count * panel_width<T>;
    };
    for (; steps >= round_steps; steps -= round_steps) round(std::integral_constant<int, round_steps>{});
    for (; steps > 0; --steps) round(std::integral_constant<int, 1>{});
}

/// The tile of int8: integers within a group, then c += a_scale b_scale (their dot products). The registers are full of
/// integers, so the floats wait in c.
template <int Rows, int Panels>
void grouped_tile(const TileCall<std::int8_t>& call) {
    using F = Format<std::int8_t>;
    using S = Simd<float>;
    constexpr int lanes = S::lanes, vectors = panel_vectors * Panels;

    LeftRows<std::int8_t, Rows, false> a(call);
    const F::word* b = call.b;
    // Copies: what is written to c could be the call, for all that the compiler knows.
    const index_t b_panel = call.b_panel, c_row = call.c_row, steps = call.steps;
    const index_t groups = call.groups, b_groups = call.b_groups, next_stride = call.next_stride;
    const bool panel_ahead = call.panel_ahead;
    const float *a_scale = call.a_scale, *b_scale = call.b_scale;
    const std::int32_t* a_begin = call.a_begin;
    const char* next = call.next;
    float* const c = call.c;
    if (!call.add) {
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < vectors; ++v) store(c + r * c_row + v * lanes, S::vec{});
    }
    for (index_t begin = 0; begin < steps; begin += F::group_steps, ++a_scale, ++a_begin) {
        F::words whole[Rows][vectors];
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) whole[r][v] = F::words{} + static_cast<F::word>(a_begin[r * groups]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            __builtin_prefetch(b_scale + v / panel_vectors * b_groups + v % panel_vectors * lanes + scales_ahead);
        const index_t here = std::min(steps - begin, index_t{F::group_steps});
        tile_steps<std::int8_t, Rows, Panels>(whole, a, b, b_panel, here, next, next_stride, panel_ahead);
        S::vec scale[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            scale[v] = load(b_scale + v / panel_vectors * b_groups + v % panel_vectors * lanes);
        b_scale += panel_vectors * lanes;
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            const float of_row = a_scale[r * groups];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                S::ints integers;
                std::memcpy(&integers, &whole[r][v], sizeof integers);
                float* const to = c + r * c_row + v * lanes;
                store(to, load(to) + __builtin_convertvector(integers, S::vec) * (of_row * scale[v]));
            }
        }
    }
}

/// The tile of every other format.
template <class T, int Rows, int Panels>
void plain_tile(const TileCall<T>& call) {
    using F = Format<T>;
    using S = Simd<typename F::sum>;
    constexpr int lanes = S::lanes, vectors = panel_vectors * Panels;

    // Copies: what is written to c could be the call, for all that the compiler knows.
    typename F::sum* const c = call.c;
    const index_t c_row = call.c_row;
    const bool past_caches = call.past_caches;
    typename S::vec sum[Rows][vectors] = {};
    if (call.add) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sum[r][v] = load(c + r * c_row + v * lanes);
    }

    const auto multiply = [&](auto a) __attribute__((always_inline)) {
        const typename F::word* b = call.b;
        const char* next = call.next;
        tile_steps<T, Rows, Panels>(sum, a, b, call.b_panel, call.steps, next, call.next_stride, call.panel_ahead);
    };
    if (call.a_step == 1)
        multiply(LeftRows<T, Rows, false>(call));
    else if constexpr (F::per_word == 1)
        multiply(LeftRows<T, Rows, true>(call));

    const auto write = [&](auto&& one) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) one(c + r * c_row + v * lanes, sum[r][v]);
    };
    if (past_caches)
        write(stream<typename F::sum>);
    else
        write(store<typename F::sum>);
}

template <class T, int Rows, int Panels>
void tile(const TileCall<T>& call) {
    if constexpr (Format<T>::grouped)
        grouped_tile<Rows, Panels>(call);
    else
        plain_tile<T, Rows, Panels>(call);
}

}  // namespace part

/// Panels that a tile of `rows` rows takes side by side, where there are as many and a cache holds them: few rows of
/// one panel would leave the units waiting for each other's results.
[[nodiscard]] constexpr index_t panels_at_once(index_t rows) {
    return rows == 1 ? 4 : rows * 3 <= register_rows ? 2 : 1;
}

namespace part {

template <class T>
using Tile = void (*)(const TileCall<T>&);

template <class T, int Panels, std::size_t... Row>
constexpr std::array<Tile<T>, sizeof...(Row)> tiles_of(std::index_sequence<Row...>) {
    return {&tile<T, static_cast<int>(Row) + 1, Panels>...};
}

}  // namespace part

/// The tile of `rows` (1 to register_rows) and `panels` (1, or panels_at_once(rows)).
template <class T>
void tile(index_t rows, index_t panels, const TileCall<T>& call) {
    static constexpr auto one = part::tiles_of<T, 1>(std::make_index_sequence<register_rows>{});
    static constexpr auto two = part::tiles_of<T, 2>(std::make_index_sequence<register_rows / 3>{});
    const auto at = static_cast<std::size_t>(rows - 1);
    (panels == 1 ? one[at] : panels == 2 ? two[at] : &part::tile<T, 1, 4>)(call);
}

/// Memory that the tiles of a panel bring nearer for those after them: an address with each step.
struct Ahead {
    const void* from[2] = {};  // of the first and the second half of the tiles, or of the first two alone
    index_t step = 0;          // bytes from one address to the next
    bool first_two = false;
    bool panel = false;  // TileCall::panel_ahead

    /// A run of bytes, by all tiles.
    static Ahead run(const void* from, index_t bytes, index_t rows, index_t steps) {
        const index_t count = (rows + register_rows - 1) / register_rows;
        const index_t half = (count + 1) / 2 * steps, step = bytes / std::max<index_t>(1, count * steps);
        return {{from, static_cast<const char*>(from) + half * step}, step, false, false};
    }
};

struct Nothing {
    void operator()(index_t, index_t) const {}
};

/// Brings what a tile adds to, or writes, nearer.
template <class T>
void prefetch_sums(const T* c, index_t c_row, index_t rows, index_t vectors) {
    for (index_t r = 0; r < rows; ++r)
        for (index_t v = 0; v < vectors; ++v) __builtin_prefetch(c + r * c_row + v * Simd<T>::lanes, 1, 3);
}

/// The tiles of any number of rows: as even as can be, since every tile reads the panels again. What a tile adds to has
/// its predecessor's time to come. Calls before(first row, last row) ahead of each tile.
template <class T, class Before = Nothing>
void tiles(index_t rows, index_t panels, TileCall<T> call, const Ahead& ahead = {}, Before&& before = {}) {
    const index_t count = (rows + register_rows - 1) / register_rows, half = ahead.first_two ? 1 : (count + 1) / 2;
    const index_t each = count > 1 ? rows / count : rows, longer = rows - count * each;  // divisions are slow
    for (index_t i = 0, row = 0; i < count; ++i) {
        const index_t end = row + each + (i < longer ? 1 : 0), part = i < half ? 0 : i < 2 * half ? 1 : 2;
        const bool some = part < 2 && ahead.from[part] != nullptr;
        call.next = nullptr;
        call.next_stride = 0;
        call.panel_ahead = ahead.panel;
        if (some) {
            call.next = static_cast<const char*>(ahead.from[part]) + (i - part * half) * call.steps * ahead.step;
            call.next_stride = ahead.step;
        } else if (end - row > few_rows || ahead.panel) {  // an address that costs nothing
            call.next = reinterpret_cast<const char*>(call.b);
        }
        before(row, end);
        if (call.add && i + 1 < count)
            prefetch_sums(call.c + (end - row) * call.c_row, call.c_row, each, panels * panel_vectors);
        tile(end - row, panels, call);
        call.skip(end - row);
        row = end;
    }
}
