// The expert of docs/policies/expert.md.
#include <doctest/doctest.h>

#include "steelyard/expert/laws.hpp"
#include "steelyard/steelyard.hpp"

namespace docs_expert {

using namespace steelyard;

/// f(x) = s * x, element by element: an expert of d weights. On host memory, serial.
struct Scale {
    template <class T, class Space = HostSpace>
    struct Params {
        view<T, 2, Space> scale;  // [E, d]

        template <class Field>
        void fields(Field&& field, const Scale&, const LayerShape& shape) {
            field("scale", scale, shape.experts, shape.width);
        }
    };

    // Backward needs nothing but x, and no rows of its own.
    template <class T, class Space = HostSpace>
    struct Kept {
        template <class Field>
        void fields(Field&&, const Scale&, const LayerShape&, index_t /*rows*/) {}
    };
    template <class T, class Space = HostSpace>
    struct Work {
        template <class Field>
        void fields(Field&&, const Scale&, const LayerShape&, index_t /*rows*/) {}
    };

    Status check(const LayerShape&) const { return {}; }

    template <class T, class Device>
    index_t scratch_bytes(const Device&, const LayerShape&) const {
        return 0;
    }

    template <class T, class Device>
    void forward(const Device&, const Params<const T>& params, view<const T, 2> x, const Plan<>& plan, const Kept<T>&,
                 view<T, 2> rows, std::byte*) const {
        if (!rows.present()) return;  // a recompute: there is nothing to keep
        each_row(plan, [&](index_t e, index_t r, index_t t, index_t) {
            for (index_t j = 0; j < x.extents[1]; ++j) rows(r, j) = params.scale(e, j) * x(t, j);
        });
    }

    template <class T, class Device>
    void backward(const Device&, const Params<const T>& params, view<const T, 2> x, const Plan<>& plan, const Kept<T>&,
                  view<const T, 2> weight, view<const T, 2> dy, const Work<T>&, view<T, 2> drows, view<T, 2> dweight,
                  const Params<T>& grads, std::byte*) const {
        each_row(plan, [&](index_t e, index_t r, index_t t, index_t k) {
            const T w = weight.present() ? weight(t, k) : T(1);
            T product = 0;
            for (index_t j = 0; j < x.extents[1]; ++j) {
                product += dy(t, j) * params.scale(e, j) * x(t, j);
                drows(r, j) = w * dy(t, j) * params.scale(e, j);
                if (grads.scale.present()) grads.scale(e, j) += w * dy(t, j) * x(t, j);
            }
            if (dweight.present()) dweight(t, k) += product;
        });
    }

    friend bool operator==(const Scale&, const Scale&) = default;

private:
    /// body(expert, row, token, rank of the choice) for every row of the plan, in order.
    template <class Body>
    static void each_row(const Plan<>& plan, Body&& body) {
        for (index_t e = 0; e < plan.experts(); ++e)
            for (index_t r = plan.offsets(e); r < plan.offsets(e + 1); ++r)
                body(e, r, plan.choice(r) / plan.top_k(), plan.choice(r) % plan.top_k());
    }
};

static_assert(Expert<Scale>);

using Layer = MoE<float, TopK, WithShared<Scale, SwiGlu>>;

}  // namespace docs_expert

using namespace docs_expert;

TEST_CASE("the expert of the documentation obeys the laws of experts") {
    for (const index_t experts : {1, 4}) {
        const LayerShape shape{.tokens = 12, .width = 5, .experts = experts};
        const Status laws = check_expert_laws(Scale{}, shape, Cpu{});
        CHECK_MESSAGE(laws.ok(), laws.message());
    }
}

TEST_CASE("the expert of the documentation serves a layer, beside a shared one") {
    const LayerShape shape{.tokens = 12, .width = 8, .experts = 4};
    Module moe(Layer({.shape = shape, .expert = {.routed = {}, .shared = {.hidden = 8}}}));
    std::vector<float> x(12 * 8, 0.5f), y(12 * 8), dx(12 * 8);
    moe.forward({x.data(), 12, 8}, {y.data(), 12, 8});
    moe.backward({x.data(), 12, 8}, {y.data(), 12, 8}, {dx.data(), 12, 8});
    CHECK(moe.grads.experts.scale.extents[0] == 4);
    CHECK(moe.grads.shared.gate.extents[0] == 1);
}
