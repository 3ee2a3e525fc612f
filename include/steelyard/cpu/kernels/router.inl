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
};
