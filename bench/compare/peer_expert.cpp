// An expert whose products are a peer's. Being an Expert like any other, it gets our router, plan, balance and combine.
#include <utility>

#include "../threads.hpp"
#include "layer_contender.hpp"
#include "products.hpp"
#include "swiglu.hpp"

namespace steelyard_bench {
namespace {

/// Rows [begin, end) in grouped order, all of one expert.
struct Block {
    index_t expert, begin, end;
    [[nodiscard]] index_t rows() const { return end - begin; }
};

/// Blocks of at most `most` rows, the largest first: so the last ones to be handed out are small.
std::vector<Block> blocks_of(const Plan<>& plan, index_t most) {
    std::vector<Block> found;
    for (index_t e = 0; e < plan.experts(); ++e) {
        const index_t first = plan.offsets[e], count = plan.offsets[e + 1] - first;
        const index_t parts = (count + most - 1) / most;
        for (index_t part = 0; part < parts; ++part)
            found.push_back({e, first + count * part / parts, first + count * (part + 1) / parts});
    }
    std::stable_sort(found.begin(), found.end(), [](const Block& a, const Block& b) { return a.rows() > b.rows(); });
    return found;
}

/// A thread's own panel, which keeps its memory from call to call.
template <int number>
float* panel(index_t size) {
    thread_local HugeMemory memory;
    const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
    if (memory.size() < bytes) memory = HugeMemory(bytes);
    return memory.as<float>();
}

template <int number>
const float* gathered(const Plan<>& plan, const Block& block, view<const float, 2> from) {
    const index_t width = from.extents[1];
    float* const to = panel<number>(block.rows() * width);
    for (index_t r = 0; r < block.rows(); ++r)
        std::copy_n(&from(plan.choice[block.begin + r] / plan.top_k(), 0), width, to + r * width);
    return to;
}

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

void PeerExpert::run_forward(int threads, view<const float, 2> x, const Plan<>& plan, const Kept<float>& kept,
                             view<float, 2> rows) const {
    const auto blocks = blocks_of(plan, products->row_block());
    for_each_task(threads, std::ssize(blocks), [&](index_t task) {
        const Block& block = blocks[static_cast<std::size_t>(task)];
        const index_t count = block.rows() * hidden;
        const bool keeps = kept.gate.present();
        float* const gate = keeps ? &kept.gate(block.begin, 0) : panel<1>(count);
        float* const up = keeps ? &kept.up(block.begin, 0) : panel<2>(count);
        float* const inner = keeps ? panel<3>(count) : gate;
        products->gate_and_up(block.expert, block.rows(), gathered<0>(plan, block, x), gate, up);
        swiglu(count, gate, up, inner);
        products->down(block.expert, block.rows(), inner, &rows(block.begin, 0));
    });
}

void PeerExpert::backward_rows(int threads, const Params<const float>& params, const Plan<>& plan,
                               const Kept<float>& kept, view<const float, 2> weight, view<const float, 2> dy,
                               const Work<float>& work, view<float, 2> drows, view<float, 2> dweight) const {
    const auto& blas = dynamic_cast<const Blas&>(*products);
    const auto blocks = blocks_of(plan, blas.row_block());
    const index_t width = dy.extents[1], top_k = plan.top_k();
    for_each_task(threads, std::ssize(blocks), [&](index_t task) {
        const Block& block = blocks[static_cast<std::size_t>(task)];
        const index_t m = block.rows(), e = block.expert;
        float* const dinner = panel<1>(m * hidden);
        blas.nn({m, hidden, width, gathered<0>(plan, block, dy), params.down[e].data, dinner});
        for (index_t r = 0; r < m; ++r) {
            const index_t row = block.begin + r, choice = plan.choice[row];
            const float dot =
                swiglu_backward(hidden, weight(choice / top_k, choice % top_k), &kept.gate(row, 0), &kept.up(row, 0),
                                dinner + r * hidden, &work.gate(row, 0), &work.up(row, 0), &work.inner(row, 0));
            if (dweight.present()) dweight(choice / top_k, choice % top_k) += dot;
        }
        float* const out = &drows(block.begin, 0);
        blas.nn({m, width, hidden, &work.gate(block.begin, 0), params.gate[e].data, out});
        blas.nn({m, width, hidden, &work.up(block.begin, 0), params.up[e].data, out, true});
    });
}

void PeerExpert::backward_weights(int threads, view<const float, 2> x, const Plan<>& plan, view<const float, 2> dy,
                                  const Work<float>& work, const Params<float>& grads) const {
    const auto& blas = dynamic_cast<const Blas&>(*products);
    const auto blocks = blocks_of(plan, std::max<index_t>(1, plan.offsets[plan.experts()]));
    const index_t width = x.extents[1];
    const bool add = grads.write == Write::add;
    for (index_t e = 0; e < plan.experts() && !add; ++e)
        if (plan.offsets[e] == plan.offsets[e + 1])
            for (const auto* of : {&grads.gate, &grads.up, &grads.down})
                std::fill_n((*of)[e].data, (*of)[e].size(), 0.0f);
    for_each_task(threads, 3 * std::ssize(blocks), [&](index_t task) {
        const Block& block = blocks[static_cast<std::size_t>(task / 3)];
        const index_t m = block.rows(), e = block.expert, first = block.begin;
        switch (task % 3) {
            case 0:
                return blas.tn(
                    {hidden, width, m, &work.gate(first, 0), gathered<0>(plan, block, x), grads.gate[e].data, add});
            case 1:
                return blas.tn(
                    {hidden, width, m, &work.up(first, 0), gathered<0>(plan, block, x), grads.up[e].data, add});
            default:
                return blas.tn(
                    {width, hidden, m, gathered<0>(plan, block, dy), &work.inner(first, 0), grads.down[e].data, add});
        }
    });
}

/// Our layer around the products of a peer.
class PeerContender final : public LayerContender<PeerExpert> {
public:
    PeerContender(const Model& model, const Case& of, std::unique_ptr<Products> products)
        : LayerContender(model, PeerExpert{{.hidden = of.shape.hidden}}), products_(std::move(products)) {
        expert_.products = products_.get();
    }

private:
    std::unique_ptr<Products> products_;
};

}  // namespace

std::unique_ptr<Contender> make_peer_contender(const Model& model, const Case& of, std::unique_ptr<Products> products) {
    return std::make_unique<PeerContender>(model, of, std::move(products));
}

}  // namespace steelyard_bench
