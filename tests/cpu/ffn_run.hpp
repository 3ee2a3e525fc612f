// One call of the CPU's feed-forward experts with everything that it reads and writes, and the same by plain loops.
// What instantiates kernels is compiled once, in ffn_run.cpp.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/core/routing.hpp"
#include "steelyard/cpu/device.hpp"
#include "steelyard/ops/expert_ops.hpp"

namespace steelyard::testing {

/// Sizes and options of a call.
struct FfnCase {
    std::vector<index_t> rows;  // of each expert
    index_t width = 1, hidden = 1;
    FfnFunction function = Activation::relu;
    bool gated = false, bias = false, weighted = true;
    index_t top_k = 1;
    index_t padding = 0;    // elements behind each row of every tensor
    index_t first_row = 0;  // rows below belong to others
    index_t dropped = 0;    // choices without a row

    [[nodiscard]] index_t experts() const { return static_cast<index_t>(rows.size()); }
    [[nodiscard]] index_t filled() const {
        index_t n = 0;
        for (const index_t of_expert : rows) n += of_expert;
        return n;
    }
    [[nodiscard]] index_t tokens() const { return (filled() + dropped + top_k - 1) / top_k; }
};

std::string text(const FfnCase& c);

/// Memory that begins with a cache line, as that of a layer does.
template <class T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};

    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), line)); }
    void deallocate(T* memory, std::size_t) { ::operator delete(memory, line); }
    friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};

/// An owned tensor. What lies between its rows and behind the last one is NaN.
template <class T, int Rank>
struct Tensor {
    std::vector<T, LineAllocator<T>> numbers;
    view<T, Rank> v;

    Tensor() = default;
    Tensor(const Tensor&) = delete;

    template <class... Extents>
    void make(index_t padding, double value, Extents... extents) {
        v = view<T, Rank>(nullptr, extents...);
        index_t stride = v.extents[Rank - 1] + padding;
        for (int r = Rank - 2; r >= 0; --r) v.strides[r] = stride, stride *= v.extents[r];
        numbers.assign(static_cast<std::size_t>(stride) + 1, std::numeric_limits<T>::quiet_NaN());
        v.data = numbers.data();
        set([&](index_t) { return value; });
    }
    template <class F>
    void set(F&& value) {
        index_t rows = 1;
        for (int r = 0; r < Rank - 1; ++r) rows *= v.extents[r];
        for (index_t i = 0; i < rows; ++i)
            for (index_t j = 0; j < v.extents[Rank - 1]; ++j)
                v.data[i * v.strides[Rank - 2] + j] = static_cast<T>(value(i * v.extents[Rank - 1] + j));
    }
    /// The same numbers, rounded where T holds fewer bits.
    template <class From>
    void take(const Tensor<From, Rank>& from) {
        for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<T>(from.numbers[i]);
    }
};

template <class T>
struct FfnRun {
    FfnCase c;
    std::vector<index_t> offsets;
    std::vector<std::int32_t> choice, row;
    Plan<> plan;
    // Read.
    Tensor<T, 2> x, dy, weight, up_bias, down_bias, gate_bias;
    Tensor<T, 3> gate, up, down;
    // Written by forward, and read by backward; written by backward.
    Tensor<T, 2> kept_gate, kept_up, rows;
    Tensor<T, 2> work_gate, work_up, inner, drows, dweight, dup_bias, ddown_bias, dgate_bias;
    Tensor<T, 3> dgate, dup, ddown;
    Bytes packed;

    /// Inputs of about 1, outputs of about 1; what is written (=) is NaN, what is added to begins somewhere.
    explicit FfnRun(const FfnCase& of);
    FfnRun(const FfnRun&) = delete;

    [[nodiscard]] FfnWeights<const T> weights() const;
    [[nodiscard]] FfnWeights<T> grads() const;
    [[nodiscard]] FfnKept<T> kept() const;

    void forward(const Cpu& device) { forward(device, weights(), kept(), rows.v); }
    void forward(const Cpu& device, const FfnWeights<const T>& weights, const FfnKept<T>& kept, view<T, 2> rows);
    void backward(const Cpu& device) {
        backward(device, weights(), c.weighted ? view<const T, 2>(weight.v) : view<const T, 2>(), dweight.v, grads());
    }
    void backward(const Cpu& device, const FfnWeights<const T>& weights, view<const T, 2> weight, view<T, 2> dweight,
                  const FfnWeights<T>& grads);
    void both(const Cpu& device) { forward(device), backward(device); }

    /// Makes `packed`, and returns the weights with it. Without matrices: only what it stands in for is absent.
    FfnWeights<const T> pack(const Cpu& device, PackedFor purpose, bool matrices = true,
                             PackedFormat format = PackedFormat::full);
    /// What the device says to `packed` as that of a case.
    [[nodiscard]] Status check_packed(const Cpu& device, const FfnCase& of) const;

    /// Calls body(name, mine, the other's) with each tensor that a call writes.
    template <class Other, class Body>
    void results(Other& other, Body&& body) {
        body("kept_gate", kept_gate, other.kept_gate), body("kept_up", kept_up, other.kept_up);
        body("rows", rows, other.rows), body("drows", drows, other.drows), body("dweight", dweight, other.dweight);
        body("dgate", dgate, other.dgate), body("dup", dup, other.dup), body("ddown", ddown, other.ddown);
        body("dup_bias", dup_bias, other.dup_bias), body("ddown_bias", ddown_bias, other.ddown_bias);
        body("dgate_bias", dgate_bias, other.dgate_bias);
    }
    /// The same without those of forward.
    template <class Other, class Body>
    void gradients(Other& other, Body&& body) {
        results(other, [&](const std::string& name, auto& mine, auto& others) {
            if (name.starts_with('d')) body(name, mine, others);
        });
    }

private:
    std::byte* scratch(const Cpu& device);

    Bytes scratch_;
};

extern template struct FfnRun<float>;
extern template struct FfnRun<double>;

/// Writes what forward writes, and then what backward writes from the pre-activations that are there.
void plain_forward(FfnRun<double>& run);
void plain_backward(FfnRun<double>& run);

template <class T, int Rank>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
    return a.numbers.size() == b.numbers.size() &&
           std::memcmp(a.numbers.data(), b.numbers.data(), a.numbers.size() * sizeof(T)) == 0;
}

/// The largest |a - b| over the largest |b|, or over 1 if that is more; infinite where one is NaN, being not written,
/// and the other is not.
template <class T, int Rank>
double difference(const Tensor<T, Rank>& a, const Tensor<double, Rank>& b) {
    double worst = a.numbers.size() == b.numbers.size() ? 0 : std::numeric_limits<double>::infinity(), largest = 1;
    for (std::size_t i = 0; i < b.numbers.size() && i < a.numbers.size(); ++i) {
        const double came = static_cast<double>(a.numbers[i]), wanted = b.numbers[i], one = std::abs(came - wanted);
        if (came != came && wanted != wanted) continue;
        worst = one <= worst ? worst : one == one ? one : std::numeric_limits<double>::infinity();
        largest = std::abs(wanted) <= largest ? largest : std::abs(wanted);
    }
    return worst / largest;
}

}  // namespace steelyard::testing
