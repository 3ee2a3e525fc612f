// What a peer that knows matrix products alone has to offer; the rest of the layer is ours.
#pragma once

#include <memory>

#include "contender.hpp"

namespace steelyard_bench {

/// Forward products of one expert's rows, all row-major and dense. Called by several threads at once.
class Products {
public:
    virtual ~Products() = default;
    /// Most rows of a call: as many as serve the library best while there are enough calls for all threads.
    [[nodiscard]] virtual index_t row_block() const { return 512; }
    /// gate[m,h] = x[m,d] G_e^T,  up[m,h] = x[m,d] U_e^T
    virtual void gate_and_up(index_t e, index_t m, const float* x, float* gate, float* up) const = 0;
    /// y[m,d] = inner[m,h] D_e^T
    virtual void down(index_t e, index_t m, const float* inner, float* y) const = 0;
};

/// c[m,n] = or += a b of any matrices, row-major and dense, on one thread.
struct Product {
    index_t m, n, k;
    const float *a, *b;
    float* c;
    bool add = false;
};

/// A library with the three products that training takes; forward reads the weights as they are.
class Blas : public Products {
public:
    explicit Blas(const Model& model)
        : weights_(model.weights()), width_(model.shape().width), hidden_(model.shape().hidden) {}

    virtual void nt(const Product& p) const = 0;  ///< a[m,k] b[n,k]^T
    virtual void nn(const Product& p) const = 0;  ///< a[m,k] b[k,n]
    virtual void tn(const Product& p) const = 0;  ///< a[k,m]^T b[k,n]

    void gate_and_up(index_t e, index_t m, const float* x, float* gate, float* up) const override {
        nt({m, hidden_, width_, x, weights_.gate[e].data, gate});
        nt({m, hidden_, width_, x, weights_.up[e].data, up});
    }
    void down(index_t e, index_t m, const float* inner, float* y) const override {
        nt({m, width_, hidden_, inner, weights_.down[e].data, y});
    }

private:
    Model::Tensors weights_;
    index_t width_, hidden_;
};

/// Our layer around a peer's products.
[[nodiscard]] std::unique_ptr<Contender> make_peer_contender(const Model& model, const Case& of,
                                                             std::unique_ptr<Products> products);

/// The same, with products that are made, and pack the weights, for a case.
template <class P>
[[nodiscard]] std::unique_ptr<Contender> make_products_contender(const Model& model, const Case& of) {
    return make_peer_contender(model, of, std::make_unique<P>(model, of));
}

}  // namespace steelyard_bench
