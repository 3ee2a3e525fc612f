// The router's kernels, as code outside calls them.
/// Kernels of the router, and of losses on its logits. float alone: double goes by router_token.hpp and lanes.hpp.
struct RouterKernels {
    /// Tokens [begin, end), no more than select_block. Bit i of the answer: token begin + i is valid, but its logits
    /// are not all finite.
    template <class T>
    static std::uint64_t select(const SelectCall<T>& call, index_t begin, index_t end,
                                const SelectColumns<T>& scratch) {
        constexpr int lanes = Simd<T>::lanes;
        std::uint64_t bad = 0;
        for (index_t t = begin; t < end; t += lanes) {
            const int count = static_cast<int>(end - t < lanes ? end - t : lanes);
            bad |= part::Selection<T>(call, t, count, scratch).run() << (t - begin);
        }
        return bad;
    }

    /// dlogits (+=) of tokens [begin, end); masked rows become 0.
    template <class T>
    static void select_backward(const SelectCall<T>& call, const RoutingGrad<T>& grad, index_t begin, index_t end) {
        constexpr int lanes = Simd<T>::lanes;
        const part::SelectionGradient<T> gradient(call, grad);
        for (index_t t = begin; t < end; t += lanes)
            gradient.run(t, static_cast<int>(end - t < lanes ? end - t : lanes));
    }

    /// log sum_i exp(x_i) of a row of finite numbers.
    template <class T>
    static T log_sum_exp(const T* x, index_t n) {
        using vec = typename Simd<T>::vec;
        constexpr int lanes = Simd<T>::lanes;
        const vec lowest = vec{} - std::numeric_limits<T>::infinity();
        vec most = lowest, sum = {};
        for (index_t j = 0; j < n; j += lanes) most = part::largest<T>(most, load_some<T>(x + j, n - j, lowest));
        const T highest = part::fold_max<T>(most);
        for (index_t j = 0; j < n; j += lanes) sum += part::exp_score<T>(load_some<T>(x + j, n - j, lowest) - highest);
        return highest + std::log(part::fold_sum<T>(sum));
    }

    /// out += factor exp(x - shift), where no x is above the shift by more than rounding.
    template <class T>
    static void add_exp(const T* x, index_t n, T shift, T factor, T* out) {
        constexpr int lanes = Simd<T>::lanes;
        for (index_t j = 0; j < n; j += lanes)
            store_some(out + j,
                       load_some<T>(out + j, n - j) + factor * part::exp_score<T>(load_some<T>(x + j, n - j) - shift),
                       n - j);
    }

    /// The `count` best of `size` keys, a multiple of the lanes, best first, ties to the lowest index: each goes to its
    /// place, which is how many are before it. A comparison of every pair, and no branch.
    template <class B>
    static void take_by_place(const B* key, index_t size, index_t count, expert_t* out) {
        typedef B keys __attribute__((vector_size(vector_bytes)));
        constexpr int lanes = vector_bytes / static_cast<int>(sizeof(B)), sets = lanes < 4 ? lanes : 4;
        keys lane = {};
        for (int l = 0; l < lanes; ++l) lane[l] = l;
        for (index_t j = 0; j < size; j += lanes) {
            keys here, sums[sets] = {};  // sums that don't wait for each other; a comparison that holds is -1
            std::memcpy(&here, key + j, sizeof here);
            const auto add = [&](index_t begin, index_t end, auto&& precedes) __attribute__((always_inline)) {
                for (index_t i = begin; i < end; i += sets)
#pragma GCC unroll 4
                    for (int s = 0; s < sets; ++s) sums[s] -= precedes(keys{} + key[i + s], i + s);
            };
            add(0, j, [&](keys other, index_t) { return other >= here; });
            add(j, j + lanes, [&](keys other, index_t i) {
                return (other > here) | ((other == here) & (lane > keys{} + static_cast<B>(i - j)));
            });
            add(j + lanes, size, [&](keys other, index_t) { return other > here; });
            keys before = {};
            for (const keys& some : sums) before += some;
            for (int l = 0; l < lanes; ++l)
                if (before[l] < count) out[before[l]] = static_cast<expert_t>(j + l);
        }
    }
};
