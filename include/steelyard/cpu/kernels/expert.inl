// Products and feed-forward experts, as code outside calls them.
/// Kernels of experts.
struct ExpertKernels {
    template <class T>
    using RightOf = Right<T>;
    template <class T>
    using ProductOf = Product<T>;
    template <class T>
    using OuterProductOf = OuterProduct<T>;
    template <class T, class F>
    using ForwardOf = FfnForward<T, F>;
    template <class T>
    using BackwardOf = FfnBackward<T>;

    template <class T>
    static constexpr index_t lanes = Simd<T>::lanes;
    template <class T>
    static constexpr index_t panel_columns = panel_width<T>;
    /// Bytes of an element of a left operand.
    template <class F>
    static constexpr index_t element_bytes = index_t{sizeof(typename Format<F>::left)} / Format<F>::per_word;

    template <class T>
    static void product(const Product<T>& of) {
        multiply(of);
    }
    template <class T>
    static void outer_product(const OuterProduct<T>& of) {
        multiply(of);
    }
    template <class T>
    static void to_panels(const T* row, index_t columns, T* panels, index_t apart) {
        spread_row(row, columns, panels, apart);
    }
    /// An operand of `rows` rows of at most `n` elements in `memory`, aligned to 64, and one row into it.
    template <class T>
    [[nodiscard]] static Operand<T> operand(std::byte* memory, index_t rows, index_t n) {
        return place_operand<T>(memory, rows, n);
    }
    template <class T>
    static void write_row(const float* from, index_t n, const Operand<T>& to, index_t row) {
        part::write_row(from, n, to, row);
    }
    template <class T, class F>
    static void hidden(const FfnForward<T, F>& call, index_t first, index_t last) {
        ffn_hidden(call, first, last);
    }
    template <class T, class F>
    static void output(const FfnForward<T, F>& call, index_t first, index_t last, index_t begin, index_t end) {
        ffn_output(call, first, last, begin, end);
    }
    template <class T>
    static void backward_hidden(const FfnBackward<T>& call) {
        ffn_backward_hidden(call);
    }
    template <class T>
    [[nodiscard]] static T sum(const T* of_lanes) {
        return sum_lanes<T>(load(of_lanes));
    }
    template <class T>
    static void activate(const FfnFunction& function, bool gated, index_t rows, index_t columns,
                         const FfnRows<const T>& kept, T* inner, index_t inner_row) {
        ffn_activate(function, gated, rows, columns, kept, inner, inner_row);
    }
    template <class T>
    static void activate_backward(const FfnBackward<T>& call, index_t columns, const T* dinner, index_t dinner_row) {
        ffn_activate_backward(call, columns, dinner, dinner_row);
    }
};
