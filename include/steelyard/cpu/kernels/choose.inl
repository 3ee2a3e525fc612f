// The best K of many values in order, for as many tokens at once as a register has lanes.
//
// First the values alone, by minima and maxima; then the experts that have them. So what is sorted is one number, not a
// number and its index, and equal values are a case of its own, which costs nothing where there are none.
namespace part {

/// What was chosen, best first: values, and the experts that they belong to.
template <class T>
struct Chosen {
    using index = typename Simd<T>::bits;
    typename Simd<T>::vec value[select_choices];
    index expert[select_choices];
};

/// One step of a sorting network: afterwards v[first] >= v[second] in each lane.
struct Exchange {
    signed char first, second;
};
inline constexpr Exchange sort_4[] = {{0, 1}, {2, 3}, {0, 2}, {1, 3}, {1, 2}};
inline constexpr Exchange sort_8[] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                      {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
/// Sort what first rises and then falls.
inline constexpr Exchange merge_4[] = {{0, 2}, {1, 3}, {0, 1}, {2, 3}};
inline constexpr Exchange merge_8[] = {{0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 2}, {1, 3},
                                       {4, 6}, {5, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}};

template <class T, std::size_t Steps, std::size_t Count>
[[gnu::always_inline]] inline void exchange(const Exchange (&steps)[Steps], typename Simd<T>::vec (&v)[Count]) {
#pragma GCC unroll 20
    for (std::size_t i = 0; i < Steps; ++i) {
        const auto a = v[steps[i].first], b = v[steps[i].second];
        v[steps[i].first] = largest<T>(a, b);
        v[steps[i].second] = smallest<T>(a, b);
    }
}

/// Brings Count more values (all that there are, in any order) into the Count best.
template <class T, int Count>
[[gnu::always_inline]] inline void merge(const T* values, typename Simd<T>::vec (&best)[Count]) {
    using vec = typename Simd<T>::vec;
    constexpr int lanes = Simd<T>::lanes;
    if constexpr (Count == 4 || Count == 8) {
        vec next[Count];
#pragma GCC unroll 8
        for (int k = 0; k < Count; ++k) next[k] = load(values + k * lanes);
        if constexpr (Count == 4)
            exchange<T>(sort_4, next);
        else
            exchange<T>(sort_8, next);
#pragma GCC unroll 8
        for (int k = 0; k < Count; ++k) best[k] = largest<T>(best[k], next[Count - 1 - k]);
        if constexpr (Count == 4)
            exchange<T>(merge_4, best);
        else
            exchange<T>(merge_8, best);
    } else {
#pragma GCC unroll 1
        for (int i = 0; i < Count; ++i) {  // one at a time: each passes what it displaces on to the next
            vec v = load(values + i * lanes);
#pragma GCC unroll 16
            for (int k = 0; k < Count; ++k) {
                const vec higher = largest<T>(best[k], v);
                v = smallest<T>(best[k], v);
                best[k] = higher;
            }
        }
    }
}

/// The Count best values of each lane, in order; then the lowest index where each value is found. The values go on with
/// -infinity to the next multiple of Count.
template <class T, int Count>
void choose(const T* values, index_t experts, Chosen<T>& chosen) {
    using vec = typename Simd<T>::vec;
    using index = typename Simd<T>::bits;
    constexpr int lanes = Simd<T>::lanes;
    vec best[Count];
#pragma GCC unroll 16
    for (int k = 0; k < Count; ++k) best[k] = vec{} - std::numeric_limits<T>::infinity();
#pragma GCC unroll 1
    for (index_t e = 0; e < experts; e += Count) merge<T, Count>(values + e * lanes, best);
    index at[Count] = {};
#pragma GCC unroll 1
    for (index_t e = experts - 1; e >= 0; --e) {
        const vec v = load(values + e * lanes);
        const index here = index{} + static_cast<std::uint32_t>(e);
#pragma GCC unroll 16
        for (int k = 0; k < Count; ++k) at[k] = v == best[k] ? here : at[k];
    }
#pragma GCC unroll 16
    for (int k = 0; k < Count; ++k) chosen.value[k] = best[k], chosen.expert[k] = at[k];
}

/// Equal values in one lane: the second is the next expert that has it, and so on.
template <class T>
void break_ties(const T* values, index_t experts, int top_k, Chosen<T>& chosen) {
    using vec = typename Simd<T>::vec;
    using index = typename Simd<T>::bits;
    using mask = decltype(vec{} == vec{});
    constexpr int lanes = Simd<T>::lanes;
    mask ties = {};
    for (int k = 1; k < top_k; ++k) ties |= chosen.value[k] == chosen.value[k - 1];
    if (!any(ties)) return;
    for (int k = 1; k < top_k; ++k) {
        ties = chosen.value[k] == chosen.value[k - 1];
        if (!any(ties)) continue;
        const index before = chosen.expert[k - 1];
        index at = before;
        for (index_t e = experts; e-- > 0;) {
            const index here = index{} + static_cast<std::uint32_t>(e);
            const mask found = (load(values + e * lanes) == chosen.value[k]) & (here > before);
            at = found ? here : at;
        }
        chosen.expert[k] = ties ? at : chosen.expert[k];
    }
}

/// Values of experts outside the kept groups become -infinity.
template <class T>
void keep_groups(const SelectionRule& rule, bool biased, index_t experts, T* values, T* order) {
    using vec = typename Simd<T>::vec;
    using count_t = decltype(vec{} == vec{});
    constexpr int lanes = Simd<T>::lanes;
    const index_t groups = rule.groups, members = experts / groups;
    for (index_t g = 0; g < groups; ++g) {
        vec first = vec{} - std::numeric_limits<T>::infinity(), second = first;
        for (index_t e = g * members; e < (g + 1) * members; ++e) {
            const vec v = load(values + e * lanes);
            second = largest<T>(second, smallest<T>(first, v));
            first = largest<T>(first, v);
        }
        if (rule.group_score == GroupScore::top2_sum) {
            if (!biased && rule.score == Score::sigmoid)
                first = log_sigmoid_score<T>(first), second = log_sigmoid_score<T>(second);
            // log(exp(a) + exp(b)) keeps the order of sums that underflow
            first = biased ? first + second : first + log1p_score<T>(exp_score<T>(second - first));
        }
        store(order + g * lanes, first);
    }
    for (index_t g = 0; g < groups; ++g) {
        const vec own = load(order + g * lanes);
        count_t better = {};  // -1 for each
        for (index_t i = 0; i < g; ++i) better += load(order + i * lanes) >= own;
        for (index_t i = g + 1; i < groups; ++i) better += load(order + i * lanes) > own;
        const count_t dropped = better <= count_t{} - rule.kept_groups;
        for (index_t e = g * members; e < (g + 1) * members; ++e)
            store(values + e * lanes, dropped ? vec{} - std::numeric_limits<T>::infinity() : load(values + e * lanes));
    }
}

}  // namespace part
