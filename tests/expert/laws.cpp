#include "steelyard/expert/laws.hpp"

#include <doctest/doctest.h>

#include <string>

#include "steelyard/cpu/expert.hpp"
#include "steelyard/expert/mlp.hpp"
#include "steelyard/expert/swiglu.hpp"

using namespace steelyard;

namespace {

enum class Fault {
    none,
    position_enters,
    recompute_differs,
    writes_beyond,
    assigns_gradient,
    wrong_gradient,
    wrong_input_gradient,
    wrong_weight_gradient,
    empty_expert_counts,
    needs_gradients,
};

/// An Mlp with one fault.
struct Faulty {
    Fault fault = Fault::none;
    Mlp mlp{.hidden = 6, .activation = Activation::silu, .bias = true};

    template <class T, class Space>
    struct Params : Mlp::Params<T, Space> {
        template <class Field>
        void fields(Field&& field, const Faulty& expert, const LayerShape& shape) {
            Mlp::Params<T, Space>::fields(field, expert.mlp, shape);
        }
    };
    template <class T, class Space>
    struct Kept : Mlp::Kept<T, Space> {
        template <class Field>
        void fields(Field&& field, const Faulty& expert, const LayerShape& shape, index_t rows) {
            Mlp::Kept<T, Space>::fields(field, expert.mlp, shape, rows);
        }
    };
    template <class T, class Space>
    struct Work : Mlp::Work<T, Space> {
        template <class Field>
        void fields(Field&& field, const Faulty& expert, const LayerShape& shape, index_t rows) {
            Mlp::Work<T, Space>::fields(field, expert.mlp, shape, rows);
        }
    };

    Status check(const LayerShape& shape) const { return mlp.check(shape); }

    template <class T, class Device>
    index_t scratch_bytes(const Device& device, const LayerShape& shape) const {
        return mlp.scratch_bytes<T>(device, shape);
    }

    template <class T, class Device>
    void forward(const Device& device, const Params<const T, HostSpace>& params, view<const T, 2> x, const Plan<>& plan,
                 const Kept<T, HostSpace>& kept, view<T, 2> rows, std::byte* scratch) const {
        mlp.forward<T>(device, params, x, plan, kept, rows, scratch);
        const index_t n = plan.offsets(plan.experts());
        if (fault == Fault::position_enters && rows.present()) rows(n - 1, 0) += T(1e-3);
        if (fault == Fault::writes_beyond && rows.present()) rows(n, 0) = 0;
        if (fault == Fault::recompute_differs && !rows.present()) kept.up(0, 0) += T(1);
    }

    template <class T, class Device>
    void backward(const Device& device, const Params<const T, HostSpace>& params, view<const T, 2> x,
                  const Plan<>& plan, const Kept<T, HostSpace>& kept, view<const T, 2> weight, view<const T, 2> dy,
                  const Work<T, HostSpace>& work, view<T, 2> drows, view<T, 2> dweight,
                  const Params<T, HostSpace>& grads, std::byte* scratch) const {
        if (fault == Fault::assigns_gradient && grads.up.present())
            for (index_t i = 0; i < grads.up.size(); ++i) grads.up.data[i] = 0;
        mlp.backward<T>(device, params, x, plan, kept, weight, dy, work, drows, dweight, grads, scratch);
        if (fault == Fault::wrong_gradient && grads.up_bias.present()) grads.up_bias(0, 2) += T(1e-3);
        if (fault == Fault::wrong_input_gradient) drows(0, 0) += T(1e-3);
        if (fault == Fault::wrong_weight_gradient && dweight.present()) dweight(0, 0) += T(1e-3);
        if (fault == Fault::empty_expert_counts && grads.down_bias.present())
            grads.down_bias(grads.down_bias.extents[0] - 1, 0) += T(1e-300);
        if (fault == Fault::needs_gradients && !grads.up.present()) drows(0, 0) += T(1);
    }

    bool operator==(const Faulty&) const = default;
};

static_assert(Expert<Faulty>);

}  // namespace

TEST_CASE("the library's experts obey the laws, at every small size and number of threads") {
    const auto obeys = [](const auto& expert, const LayerShape& shape, int threads) {
        const Status s = check_expert_laws(expert, shape, Cpu{threads});
        CHECK_MESSAGE(s.ok(), s.message());
    };
    for (const int threads : {1, 3})
        for (const LayerShape& shape :
             {LayerShape{.tokens = 2, .width = 1, .experts = 1}, LayerShape{.tokens = 12, .width = 5, .experts = 4},
              LayerShape{.tokens = 33, .width = 17, .experts = 2}, LayerShape{.tokens = 70, .width = 3, .experts = 7}})
            for (const index_t hidden : {index_t{1}, index_t{7}, index_t{19}}) {
                obeys(SwiGlu{hidden}, shape, threads);
                obeys(GatedMlp{hidden, Activation::gelu_tanh, true}, shape, threads);
                obeys(ClampedSwiGlu{hidden, {.limit = 0.5}}, shape, threads);  // most numbers are clamped
                obeys(Mlp{hidden, Activation::silu, hidden == 7}, shape, threads);
            }

    const LayerShape one{.tokens = 12, .width = 5, .experts = 4};
    obeys(ClampedSwiGlu{7, {.limit = 7.0}}, one, 3);
    for (const Activation a : {Activation::relu, Activation::relu2, Activation::gelu, Activation::silu,
                               Activation::gelu_tanh, Activation::identity})
        for (const bool bias : {false, true}) obeys(Mlp{7, a, bias}, one, 3);
}

TEST_CASE("the laws name the fault of an expert that breaks one") {
    const LayerShape shape{.tokens = 12, .width = 5, .experts = 4};
    const auto answer = [&](Fault fault) { return check_expert_laws(Faulty{.fault = fault}, shape, Cpu{}).message(); };
    const auto says = [&](Fault fault, const char* text) {
        const std::string message = answer(fault);
        CHECK_MESSAGE(message.find(text) != std::string::npos, message);
    };
    CHECK(answer(Fault::none) == "ok");
    says(Fault::position_enters, "law 8, rows in another order");
    says(Fault::recompute_differs, "law 5, forward without rows");
    says(Fault::writes_beyond, "law 7, rows");
    says(Fault::assigns_gradient, "law 6, grads accumulates");
    says(Fault::wrong_gradient, "law 6, gradient of up_bias");
    says(Fault::wrong_input_gradient, "law 6, gradient of x");
    says(Fault::wrong_weight_gradient, "law 6, gradient of the combine weight");
    says(Fault::empty_expert_counts, "law 7, gradient of down_bias of an expert without rows");
    says(Fault::needs_gradients, "law 6, backward with frozen weights");
}

TEST_CASE("the laws refuse a shape that is too small, and an option that the expert refuses") {
    CHECK(!check_expert_laws(SwiGlu{4}, LayerShape{.tokens = 1, .width = 3, .experts = 2}, Cpu{}));
    CHECK(check_expert_laws(SwiGlu{0}, LayerShape{.tokens = 4, .width = 3, .experts = 2}, Cpu{}).message() ==
          "steelyard: SwiGlu: hidden: expected at least 1, came 0");
}
