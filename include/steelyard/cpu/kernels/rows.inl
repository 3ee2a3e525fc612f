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
    typedef T narrow __attribute__((vector_size(Simd<double>::lanes * sizeof(T))));
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

/// How far ahead of a sum of rows they are fetched into the second-level cache: all of them together. The first-level
/// cache waits for too few lines at a time.
inline constexpr index_t prefetched_bytes = 10240;

/// The rows of one token's choices, without those that are missing.
template <class T>
struct TokenTerms {
    static constexpr int most = 8;
    const T* row[most];
    T weight[most];
    int count = 0;

    /// Choices from k on, as many as there is room for; returns the first that was left.
    index_t take(const Plan<>& plan, const view<const T, 2>& rows, const view<const T, 2>& weights, index_t t,
                 index_t k) {
        const index_t top_k = plan.top_k();
        for (count = 0; k < top_k && count < most; ++k) {
            const std::int32_t r = plan.row(t, k);
            if (r < 0) continue;
            row[count] = &rows(r, 0);
            weight[count] = weights.present() ? weights(t, k) : T(1);
            ++count;
        }
        return k;
    }
};

/// Columns j to j + Vectors * lanes, or the first `some` of one vector, of y = (y or 0) + sum of weight * row.
template <class T, int Vectors, bool Streams, bool Some>
[[gnu::always_inline]] inline void add_terms(const TokenTerms<T>& terms, bool add, T* y, index_t j, index_t some) {
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

/// One token's row of y. Meanwhile what comes a few kilobytes later is brought nearer, of this token or the next: its
/// rows lie wherever its experts are, and a store waits for a line as a load does.
template <class T, bool Streams>
void add_row(const TokenTerms<T>& terms, const TokenTerms<T>& next, bool add, T* y, const T* next_y, index_t columns) {
    constexpr int lanes = Simd<T>::lanes, line = 64 / static_cast<int>(sizeof(T)), step = 4 * lanes;
    const index_t room = prefetched_bytes / static_cast<index_t>(sizeof(T)) / (terms.count + 1) / step * step;
    const index_t whole = columns / step * step, ahead = room < step ? step : room < whole ? room : whole;
    index_t j = 0;
    for (; j + step <= columns; j += step) {
        const bool here = j + ahead < whole;
        const TokenTerms<T>& later = here ? terms : next;
        const index_t at = here ? j + ahead : j + ahead - whole;
        for (int k = 0; k < later.count; ++k)
#pragma GCC unroll 4
            for (int i = 0; i < step; i += line) __builtin_prefetch(later.row[k] + at + i, 0, 2);
        if constexpr (!Streams)
#pragma GCC unroll 4
            for (int i = 0; i < step; i += line) __builtin_prefetch((here ? y : next_y) + at + i, 1);
        add_terms<T, 4, Streams, false>(terms, add, y, j, 0);
    }
    for (; j + lanes <= columns; j += lanes) add_terms<T, 1, Streams, false>(terms, add, y, j, 0);
    if (j < columns) add_terms<T, 1, false, true>(terms, add, y, j, columns - j);
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
        const index_t columns = y.extents[1], top_k = plan.top_k();
        part::TokenTerms<T> terms[2];
        index_t left = begin < end ? terms[0].take(plan, rows, weight, begin, 0) : 0;
        for (index_t t = begin; t < end; ++t) {
            part::TokenTerms<T>&now = terms[(t - begin) % 2], &next = terms[(t - begin + 1) % 2];
            T *const out = &y(t, 0), *const next_out = t + 1 < end ? &y(t + 1, 0) : out;
            index_t next_left = top_k;
            if (t + 1 < end)
                next_left = next.take(plan, rows, weight, t + 1, 0);
            else
                next.count = 0;
            if (past_caches && !add && left == top_k && part::streams(out, columns))
                part::add_row<T, true>(now, next, false, out, next_out, columns);
            else
                part::add_row<T, false>(now, next, add, out, next_out, columns);
            while (left < top_k) {
                left = now.take(plan, rows, weight, t, left);
                part::add_row<T, false>(now, next, true, out, next_out, columns);
            }
            left = next_left;
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
