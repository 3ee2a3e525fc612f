// The random numbers of core/random.hpp and of RouterNoise (ops/router_ops.hpp) for a run of positions: the same words,
// and functions of them to rounding.
namespace part {

using Double = Simd<double>;

/// The words at `lanes` neighbouring positions of a stream, from `first` on, as numbers. The twin of Philox::words.
struct DrawnWords {
    typename Double::vec word[4];

    [[gnu::always_inline]] DrawnWords(const Philox& stream, std::uint64_t first) {
        // 32 bits in the lower half of each lane; what is in the upper one has no meaning.
        typename Double::bits position = {};
        for (int l = 0; l < Double::lanes; ++l) position[l] = first + static_cast<std::uint64_t>(l);
        const auto high = typename Double::bits{} + stream.high();
        typename Double::bits c[4] = {position, position >> 32, high, high >> 32};
        auto key = stream.key();
#pragma GCC unroll 10
        for (int round = 0; round < Philox::rounds; ++round) {
            const auto p0 = multiply_low(c[0], Philox::factor_0), p1 = multiply_low(c[2], Philox::factor_1);
            c[0] = (p1 >> 32) ^ c[1] ^ std::uint64_t{key[0]};
            c[1] = p1;
            c[2] = (p0 >> 32) ^ c[3] ^ std::uint64_t{key[1]};
            c[3] = p0;
            key[0] += Philox::increment_0;
            key[1] += Philox::increment_1;
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // the low bits of 2^52 + w are w
            c[i] = (c[i] & 0xFFFFFFFFu) | std::bit_cast<std::uint64_t>(0x1p52);
            std::memcpy(&word[i], &c[i], sizeof c[i]);
            word[i] -= 0x1p52;
        }
    }
    /// Uniform in (0, 1).
    [[nodiscard]] Double::vec unit(int i) const { return (word[i] + 0.5) * 0x1p-32; }
};

/// Calls write(index of the first, elements) with element 4 l + i = value[i][l]: in the order that positions have them.
template <class Write>
[[gnu::always_inline]] inline void in_order(const Double::vec (&value)[4], Write&& write) {
    constexpr int lanes = Double::lanes, half = lanes / 2;
    constexpr auto all = std::make_index_sequence<lanes>{};
    const auto low = [&](auto a, auto b) { return interleave<double, 0>(a, b, all); };
    const auto high = [&](auto a, auto b) { return interleave<double, half>(a, b, all); };
    const auto even = low(value[0], value[2]), odd = low(value[1], value[3]);
    const auto later_even = high(value[0], value[2]), later_odd = high(value[1], value[3]);
    write(0 * lanes, low(even, odd));
    write(1 * lanes, high(even, odd));
    write(2 * lanes, low(later_even, later_odd));
    write(3 * lanes, high(later_even, later_odd));
}

/// log(x) of normal numbers, to a few units in the last place: x = 2^n m with sqrt(1/2) <= m < sqrt(2), and log m =
/// 2 artanh((m - 1) / (m + 1)) by its series, whose first left out term is below 1e-18.
[[gnu::always_inline]] inline Double::vec log_positive(Double::vec x) {
    constexpr auto root = std::bit_cast<std::uint64_t>(0x1.6a09e667f3bcdp-1);
    static constexpr auto series = cpu::detail::inverse_odds<double, 11>();
    Double::bits bits;
    std::memcpy(&bits, &x, sizeof x);
    bits -= root;
    // n, of twelve bits with its sign, as a number.
    const Double::bits exponent = ((bits >> 52) ^ 0x800u) | std::bit_cast<std::uint64_t>(0x1p52);
    Double::vec n, m;
    std::memcpy(&n, &exponent, sizeof n);
    n -= 0x1p52 + 0x800;
    bits = (bits & 0xFFFFFFFFFFFFFu) + root;
    std::memcpy(&m, &bits, sizeof m);
    const Double::vec s = (m - 1.0) / (m + 1.0);
    return n * 0.693147180559945309417232 + 2.0 * s * polynomial<double>(s * s, series);
}

/// 1 / first!, -1 / (first + 2)!, 1 / (first + 4)!, ...
template <std::size_t N>
constexpr std::array<double, N> alternating_factorials(int first) {
    std::array<double, N> c{};
    double term = 1.0;
    for (std::size_t i = 0; i < N; ++i) {
        c[i] = term;
        for (int j = 1; j <= 2; ++j) term /= static_cast<double>(first + 2 * static_cast<int>(i) + j);
        term = -term;
    }
    return c;
}

/// Cosine and sine of w / 2^32 turns, for integers w from 0 to 2^32: of the angle to the nearest quarter turn, by their
/// Taylor series, whose first left out terms are below 5e-17.
struct CosineSine {
    Double::vec cosine, sine;

