// Backward of some rows of one feed-forward expert through its second product and the activation, as in forward.

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

/// The gradients of the pre-activations from dinner [rows, columns], as ffn_backward_hidden writes them.
template <class T>
void ffn_activate_backward(const FfnBackward<T>& call, index_t columns, const T* dinner, index_t dinner_row) {
    with_function<T>(call.function, call.grad.gate != nullptr,
                     [&](const auto& a) { part::finish_backward(a, call, index_t{0}, columns, dinner, dinner_row); });
}
