// An expert whose products are a peer's. Being an Expert like any other, it gets our router, plan, balance and combine.
#pragma once

#include "layer_contender.hpp"
#include "products.hpp"

namespace steelyard_bench {

/// SwiGLU over the rows of each expert: gathered block by block, three products, parallel over blocks of all experts.
/// Backward needs a Blas.
struct PeerExpert : SwiGlu {
    const Products* products = nullptr;

    template <class T, class Device>
    [[nodiscard]] index_t scratch_bytes(const Device&, const LayerShape&) const {
        return 0;
    }

    template <class T, class Device, class Space = HostSpace>
    void forward(const Device& device, const Params<const T, Space>& params,
                 std::type_identity_t<view<const T, 2, Space>> x, const Plan<Space>& plan, const Kept<T, Space>& kept,
                 std::type_identity_t<view<T, 2, Space>> rows, std::byte*) const {
        if constexpr (std::is_same_v<T, float>) run_forward(device.threads, x, plan, kept, rows);
        (void)params;
    }

    template <class T, class Device, class Space = HostSpace>
    void backward(const Device& device, const Params<const T, Space>& params,
                  std::type_identity_t<view<const T, 2, Space>> x, const Plan<Space>& plan, const Kept<T, Space>& kept,
                  std::type_identity_t<view<const T, 2, Space>> weight,
                  std::type_identity_t<view<const T, 2, Space>> dy, const Work<T, Space>& work,
                  std::type_identity_t<view<T, 2, Space>> drows, std::type_identity_t<view<T, 2, Space>> dweight,
                  const Params<T, Space>& grads, std::byte*) const {
        if constexpr (std::is_same_v<T, float>) {
            backward_rows(device.threads, params, plan, kept, weight, dy, work, drows, dweight);
            backward_weights(device.threads, x, plan, dy, work, grads);
        }
    }

    friend bool operator==(const PeerExpert&, const PeerExpert&) = default;

private:
    void run_forward(int threads, view<const float, 2> x, const Plan<>& plan, const Kept<float>& kept,
                     view<float, 2> rows) const;
    void backward_rows(int threads, const Params<const float>& params, const Plan<>& plan, const Kept<float>& kept,
                       view<const float, 2> weight, view<const float, 2> dy, const Work<float>& work,
                       view<float, 2> drows, view<float, 2> dweight) const;
    void backward_weights(int threads, view<const float, 2> x, const Plan<>& plan, view<const float, 2> dy,
                          const Work<float>& work, const Params<float>& grads) const;
};

/// Our layer around the products of a peer, which are made (and pack the weights) with it.
template <class P>
class ProductsContender final : public LayerContender<PeerExpert> {
public:
    ProductsContender(const Model& model, const Case& of)
        : LayerContender(model, PeerExpert{{.hidden = of.shape.hidden}}), products_(model, of) {
        expert_.products = &products_;
    }

private:
    P products_;
};

template <class P>
[[nodiscard]] std::unique_ptr<Contender> make_products_contender(const Model& model, const Case& of) {
    return std::make_unique<ProductsContender<P>>(model, of);
}

}  // namespace steelyard_bench
