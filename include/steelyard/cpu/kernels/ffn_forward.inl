// Forward of some rows of one feed-forward expert, a block of columns at a time: what a product leaves in the
// first-level cache goes through the activation there.

/// The pre-activations of some rows.
template <class T>
struct FfnRows {
    T* gate = nullptr;  // [rows, h], where gated
    T* up = nullptr;    // [rows, h]
    index_t stride = 0;
};

/// Forward of some rows with weights of the format F.
template <class T, class F = T>
struct FfnForward {
    /// Whether the hidden layer is written in the format of the second product at once: T itself needs no other, and
    /// int8 needs all of a group first.
    static constexpr bool hidden_in_format = !std::is_same_v<T, F> && !Format<F>::grouped;

    FfnFunction function = Activation::relu;
    index_t rows = 0;
    Operand<F> x = {};              // [rows, d]
    Right<F> hidden = {};           // [d, h]: gate and up paired, or up alone
    Right<F> down = {};             // [h, d]
    const T* gate_bias = nullptr;   // [h], or null
    const T* up_bias = nullptr;     // [h], or null
    const T* down_bias = nullptr;   // [d], or null
    FfnRows<T> kept = {};           // (=), or null
    bool kept_past_caches = false;  // kept is too much to be found in a cache again
    T* inner = nullptr;             // [rows, columns of one ffn_hidden] (=), or null
    index_t inner_row = 0;
    Operand<F> inner_operand = {};  // the same, where F is not T: of what is in `inner`, or without one
    T* out = nullptr;               // [rows, d] (=), or null
    index_t out_row = 0;
    bool out_past_caches = false;              // out is too much to be found in a cache again
    T* block = nullptr;                        // [max(rows, 8), columns of panels_together]
    typename Format<F>::word* room = nullptr;  // pack_room words, where the weights are not stored
};

/// Panels that go through the activation together where memory takes part in it, and of the fewest rows: memory waits
/// while it is computed.
template <class T>
inline constexpr index_t panels_together = finished_row_bytes / (panel_width<T> * index_t{sizeof(T)});

namespace part {

/// block[r][j] = bias[j], or nothing where there is none. Whether there is one.
template <class T, class F>
bool start_with_bias(const FfnForward<T, F>& call, index_t panel, index_t count, T* block, index_t block_row) {
    if (call.up_bias == nullptr) return false;
    constexpr index_t lanes = Simd<T>::lanes;
    const index_t vectors = panel_vectors * count;
    for (index_t v = 0; v < vectors; ++v) {
        const index_t j = call.hidden.paired ? (panel + v / 2) * lanes : (panel * panel_vectors + v) * lanes;
        const T* const bias = call.hidden.paired && v % 2 == 0 ? call.gate_bias : call.up_bias;
        const index_t here = std::clamp<index_t>(call.hidden.columns - j, 0, lanes);
        const auto values = load_some<T>(bias + (here > 0 ? j : 0), here);
        for (index_t r = 0; r < call.rows; ++r) store(block + r * block_row + v * lanes, values);
    }
    return true;
}

/// Pre-activations [rows, vectors] of columns from `panel` on: through the activation to `inner` or to
/// `inner_operand`, if to either.
template <class Function, class T, class F>
void activate_hidden(const Function& function, const FfnForward<T, F>& call, index_t panel, index_t count,
                     index_t first, const T* block, index_t block_row) {
    constexpr index_t lanes = Simd<T>::lanes, step = Function::gated ? 2 : 1;
    const index_t rows = call.rows, vectors = panel_vectors * count;
    if (call.inner == nullptr && call.inner_operand.words == nullptr) return;
    for (index_t v = 0; v < vectors; v += step) {
        const index_t j = (panel * panel_vectors + v) / step * lanes;
        const index_t here = std::min(lanes, call.hidden.columns - j);
        if (here <= 0) break;
        const T* from = block + v * lanes;
        const auto each_row = [&](auto&& write) __attribute__((always_inline)) {
            for (index_t r = 0; r < rows; ++r, from += block_row)
                write(r, function.value(load(from), load(from + (step - 1) * lanes)));
        };
        if (call.inner != nullptr) {
            T* const to = call.inner + (j - first);
            const index_t to_row = call.inner_row;
            each_row([&](index_t r, auto value) { store_some<T>(to + r * to_row, value, here); });
        } else if constexpr (FfnForward<T, F>::hidden_in_format) {
            const auto to = call.inner_operand;
            each_row([&](index_t r, auto value) { write_vector(value, j - first, here, to, r); });
        }
    }
}

/// The same, kept as they are.
template <class Function, class T, class F>
void keep_hidden(const FfnForward<T, F>& call, index_t panel, index_t count, const T* block, index_t block_row) {
    constexpr index_t lanes = Simd<T>::lanes, step = Function::gated ? 2 : 1;
    const index_t vectors = panel_vectors * count;
    // Whole lines that go past the caches need not be read first.
    const bool stream = call.kept_past_caches && vector_bytes == 64 &&
                        part::streams(call.kept.up + panel * panel_vectors / step * lanes, lanes) &&
                        part::streams(call.kept.up + call.kept.stride, lanes) &&
                        (!Function::gated || part::streams(call.kept.gate, lanes));
    for (index_t r = 0; r < call.rows; ++r, block += block_row)
        for (index_t v = 0; v < vectors; v += step) {
            const index_t j = (panel * panel_vectors + v) / step * lanes,
                          here = std::min(lanes, call.hidden.columns - j);
            if (here <= 0) break;
            const auto keep = [&](T * kept, index_t vector) __attribute__((always_inline)) {
                const auto value = load(block + vector * lanes);
                T* const to = kept + r * call.kept.stride + j;
                if (stream && here == lanes)
                    part::stream<T>(to, value);
                else
                    store_some<T>(to, value, here);
            };
            keep(call.kept.up, v + step - 1);
            if constexpr (Function::gated) keep(call.kept.gate, v);
        }
}

}  // namespace part

