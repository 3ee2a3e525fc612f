// Rows of one feed-forward expert, forward and backward, a block of columns at a time: what a product leaves in the
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

/// Panels that go through the activation together where memory takes part in it.
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
    multiply_panels(
        call.x, call.rows, call.hidden, first, last, call.kept_past_caches ? panels_together<T> : 1, call.block,
        call.room,
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

template <class T>
struct FfnBackward {
    FfnFunction function = Activation::relu;
    index_t rows = 0;
    const T* dout = nullptr;  // [rows, d]  without the combine weight
    index_t dout_row = 0;
    const T* weight = nullptr;       // [rows]  combine weights
    Right<T> down = {};              // [d, h]
    FfnRows<const T> kept = {};      // [rows, h]
    FfnRows<T> grad = {};            // [rows, h] (=)
    T* inner = nullptr;              // [rows, h] (=)  times the combine weight
    bool inner_past_caches = false;  // inner is too much to be found in a cache again
    T* along = nullptr;              // [rows, lanes] (+=)  <down^T dout, a>, in lanes
    T* block = nullptr;              // [max(rows, 8), columns of panels_together]
    T* room = nullptr;               // pack_room elements
};

namespace part {

/// Brings what finish_backward reads and writes of a group's columns nearer, for the rows of a tile, each with one of
/// the group's panels: the products take long enough for it to come from memory.
template <class T>
struct FinishAhead {
    const FfnBackward<T>& call;
    PanelGroup group;

    void operator()(index_t begin, index_t end) const {
        constexpr index_t line = 64 / static_cast<index_t>(sizeof(T));
        const index_t first = group.panel * panel_width<T>,
                      last = std::min(call.down.columns, first + group.count * panel_width<T>);
        for (index_t r = begin; r < end; ++r) {
            if (r % group.parts != group.part) continue;
            for (index_t j = first; j < last; j += line) {
                const index_t kept = r * call.kept.stride + j, grad = r * call.grad.stride + j;
                __builtin_prefetch(call.kept.up + kept, 0, 2);
                __builtin_prefetch(call.grad.up + grad, 1, 2);
                if (!call.inner_past_caches) __builtin_prefetch(call.inner + grad, 1, 2);
                if (call.grad.gate == nullptr) continue;
                __builtin_prefetch(call.kept.gate + kept, 0, 2);
                __builtin_prefetch(call.grad.gate + grad, 1, 2);
            }
        }
    }
};

/// dinner [rows, columns] of columns [j0, j1): the gradients of the pre-activations, and the weighted activation.
template <class Function, class T>
void finish_backward(const Function& function, const FfnBackward<T>& call, index_t j0, index_t j1, const T* dinner,
                     index_t dinner_row) {
    constexpr index_t lanes = Simd<T>::lanes;
    const bool stream = call.inner_past_caches && part::streams(call.inner + j0, lanes) &&
                        part::streams(call.inner + call.grad.stride, lanes);
    for (index_t r = 0; r < call.rows; ++r, dinner += dinner_row) {
        const T weight = call.weight[r];
        const T* const up = call.kept.up + r * call.kept.stride;
        const T* const gate = Function::gated ? call.kept.gate + r * call.kept.stride : up;
        T *const dup = call.grad.up + r * call.grad.stride, *const inner = call.inner + r * call.grad.stride;
        T* const dgate = Function::gated ? call.grad.gate + r * call.grad.stride : nullptr;
        auto along = load(call.along + r * lanes);
        for (index_t j = j0; j < j1; j += lanes) {
            const index_t here = std::min(lanes, j1 - j);
            if (here == lanes) {
                const auto d = load(dinner + (j - j0));
                const auto g = function.gradient(load(gate + j), load(up + j), weight * d);
                along += d * g.value;
                if (stream)
                    part::stream<T>(inner + j, weight * g.value);
                else
                    store<T>(inner + j, weight * g.value);
                store<T>(dup + j, g.dup);
                if constexpr (Function::gated) store<T>(dgate + j, g.dgate);
            } else {
                const auto d = load_some<T>(dinner + (j - j0), here);
                const auto g = function.gradient(load_some<T>(gate + j, here), load_some<T>(up + j, here), weight * d);
                along += d * g.value;
                store_some<T>(inner + j, weight * g.value, here);
                store_some<T>(dup + j, g.dup, here);
                if constexpr (Function::gated) store_some<T>(dgate + j, g.dgate, here);
            }
        }
        store(call.along + r * lanes, along);
    }
}

}  // namespace part

/// Back through `down` and the activation.
template <class T>
void ffn_backward_hidden(const FfnBackward<T>& call) {
    constexpr index_t width = panel_width<T>;
    const Operand<T> dout{const_cast<T*>(call.dout), call.dout_row};  // only read
    multiply_panels(
        dout, call.rows, call.down, index_t{0}, call.down.panels(), panels_together<T>, call.block, call.room,
        [](index_t, index_t, T*, index_t) { return false; },
        [&](const PanelGroup& group) {
            return part::FinishAhead<T>{call, group};
        },
        [&](index_t panel, index_t count, const T* block, index_t block_row) {
            with_function<T>(call.function, call.grad.gate != nullptr, [&](const auto& function) {
                const index_t j0 = panel * width, j1 = std::min(call.down.columns, j0 + count * width);
                part::finish_backward(function, call, j0, j1, block, block_row);
            });
        });
    if (call.inner_past_caches) part::end_stream();
}

/// inner[r] = a(gate[r], up[r]) of what is kept: for experts whose products are not those above.
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

/// The gradients of the pre-activations from dinner [rows, columns], as ffn_backward_hidden writes them.
template <class T>
void ffn_activate_backward(const FfnBackward<T>& call, index_t columns, const T* dinner, index_t dinner_row) {
    with_function<T>(call.function, call.grad.gate != nullptr,
                     [&](const auto& a) { part::finish_backward(a, call, index_t{0}, columns, dinner, dinner_row); });
}

/// Products and feed-forward experts, for code outside.
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
