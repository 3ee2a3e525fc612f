// Rows of any length, a vector at a time: copies, weighted sums, products, and sums over rows.

namespace part {

/// Whether `stream` can write a row: whole registers from an aligned address on.
template <class T>
inline bool streams(const T* row, index_t columns) {
    return vector_bytes > 16 && reinterpret_cast<std::uintptr_t>(row) % vector_bytes == 0 &&
           columns % Simd<T>::lanes == 0;
}

/// One register past the caches: the line is not read before it is written, and throws nothing else out.
template <class T>
[[gnu::always_inline]] inline void stream(T* to, typename Simd<T>::vec v) {
#if defined(__x86_64__)
    if constexpr (vector_bytes > 16) {
        asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<char(*)[vector_bytes]>(to)) : "v"(v));
        return;
    }
#endif
    store(to, v);
}

/// After the last `stream`, before another thread is told of what was written.
inline void end_stream() {
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");
#endif
}

template <class T, std::size_t By, std::size_t... I>
[[gnu::always_inline]] inline typename Simd<T>::vec rotate(typename Simd<T>::vec v, std::index_sequence<I...>) {
    return __builtin_shufflevector(v, v, ((I + By) % sizeof...(I))...);
}

/// The sum of all lanes, halves onto halves.
template <class T, std::size_t Half = Simd<T>::lanes / 2>
[[gnu::always_inline]] inline T fold_sum(typename Simd<T>::vec v) {
    if constexpr (Half == 0)
        return v[0];
    else
        return fold_sum<T, Half / 2>(v + rotate<T, Half>(v, std::make_index_sequence<Simd<T>::lanes>{}));
}

template <class T, std::size_t Half = Simd<T>::lanes / 2>
[[gnu::always_inline]] inline T fold_max(typename Simd<T>::vec v) {
    if constexpr (Half == 0) {
        return v[0];
    } else {
        const auto other = rotate<T, Half>(v, std::make_index_sequence<Simd<T>::lanes>{});
        return fold_max<T, Half / 2>(v > other ? v : other);
    }
}

/// As many doubles as a register holds.
template <class T>
[[gnu::always_inline]] inline typename Simd<double>::vec widen(const T* from) {
    typename Simd<double>::vec wide;
    using narrow = typename AsDouble<T>::vec;
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4 && vector_bytes > 16) {  // one instruction, which g++ 12 makes four of
        asm("vcvtps2pd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const char(*)[sizeof(narrow)]>(from)));
        return wide;
    }
#endif
    narrow part;
    std::memcpy(&part, from, sizeof part);
    return __builtin_convertvector(part, typename Simd<double>::vec);
}

/// The rows of one token's choices, without those that are missing, and where their sum goes.
template <class T>
struct TokenTerms {
    static constexpr int most = 8;
    const T* row[most];
    T weight[most];
    int count = 0;
    index_t left = 0;  // the first choice that there was no room for, or K
    T* y = nullptr;

    /// Choices from `left` on, as many as there is room for.
    void take(const Plan<>& plan, const view<const T, 2>& rows, const view<const T, 2>& weights, index_t t) {
        const index_t top_k = plan.top_k();
        for (count = 0; left < top_k && count < most; ++left) {
            const std::int32_t r = plan.row(t, left);
            if (r < 0) continue;
            row[count] = &rows(r, 0);
            weight[count] = weights.present() ? weights(t, left) : T(1);
            ++count;
        }
    }
};

/// Tokens whose sums are taken side by side: a processor reads about eight rows at once faster than one after the
/// other.
template <class T>
struct TokenGroup {
    static constexpr index_t rows_at_once = 8, most = rows_at_once;
    TokenTerms<T> token[most];
    index_t count = 0;

    [[nodiscard]] static index_t together(index_t top_k) { return std::clamp<index_t>(rows_at_once / top_k, 1, most); }

    /// Tokens from `begin` on, as many as are taken together, before `end`.
    void take(const Plan<>& plan, const view<const T, 2>& rows, const view<const T, 2>& weights, const view<T, 2>& y,
              index_t begin, index_t end) {
        count = std::clamp<index_t>(end - begin, 0, together(plan.top_k()));
        for (index_t i = 0; i < count; ++i) {
            token[i].left = 0;
            token[i].take(plan, rows, weights, begin + i);
            token[i].y = &y(begin + i, 0);
        }
    }
};

