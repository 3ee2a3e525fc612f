// The router's logits: dot products of rows with rows, both read where they are.
//
// A register holds neighbouring elements of one row, so nothing is packed: a weight that few tokens meet is read once,
// at the speed of memory. Every lane of a dot product is one chain of multiply-adds by ascending depth, and the lanes
// are added up by one tree; missing lanes of the last vector are zeros. So an element's bits come from its two rows
// alone, whatever the shape of the tile, its place in it, and the block.

/// Tokens and experts of a tile: their sums, and one vector of each token or expert, fill the registers.
inline constexpr int dot_tokens = vector_registers == 32 ? 6 : 3, dot_experts = 4;
/// Experts that a single token meets at once: independent chains enough to hide the latency of each.
inline constexpr int dot_experts_alone = 8;

/// What a block covers, so that its rows, its sums and the rows of the next block stay in the second cache whatever
/// their length, and a tile's rows in the first: rows a power of two apart share its sets, which have ways for those of
/// a tile and half of the next.
inline constexpr index_t dot_block_tokens = 48, dot_block_experts = 64;
template <class T>
inline constexpr index_t dot_block_depth = 4096 / static_cast<index_t>(sizeof(T));

/// Elements that wait for the rest of a depth above dot_block_depth.
template <class T>
inline constexpr index_t dot_room = dot_block_tokens* dot_block_experts* Simd<T>::lanes;
static_assert(dot_block_tokens % dot_tokens == 0 && dot_block_experts % dot_experts_alone == 0);

namespace part {

/// Of units of lanes, within each span of lanes: those of `a` and then of `b` at even places, or those at odd ones.
template <class T, int Span, int Unit, int Odd, std::size_t... I>
[[gnu::always_inline]] inline typename Simd<T>::vec every_other(typename Simd<T>::vec a, typename Simd<T>::vec b,
                                                                std::index_sequence<I...>) {
    constexpr int half = Span / Unit / 2, lanes = Simd<T>::lanes;
    constexpr auto lane = [](int i) {
        const int place = i % Span / Unit;
        return place / half * lanes + i / Span * Span + (2 * (place % half) + Odd) * Unit + i % Unit;
    };
    return __builtin_shufflevector(a, b, lane(static_cast<int>(I))...);
}

/// Lane i: the sum of all lanes of v[i], neighbours first. `Added` lanes have been so far. Shuffles within 16 bytes
/// come first: most vectors are there then, and those shuffles are the cheap ones.
template <class T, int Added = 1, int Count>
[[gnu::always_inline]] inline typename Simd<T>::vec add_lanes(const typename Simd<T>::vec (&v)[Count]) {
    constexpr int lanes = Simd<T>::lanes, sixteen_bytes = 16 / static_cast<int>(sizeof(T));
    if constexpr (Added == lanes) {
        return v[0];
    } else {
        constexpr int span = Added < sixteen_bytes ? sixteen_bytes : lanes;
        constexpr int unit = Added < sixteen_bytes ? 1 : sixteen_bytes;
        constexpr auto all = std::make_index_sequence<lanes>{};
        typename Simd<T>::vec half[(Count + 1) / 2];
#pragma GCC unroll 8
        for (int i = 0; i < Count; i += 2) {
            const auto a = v[i], b = v[i + 1 < Count ? i + 1 : i];
            half[i / 2] = every_other<T, span, unit, 0>(a, b, all) + every_other<T, span, unit, 1>(a, b, all);
        }
        return add_lanes<T, Added * 2>(half);
    }
}

/// Rows of a tile, from some column on. Those that are missing repeat the last one, and their results are dropped. One
/// pointer each and one counter for all is what just fits the registers: what does not, GCC keeps in vector registers,
/// where an address waits behind the multiply-adds of the tile before.
template <class T, int Rows>
struct DotRows {
    const T* row[Rows];

    [[gnu::always_inline]] DotRows(const view<const T, 2>& matrix, index_t first, index_t last, index_t column) {
        const T* from = matrix.data + first * matrix.strides[0] + column;
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
            row[i] = from;
            if (first + i + 1 < last) from += matrix.strides[0];
        }
    }
};

/// Or compilers load it again for each multiply-add, which reads no register for it, and the units for loads fall
/// behind.
template <class Vector>
[[gnu::always_inline]] inline void keep_in_register([[maybe_unused]] Vector& v) {
#if defined(__x86_64__)
    if constexpr (vector_bytes > 16) asm("" : "+v"(v));
#endif
}