/// inner = a(x W + b) for panels [first, last) of `hidden`; `inner` begins with the first of their columns.
template <class T, class F>
void ffn_hidden(const FfnForward<T, F>& call, index_t first, index_t last) {
    const index_t first_column = first * call.hidden.panel_columns();
    const bool together = call.kept_past_caches || call.rows <= few_rows / 2;
    multiply_panels(
        call.x, call.rows, call.hidden, first, last, together ? panels_together<T> : 1, call.block, call.room,
        [&](index_t panel, index_t count, T* block, index_t block_row) {
            return part::start_with_bias(call, panel, count, block, block_row);
        },
        [](const PanelGroup&) { return Nothing{}; },
        [&](index_t panel, index_t count, const T* block, index_t block_row) {
            with_function<T>(call.function, call.hidden.paired, [&](const auto& function) {
                using Function = std::remove_cvref_t<decltype(function)>;
                if (call.kept.up != nullptr) part::keep_hidden<Function>(call, panel, count, block, block_row);
                part::activate_hidden(function, call, panel, count, first_column, block, block_row);
            });
        });
    if (call.kept_past_caches) part::end_stream();
}

/// out (= or +=, where `begin` is not 0) inner [rows, begin to end] times those rows of `down`, over its panels.
template <class T, class F>
void ffn_output(const FfnForward<T, F>& call, index_t first, index_t last, index_t begin, index_t end) {
    const index_t j0 = first * panel_width<F>, j1 = std::min(call.down.columns, last * panel_width<F>);
    const bool bias = begin == 0 && call.down_bias != nullptr;
    if (bias)
        for (index_t r = 0; r < call.rows; ++r)
            std::memcpy(call.out + r * call.out_row + j0, call.down_bias + j0,
                        static_cast<std::size_t>(j1 - j0) * sizeof(T));
    Product<F> product;
    product.rows = call.rows;
    if constexpr (std::is_same_v<T, F>) {
        product.a = {call.inner, call.inner_row};
    } else {
        product.a = call.inner_operand;
        if (call.inner != nullptr) write_operand(call.inner, call.inner_row, call.rows, end - begin, product.a);
    }
    product.b = call.down;
    product.c = call.out;
    product.c_row = call.out_row;
    product.add = begin > 0 || bias;
    product.past_caches = call.out_past_caches && end == call.down.depth;  // nothing is added later
    product.room = call.room;
    multiply(product, first, last, begin / Format<F>::per_word, words_of<F>(end));
}

/// inner[r] = a(gate[r], up[r]) of what is kept: for experts with products of their own.
template <class T>
void ffn_activate(const FfnFunction& function, bool gated, index_t rows, index_t columns, const FfnRows<const T>& kept,
                  T* inner, index_t inner_row) {
    with_function<T>(function, gated, [&](const auto& a) {
        for (index_t r = 0; r < rows; ++r) {
            const T* const up = kept.up + r * kept.stride;
            const T* const gate = gated ? kept.gate + r * kept.stride : up;
            T* const out = inner + r * inner_row;
            for_lanes<T>(columns, [&](index_t j, auto count) {
                store_some<T>(out + j, a.value(load_some<T>(gate + j, count), load_some<T>(up + j, count)), count);
            });
        }
    });
}
