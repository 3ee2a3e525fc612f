// Eigen's matrix products, expert by expert.
#include <Eigen/Core>

#include "products.hpp"

namespace steelyard_bench {
namespace {

class EigenProducts final : public Blas {
    using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    using In = Eigen::Map<const Matrix>;

public:
    EigenProducts(const Model& model, const Case&) : Blas(model) { Eigen::setNbThreads(1); }

    void nt(const Product& p) const override { store(p, In(p.a, p.m, p.k) * In(p.b, p.n, p.k).transpose()); }
    void nn(const Product& p) const override { store(p, In(p.a, p.m, p.k) * In(p.b, p.k, p.n)); }
    void tn(const Product& p) const override { store(p, In(p.a, p.k, p.m).transpose() * In(p.b, p.k, p.n)); }

private:
    template <class Expression>
    static void store(const Product& p, const Expression& product) {
        Eigen::Map<Matrix> c(p.c, p.m, p.n);
        if (p.add)
            c.noalias() += product;
        else
            c.noalias() = product;
    }
};

const Registration registered({.name = "Eigen",
                               .version = std::to_string(EIGEN_WORLD_VERSION) + "." +
                                          std::to_string(EIGEN_MAJOR_VERSION) + "." +
                                          std::to_string(EIGEN_MINOR_VERSION),
                               .place = 40,
                               .supports = [](const Case& of) { return of.type == Type::f32; },
                               .make = make_products_contender<EigenProducts>});

}  // namespace
}  // namespace steelyard_bench
