// Any CBLAS, expert by expert.
#include <cblas.h>

#include "products.hpp"

namespace steelyard_bench {
namespace {

class CblasProducts final : public Blas {
public:
    CblasProducts(const Model& model, const Case&) : Blas(model) {
#if defined(OPENBLAS_VERSION)
        openblas_set_num_threads(1);
#endif
    }

    void nt(const Product& p) const override { multiply(p, CblasNoTrans, CblasTrans, p.k, p.k); }
    void nn(const Product& p) const override { multiply(p, CblasNoTrans, CblasNoTrans, p.k, p.n); }
    void tn(const Product& p) const override { multiply(p, CblasTrans, CblasNoTrans, p.m, p.n); }

private:
    static void multiply(const Product& p, CBLAS_TRANSPOSE a, CBLAS_TRANSPOSE b, index_t lda, index_t ldb) {
        cblas_sgemm(CblasRowMajor, a, b, static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), 1.0f, p.a,
                    static_cast<int>(lda), p.b, static_cast<int>(ldb), p.add ? 1.0f : 0.0f, p.c, static_cast<int>(p.n));
    }
};

std::string version() {
#if defined(OPENBLAS_VERSION)
    return std::string(OPENBLAS_VERSION) + ", kernels " + openblas_get_corename();
#else
    return "unknown CBLAS";
#endif
}

const Registration registered({.name = "OpenBLAS",
                               .version = version(),
                               .place = 30,
                               .supports = [](const Case& of) { return of.type == Type::f32; },
                               .make = make_products_contender<CblasProducts>});

}  // namespace
}  // namespace steelyard_bench