/// sum[t][e] += a vector of x[t] times one of weight[e]. The side with fewer rows waits in registers.
template <class T, int Tokens, int Experts, class Load>
[[gnu::always_inline]] inline void dot_step(typename Simd<T>::vec (&sum)[Tokens * Experts], const DotRows<T, Tokens>& x,
                                            const DotRows<T, Experts>& weight, Load&& load_of) {
    using vec = typename Simd<T>::vec;
    if constexpr (Tokens < Experts) {
        vec left[Tokens];
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) left[t] = load_of(x.row[t]);
#pragma GCC unroll 8
        for (int e = 0; e < Experts; ++e) {
            vec right = load_of(weight.row[e]);
            if constexpr (Tokens > 1) keep_in_register(right);
#pragma GCC unroll 8
            for (int t = 0; t < Tokens; ++t) sum[t * Experts + e] += left[t] * right;
        }
    } else {
        vec right[Experts];
#pragma GCC unroll 8
        for (int e = 0; e < Experts; ++e) right[e] = load_of(weight.row[e]);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
            vec left = load_of(x.row[t]);
            keep_in_register(left);
#pragma GCC unroll 8
            for (int e = 0; e < Experts; ++e) sum[t * Experts + e] += left * right[e];
        }
    }
}

/// A tile, whose rows point behind the last whole vector of `depth`. The sums begin with `room` where some depth has
/// been `before`, and go there where `more` is to come; otherwise their lanes are added up, into result[t * Experts +
/// e]. Meanwhile the vectors before `ahead` are brought nearer, as many.
template <class T, int Tokens, int Experts>
[[gnu::always_inline]] inline void dot_tile(const DotRows<T, Tokens>& x, const DotRows<T, Experts>& weight,
                                            index_t depth, bool before, bool more, const T* ahead, T* room, T* result) {
    using vec = typename Simd<T>::vec;
    constexpr int lanes = Simd<T>::lanes, sums = Tokens * Experts;
    vec sum[sums] = {};
    if (before) {
#pragma GCC unroll 32
        for (int i = 0; i < sums; ++i) sum[i] = load(room + i * lanes);
    }
    for (index_t j = -(depth / lanes * lanes); j < 0; j += lanes) {
        __builtin_prefetch(ahead + j, 0, 2);
        dot_step<T, Tokens, Experts>(sum, x, weight, [j](const T* row) { return load(row + j); });
    }
    if (const index_t some = depth % lanes; some > 0)
        dot_step<T, Tokens, Experts>(sum, x, weight, [some](const T* row) { return load_some<T>(row, some); });
    if (more) {
#pragma GCC unroll 32
        for (int i = 0; i < sums; ++i) store(room + i * lanes, sum[i]);
        return;
    }
    constexpr int whole = sums / lanes * lanes;
#pragma GCC unroll 8
    for (int i = 0; i < whole; i += lanes) {
        vec part[lanes];
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) part[k] = sum[i + k];
        store(result + i, add_lanes<T>(part));
    }
    if constexpr (whole < sums) {
        vec part[sums - whole];
#pragma GCC unroll 16
        for (int k = 0; k < sums - whole; ++k) part[k] = sum[whole + k];
        store(result + whole, add_lanes<T>(part));
    }
}

/// A rectangle of the logits, and columns [begin, end) of x and the weight.
struct DotBlock {
    index_t first_token, last_token, first_expert, last_expert, begin, end;
};

/// Rows that the block after this one reads, and this one does not: each tile brings one of them into the second cache.
/// They are the first of x, then of the weight, that there are tiles for.
template <class T>
struct DotNext {
    view<const T, 2> rows[2];
    index_t taken = 0;

    /// The next one, `depth` on; `otherwise` where there is none.
    const T* row(const T* otherwise, index_t depth) {
        const index_t i = taken++, first = rows[0].extents[0];
        if (i < first) return rows[0].data + i * rows[0].strides[0] + depth;
        if (i - first < rows[1].extents[0]) return rows[1].data + (i - first) * rows[1].strides[0] + depth;
        return otherwise;
    }
};