/// Columns j to j + Vectors * lanes, or the first `some` of one vector, of y = (y or 0) + sum of weight * row.
template <class T, int Vectors, bool Streams, bool Some>
[[gnu::always_inline]] inline void add_terms(const TokenTerms<T>& terms, bool add, index_t j, index_t some) {
    T* const y = terms.y;
    using vec = typename Simd<T>::vec;
    constexpr int lanes = Simd<T>::lanes;
    vec sum[Vectors];
    int k = 0;
    if (add || terms.count == 0) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            sum[v] = !add ? vec{} : Some ? load_some<T>(y + j, some) : load(y + j + v * lanes);
    } else {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            sum[v] =
                terms.weight[0] * (Some ? load_some<T>(terms.row[0] + j, some) : load(terms.row[0] + j + v * lanes));
        k = 1;
    }
#pragma GCC unroll 1
    for (; k < terms.count; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            sum[v] +=
                terms.weight[k] * (Some ? load_some<T>(terms.row[k] + j, some) : load(terms.row[k] + j + v * lanes));
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        if constexpr (Some)
            store_some(y + j, sum[v], some);
        else if constexpr (Streams)
            stream(y + j + v * lanes, sum[v]);
        else
            store(y + j + v * lanes, sum[v]);
    }
}

/// How far ahead of each token's sum of rows they are fetched: all of them together.
inline constexpr index_t prefetched_bytes = 10240;

/// Fetches `count` elements into the first-level cache, or into the second.
template <int count, class T>
[[gnu::always_inline]] inline void fetch(const T* from, bool nearest) {
    constexpr int line = 64 / static_cast<int>(sizeof(T));
    if (nearest) {
#pragma GCC unroll 4
        for (int l = 0; l < count; l += line) __builtin_prefetch(from + l, 0, 3);
    } else {
#pragma GCC unroll 4
        for (int l = 0; l < count; l += line) __builtin_prefetch(from + l, 0, 2);
    }
}

/// The rows of y of a group of tokens. Meanwhile what comes a few kilobytes later is brought nearer, of this group or
/// the next: its rows lie wherever its experts are, and a store waits for a line as a load does.
template <class T, bool Streams>
void add_rows(const TokenGroup<T>& group, const TokenGroup<T>& next, bool add, index_t columns) {
    constexpr int lanes = Simd<T>::lanes, line = 64 / static_cast<int>(sizeof(T)), step = 4 * lanes;
    const index_t room =
        group.count * prefetched_bytes / static_cast<index_t>(sizeof(T)) / (group.token[0].count + 1) / step * step;
    const index_t whole = columns / step * step;
    const index_t ahead = room < step ? step : room < whole ? room : whole;
    const bool nearest = best_fetches().rows_nearest;
    index_t j = 0;
    for (; j + step <= columns; j += step) {
        const bool here = j + ahead < whole;
        const TokenGroup<T>& later = here ? group : next;
        const index_t at = here ? j + ahead : j + ahead - whole;
        for (index_t i = 0; i < group.count; ++i) {
            if (i < later.count) {
                const TokenTerms<T>& token = later.token[i];
                for (int k = 0; k < token.count; ++k) fetch<step>(token.row[k] + at, nearest);
                if constexpr (!Streams)
#pragma GCC unroll 4
                    for (int l = 0; l < step; l += line) __builtin_prefetch(token.y + at + l, 1);
            }
            add_terms<T, 4, Streams, false>(group.token[i], add, j, 0);
        }
    }
    for (index_t i = 0; i < group.count; ++i) {
        index_t v = j;
        for (; v + lanes <= columns; v += lanes) add_terms<T, 1, Streams, false>(group.token[i], add, v, 0);
        if (v < columns) add_terms<T, 1, false, true>(group.token[i], add, v, columns - v);
    }
}

}  // namespace part

/// Kernels on rows of a matrix: dispatch, combine and its gradient, sums over tokens.
struct RowKernels {
    /// rows[r] = x[choice[r] / K] for r in [begin, end); `past_caches`: where the caches would hold little of them.
    template <class T>
    static void dispatch(const Plan<>& plan, const view<const T, 2>& x, const view<T, 2>& rows, bool past_caches,
                         index_t begin, index_t end) {
        constexpr int lanes = Simd<T>::lanes;
        const index_t columns = x.extents[1], top_k = plan.top_k();
        for (index_t r = begin; r < end; ++r) {
            const T* const from = &x(plan.choice(r) / top_k, 0);
            T* const to = &rows(r, 0);
            const bool streams = past_caches && part::streams(to, columns);
            index_t j = 0;
            if (streams)
                for (; j + lanes <= columns; j += lanes) part::stream(to + j, load(from + j));
            else
                for (; j + lanes <= columns; j += lanes) store(to + j, load(from + j));
            if (j < columns) store_some(to + j, load_some<T>(from + j, columns - j), columns - j);
        }
        if (past_caches) part::end_stream();
    }

