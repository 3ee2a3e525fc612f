// libxsmm, expert by expert, for inference: batch-reduce kernels over weights in blocks, in float or bfloat16.
#include <libxsmm.h>

#include "../threads.hpp"
#include "products.hpp"

namespace steelyard_bench {
namespace {

/// Column-major products of blocks, summed over blocks of the depth, into float.
template <class T>
struct Kernel;
template <>
struct Kernel<float> {
    using Function = libxsmm_smmfunction_reducebatch_strd;
    static constexpr auto dispatch = libxsmm_smmdispatch_reducebatch_strd;
    static constexpr index_t together = 1;  // depth elements side by side
    static constexpr int flags = LIBXSMM_GEMM_FLAG_NONE;
};
template <>
struct Kernel<libxsmm_bfloat16> {
    using Function = libxsmm_bsmmfunction_reducebatch_strd;
    static constexpr auto dispatch = libxsmm_bsmmdispatch_reducebatch_strd;
    static constexpr index_t together = 2;
    static constexpr int flags = LIBXSMM_GEMM_FLAG_VNNI_A;
};

index_t divisor(index_t of, index_t most) {
    while (of % most != 0) most /= 2;
    return most;
}

void convert(const float* from, float* to, index_t count) { std::copy_n(from, count, to); }
void convert(const float* from, libxsmm_bfloat16* to, index_t count) {
    const auto* bits = reinterpret_cast<const std::uint32_t*>(from);
    for (index_t i = 0; i < count; ++i)
        to[i] = static_cast<libxsmm_bfloat16>((bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16);
}

/// The matrices [n, k] of one kind of all experts, as [n / 64][k / 128][128][64].
template <class T>
class BlockedMatrices {
    using K = Kernel<T>;
    static constexpr index_t rows_at_once = 64;  // of the panel that stays in the second cache beside the weights

public:
    explicit BlockedMatrices(const view<float, 3>& from)
        : n_(from.extents[1]),
          k_(from.extents[2]),
          block_n_(divisor(n_, 64)),
          block_k_(divisor(k_, 128)),
          memory_(static_cast<std::size_t>(from.size()) * sizeof(T)) {
        for_each_task(2, from.extents[0], [&](index_t e) {
            T* to = memory_.as<T>() + e * n_ * k_;
            std::vector<float> block(static_cast<std::size_t>(block_n_ * block_k_));
            for (index_t n = 0; n < n_; n += block_n_)
                for (index_t k = 0; k < k_; k += block_k_, to += block.size()) {
                    for (index_t i = 0; i < block_n_; ++i)
                        for (index_t j = 0; j < block_k_; ++j)
                            block[static_cast<std::size_t>(((j / K::together) * block_n_ + i) * K::together +
                                                           j % K::together)] = from(e, n + i, k + j);
                    convert(block.data(), to, std::ssize(block));
                }
        });
    }

    /// c[m,n] = a[m,k] w^T
    void multiply(index_t e, index_t m, const T* a, float* c) const {
        const T* const weights = memory_.as<T>() + e * n_ * k_;
        const auto blocks = static_cast<unsigned long long>(k_ / block_k_);
        for (index_t n = 0; n < n_; n += block_n_)
            for (index_t row = 0; row < m; row += rows_at_once)
                kernel(std::min(rows_at_once, m - row))(weights + n * k_, a + row * k_, c + row * n_ + n, &blocks);
    }

private:
    [[nodiscard]] typename K::Function kernel(index_t rows) const {
        thread_local struct {
            std::uint64_t of = 0;
            index_t rows = 0;
            typename K::Function function = nullptr;
        } last;
        if (last.of == number_ && last.rows == rows) return last.function;
        const auto lda = static_cast<int>(block_n_), ldb = static_cast<int>(k_), ldc = static_cast<int>(n_);
        const float alpha = 1, beta = 0;
        const int flags = K::flags, prefetch = LIBXSMM_GEMM_PREFETCH_NONE;
        last = {number_, rows,
                K::dispatch(lda, static_cast<int>(rows), static_cast<int>(block_k_),
                            static_cast<int>(block_n_ * block_k_ * index_t{sizeof(T)}),
                            static_cast<int>(block_k_ * index_t{sizeof(T)}), &lda, &ldb, &ldc, &alpha, &beta, &flags,
                            &prefetch)};
        if (last.function == nullptr) throw std::runtime_error("libxsmm has no kernel for this product");
        return last.function;
    }

    std::uint64_t number_ = unique_number();
    index_t n_, k_, block_n_, block_k_;
    HugeMemory memory_;
};

template <class T>
class XsmmProducts final : public Products {
public:
    XsmmProducts(const Model& model, const Case& of)
        : width_(of.shape.width),
          hidden_(of.shape.hidden),
          gate_(model.weights().gate),
          up_(model.weights().up),
          down_(model.weights().down) {}

    [[nodiscard]] index_t row_block() const override { return 256; }
    void gate_and_up(index_t e, index_t m, const float* x, float* gate, float* up) const override {
        const T* const rows = elements(x, m * width_);
        gate_.multiply(e, m, rows, gate);
        up_.multiply(e, m, rows, up);
    }
    void down(index_t e, index_t m, const float* inner, float* y) const override {
        down_.multiply(e, m, elements(inner, m * hidden_), y);
    }

private:
    static const T* elements(const float* from, index_t count) {
        if constexpr (std::is_same_v<T, float>) {
            return from;
        } else {
            thread_local std::vector<T> to;
            to.resize(static_cast<std::size_t>(count));
            convert(from, to.data(), count);
            return to.data();
        }
    }
    index_t width_, hidden_;
    BlockedMatrices<T> gate_, up_, down_;
};

const Registration registered({.name = "libxsmm",
                               .version = LIBXSMM_VERSION + std::string(", weights blocked"),
                               .place = 20,
                               .supports =
                                   [](const Case& of) { return of.pass == Pass::forward && of.type != Type::int8; },
                               .make =
                                   [](const Model& model, const Case& of) {
                                       return of.type == Type::f32
                                                  ? make_products_contender<XsmmProducts<float>>(model, of)
                                                  : make_products_contender<XsmmProducts<libxsmm_bfloat16>>(model, of);
                                   }});

}  // namespace
}  // namespace steelyard_bench