    [[gnu::always_inline]] explicit CosineSine(Double::vec w) {
        static constexpr auto cosines = alternating_factorials<9>(0);
        static constexpr auto sines = alternating_factorials<8>(1);
        constexpr double round = 6755399441055744.0;  // 1.5 * 2^52: the low bits of the sum hold the quarter
        const Double::vec quarters = w * 0x1p-30, shifted = quarters + round;
        const Double::vec angle = (quarters - (shifted - round)) * 1.570796326794896619231322, square = angle * angle;
        const Double::vec c = polynomial<double>(square, cosines), s = angle * polynomial<double>(square, sines);
        Double::bits quarter;
        std::memcpy(&quarter, &shifted, sizeof quarter);
        const auto odd = (quarter & 1u) != 0u;
        cosine = signed_by((quarter + 1u) & 2u, odd ? s : c);
        sine = signed_by(quarter & 2u, odd ? c : s);
    }

private:
    /// Negative where bit 1 is set.
    [[gnu::always_inline]] static Double::vec signed_by(Double::bits two, Double::vec v) {
        Double::bits bits;
        std::memcpy(&bits, &v, sizeof v);
        bits ^= two << 62;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }
};

}  // namespace part

/// What is drawn for the elements of a row: element j takes entry j % 4 of position first + j / 4 of the stream.
struct DrawKernels {
    /// out[j] (=) x[j] uniform(1 - jitter, 1 + jitter)
    template <class T>
    static void jitter(const Philox& stream, std::uint64_t first, double jitter, index_t count, const T* x, T* out) {
        for_runs(stream, first, count, [&](const part::DrawnWords& drawn, index_t begin) {
            part::Double::vec factor[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) factor[i] = 1.0 + jitter * (2.0 * drawn.unit(i) - 1.0);
            part::in_order(factor, [&](index_t j, part::Double::vec f) { write(out, begin + j, count, f, x); });
        });
    }

    /// out[j] (=) scale N(0, 1), by Box and Muller.
    template <class T>
    static void noise(const Philox& stream, std::uint64_t first, double scale, index_t count, T* out) {
        for_runs(stream, first, count, [&](const part::DrawnWords& drawn, index_t begin) {
            part::Double::vec value[4];
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
                const auto radius = scale * square_root<double>(-2.0 * part::log_positive(drawn.unit(i)));
                const part::CosineSine at(drawn.word[i + 1]);
                value[i] = radius * at.cosine;
                value[i + 1] = radius * at.sine;
            }
            part::in_order(value, [&](index_t j, part::Double::vec v) { write<T>(out, begin + j, count, v, nullptr); });
        });
    }

    /// out[j] (=) Phi(u[j]), the normal distribution.
    template <class T>
    static void normal_cdf(const T* u, index_t count, T* out) {
        for_lanes<T>(count, [&](index_t j, index_t here) {
            store_some(out + j, normal<T>(load_some<T>(u + j, here)).cdf, here);
        });
    }

private:
    template <class Body>
    [[gnu::always_inline]] static void for_runs(const Philox& stream, std::uint64_t first, index_t count, Body&& body) {
        constexpr index_t elements = 4 * part::Double::lanes;
        for (index_t begin = 0; begin < count; begin += elements, first += part::Double::lanes)
            body(part::DrawnWords(stream, first), begin);
    }

    /// out[j] ... (=) v, times x[j] ... where there is one; j or more of them are beyond the row's end.
    template <class T>
    [[gnu::always_inline]] static void write(T* out, index_t j, index_t count, part::Double::vec v, const T* x) {
        using vec = typename AsDouble<T>::vec;
        const auto copy = [here = count - j](void* to, const void* from) {
            if (here >= part::Double::lanes)
                std::memcpy(to, from, sizeof(vec));
            else if (here > 0)
                std::memcpy(to, from, static_cast<std::size_t>(here) * sizeof(T));
        };
        if (x != nullptr) {
            vec from = {};
            copy(&from, x + j);
            v *= __builtin_convertvector(from, part::Double::vec);
        }
        const vec to = __builtin_convertvector(v, vec);
        copy(out + j, &to);
    }
};