    /// y[t] = (y[t] or 0) + sum_k weight[t,k] rows[row[t,k]], in the order of k, for t in [begin, end).
    template <class T>
    static void combine(const Plan<>& plan, const view<const T, 2>& rows, const view<const T, 2>& weight,
                        const view<T, 2>& y, bool add, bool past_caches, index_t begin, index_t end) {
        const index_t columns = y.extents[1];
        part::TokenGroup<T> groups[2];
        groups[0].take(plan, rows, weight, y, begin, end);
        for (index_t t = begin, turn = 0; t < end; t += groups[turn].count, turn ^= 1) {
            part::TokenGroup<T>&now = groups[turn], &next = groups[turn ^ 1];
            next.take(plan, rows, weight, y, t + now.count, end);
            bool whole = past_caches && !add;
            for (index_t i = 0; i < now.count; ++i)
                whole &= now.token[i].left == plan.top_k() && part::streams(now.token[i].y, columns);
            if (whole)
                part::add_rows<T, true>(now, next, false, columns);
            else
                part::add_rows<T, false>(now, next, add, columns);
            while (now.token[0].left < plan.top_k()) {  // more choices than there is room for, of a single token
                now.token[0].take(plan, rows, weight, t);
                part::add_rows<T, false>(now, next, true, columns);
            }
        }
        if (past_caches) part::end_stream();
    }

    /// dweight[t,k] += <dy[t], rows[row[t,k]]> for t in [begin, end).
    template <class T>
    static void combine_backward(const Plan<>& plan, const view<const T, 2>& rows, const view<const T, 2>& dy,
                                 const view<T, 2>& dweight, index_t begin, index_t end) {
        for (index_t t = begin; t < end; ++t)
            for (index_t k = 0; k < plan.top_k(); ++k)
                if (const std::int32_t r = plan.row(t, k); r >= 0)
                    dweight(t, k) += dot<T>(&dy(t, 0), &rows(r, 0), dy.extents[1]);
    }

    template <class T>
    static T dot(const T* a, const T* b, index_t n) {
        using vec = typename Simd<T>::vec;
        constexpr int lanes = Simd<T>::lanes;
        vec sum[4] = {};
        index_t j = 0;
        for (; j + 4 * lanes <= n; j += 4 * lanes)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[v] += load(a + j + v * lanes) * load(b + j + v * lanes);
        for (; j < n; j += lanes) sum[0] += load_some<T>(a + j, n - j) * load_some<T>(b + j, n - j);
        return part::fold_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    /// sums[j] = (sums[j] or 0) + sum of row[i][j], each element by ascending i in double.
    template <class T>
    static void sum_rows(const T* const* row, index_t count, index_t columns, bool add, double* sums) {
        index_t j = 0;
        constexpr int lanes = Simd<double>::lanes;
        for (; j + 8 * lanes <= columns; j += 8 * lanes) sum_columns<T, 8>(row, count, j, add, sums);
        for (; j + lanes <= columns; j += lanes) sum_columns<T, 1>(row, count, j, add, sums);
        for (; j < columns; ++j) {
            double sum = add ? sums[j] : 0.0;
            for (index_t i = 0; i < count; ++i) sum += static_cast<double>(row[i][j]);
            sums[j] = sum;
        }
    }

private:
    template <class T, int Vectors>
    static void sum_columns(const T* const* row, index_t count, index_t j, bool add, double* sums) {
        using vec = typename Simd<double>::vec;
        constexpr int lanes = Simd<double>::lanes;
        vec sum[Vectors] = {};
        if (add)
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[v] = load(sums + j + v * lanes);
#pragma GCC unroll 1
        for (index_t i = 0; i < count; ++i) {
            const T* const from = row[i] + j;
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) {
                sum[v] += part::widen(from + v * lanes);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) store(sums + j + v * lanes, sum[v]);
    }
};