/// The tiles of a few rows of tokens with the experts of a block; returns the room behind them.
template <class T, int Tokens, int Experts>
T* dot_tiles(const view<const T, 2>& x, const view<const T, 2>& weight, const view<T, 2>& out, const DotBlock& block,
             DotNext<T>& next, T* room) {
    constexpr index_t lanes = Simd<T>::lanes;
    alignas(vector_bytes) T result[(Tokens * Experts + lanes - 1) / lanes * lanes];
    const index_t depth = block.end - block.begin, behind = block.begin + depth / lanes * lanes;
    const bool before = block.begin > 0, more = block.end < x.extents[1];
    const DotRows<T, Tokens> tokens(x, block.first_token, block.last_token, behind);
    for (index_t e = block.first_expert; e < block.last_expert; e += Experts) {
        const DotRows<T, Experts> experts(weight, e, block.last_expert, behind);
        dot_tile<T, Tokens, Experts>(tokens, experts, depth, before, more,
                                     next.row(tokens.row[0], depth / lanes * lanes), room, result);
        room += Tokens * Experts * lanes;
        if (more) continue;
        const index_t count = std::min<index_t>(Experts, block.last_expert - e);
        for (index_t t = block.first_token; t < block.last_token; ++t) {
            T *const to = &out(t, e), *const from = result + (t - block.first_token) * Experts;
            if (count == Experts)
                std::memcpy(to, from, Experts * sizeof(T));
            else
                std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
        }
    }
    return room;
}

}  // namespace part

/// Products of rows with rows for few columns of results.
struct LogitsKernels {
    template <class T>
    static constexpr index_t logits_room = dot_room<T>;

    /// out[t][e] = <x[t], weight[e]>. `room`: logits_room elements.
    template <class T>
    static void logits(const view<const T, 2>& x, const view<const T, 2>& weight, const view<T, 2>& out, T* room) {
        part::DotBlock next = block_from<T>(x, weight, 0, 0, 0);
        for (bool more = x.extents[0] > 0 && weight.extents[0] > 0; more;) {
            const part::DotBlock block = next;
            if (block.end < x.extents[1])
                next = block_from<T>(x, weight, block.first_token, block.first_expert, block.end);
            else if (block.last_expert < weight.extents[0])
                next = block_from<T>(x, weight, block.first_token, block.last_expert, 0);
            else
                next = block_from<T>(x, weight, block.last_token, 0, 0);
            more = next.first_token < x.extents[0];
            part::DotNext<T> ahead;
            if (more && (next.first_token != block.first_token || next.begin != block.begin))
                ahead.rows[0] = rows_of(x, next.first_token, next.last_token, next.begin);
            if (more && (next.first_expert != block.first_expert || next.begin != block.begin))
                ahead.rows[1] = rows_of(weight, next.first_expert, next.last_expert, next.begin);
            logits_block(x, weight, out, block, ahead, room);
        }
    }

private:
    template <class T>
    static view<const T, 2> rows_of(const view<const T, 2>& matrix, index_t first, index_t last, index_t column) {
        view<const T, 2> rows = matrix.slice(first, last);
        rows.data += column;
        return rows;
    }

    template <class T>
    static part::DotBlock block_from(const view<const T, 2>& x, const view<const T, 2>& weight, index_t token,
                                     index_t expert, index_t column) {
        const index_t tokens = std::min(x.extents[0], token + dot_block_tokens), width = x.extents[1];
        // One token alone reads each row to its end: nothing would come back to it.
        return {token,  tokens,
                expert, std::min(weight.extents[0], expert + dot_block_experts),
                column, tokens - token == 1 ? width : std::min(width, column + dot_block_depth<T>)};
    }

    template <class T>
    static void logits_block(const view<const T, 2>& x, const view<const T, 2>& weight, const view<T, 2>& out,
                             const part::DotBlock& block, part::DotNext<T>& ahead, T* room) {
        part::DotBlock part = block;
        for (index_t t = block.first_token; t < block.last_token; t += dot_tokens) {
            part.first_token = t, part.last_token = std::min(block.last_token, t + dot_tokens);
            if (part.last_token - t == 1)
                room = part::dot_tiles<T, 1, dot_experts_alone>(x, weight, out, part, ahead, room);
            else
                room = part::dot_tiles<T, dot_tokens, dot_experts>(x, weight, out, part, ahead, room);
        }
    }
};
