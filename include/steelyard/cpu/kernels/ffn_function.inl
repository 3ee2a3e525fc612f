// What stands between the matrices of a feed-forward expert, a vector at a time.
/// The activation a, and the gradients of the pre-activations from `da`.
template <class T>
struct FfnGradient {
    typename Simd<T>::vec value, dgate, dup;
};

/// factor act(u)
template <Activation A, class T>
struct PlainFunction {
    using vec = typename Simd<T>::vec;
    static constexpr bool gated = false;
    T factor;

    [[nodiscard]] vec value(vec, vec up) const { return scaled(activate<A, T>(up).value); }
    [[nodiscard]] FfnGradient<T> gradient(vec, vec up, vec da) const {
        const auto [value, slope] = activate<A, T>(up);
        return {scaled(value), vec{}, da * scaled(slope)};
    }

private:
    [[nodiscard]] vec scaled(vec v) const {
        if constexpr (A == Activation::identity) return factor * v;
        return v;
    }
};

/// act(g) u
template <Activation A, class T>
struct GatedFunction {
    using vec = typename Simd<T>::vec;
    static constexpr bool gated = true;

    [[nodiscard]] vec value(vec gate, vec up) const { return activate<A, T>(gate).value * up; }
    [[nodiscard]] FfnGradient<T> gradient(vec gate, vec up, vec da) const {
        const auto [value, slope] = activate<A, T>(gate);
        return {value * up, da * up * slope, da * value};
    }
};

/// (clamp(u) + 1) swish(min(g, limit)). A NaN gives a NaN, with the gradient 0 beyond a clamp.
template <class T>
struct ClampedFunction {
    using vec = typename Simd<T>::vec;
    static constexpr bool gated = true;
    T limit, alpha;

    [[nodiscard]] vec value(vec gate, vec up) const { return (clamp(up) + T(1)) * swish<T>(below(gate), alpha).value; }
    [[nodiscard]] FfnGradient<T> gradient(vec gate, vec up, vec da) const {
        const vec zero = {}, most = zero + limit, shifted = clamp(up) + T(1);
        const auto [value, slope] = swish<T>(below(gate), alpha);
        const vec dgate = da * shifted * slope, dup = da * value;
        return {shifted * value, gate <= most ? dgate : zero, up <= most ? (up >= -most ? dup : zero) : zero};
    }

private:
    [[nodiscard]] vec below(vec v) const {
        const vec most = vec{} + limit;
        return v > most ? most : v;
    }
    [[nodiscard]] vec clamp(vec v) const {
        const vec least = vec{} - limit;
        return below(v < least ? least : v);
    }
};

/// Calls `body(function)` with the function that `function` describes, its kind being known at compile time.
template <class T, class Body>
inline void with_function(const FfnFunction& function, bool gated, Body&& body) {
    if (function.clamped)
        return body(ClampedFunction<T>{static_cast<T>(function.clamp.limit), static_cast<T>(function.clamp.alpha)});
    with_activation(function.activation, [&]<Activation A>() {
        if (gated)
            body(GatedFunction<A, T>{});
        else
            body(PlainFunction<A, T>{static_cast<T>(function.factor)});
    });
}
