// The device of docs/policies/device.md.
#include <doctest/doctest.h>

#include "steelyard/ops/laws.hpp"
#include "steelyard/plan/laws.hpp"
#include "steelyard/steelyard.hpp"

namespace {

/// Begins as the CPU. Kernels are replaced one after the other.
struct MyDevice : steelyard::Cpu {};

}  // namespace

namespace steelyard {

template <>
struct router_ops<MyDevice> : router_ops<Cpu> {};
template <>
struct expert_ops<MyDevice> : expert_ops<Cpu> {};
template <>
struct balance_ops<MyDevice> : balance_ops<Cpu> {};
template <>
struct memory_ops<MyDevice> : memory_ops<Cpu> {};

/// The CPU's, but for one kernel.
template <>
struct plan_ops<MyDevice> : plan_ops<Cpu> {
    template <class T>
    static void combine(const MyDevice&, const Plan<>& plan, view<const T, 2> rows, view<const T, 2> weight,
                        view<T, 2> y, Write write = Write::assign) {
        for (index_t t = 0; t < y.extents[0]; ++t)
            for (index_t j = 0; j < y.extents[1]; ++j) {
                T sum = write == Write::add ? y(t, j) : T(0);
                for (index_t k = 0; k < plan.top_k(); ++k)  // in the order of k: the same bits every time
                    if (plan.row(t, k) >= 0)
                        sum += (weight.present() ? weight(t, k) : T(1)) * rows(plan.row(t, k), j);
                y(t, j) = sum;
            }
    }
};

}  // namespace steelyard

using namespace steelyard;

static_assert(Device<MyDevice>);

using Layer =
    MoE<float, TopK, SwiGlu, MicroBatchLoss, SelfComm, Dropless, KeepActivations, MyDevice>;

TEST_CASE("the device of the documentation obeys the laws of devices") {
    const Status in_float = check_device_laws<float>(MyDevice{}, 1e-5);
    CHECK_MESSAGE(in_float.ok(), in_float.message());
    const Status in_double = check_device_laws<double>(MyDevice{}, 1e-12);
    CHECK_MESSAGE(in_double.ok(), in_double.message());
    const Status plan = check_plan_laws({.tokens = 40, .width = 5, .experts = 7}, 3, MyDevice{});
    CHECK_MESSAGE(plan.ok(), plan.message());
}

TEST_CASE("the device of the documentation serves a layer") {
    const LayerShape shape{.tokens = 12, .width = 8, .experts = 4};
    Module moe(Layer({.shape = shape, .expert = {.hidden = 8}}));
    std::vector<float> x(12 * 8, 0.5f), y(12 * 8), dx(12 * 8);
    moe.forward({x.data(), 12, 8}, {y.data(), 12, 8});
    moe.backward({x.data(), 12, 8}, {y.data(), 12, 8}, {dx.data(), 12, 8});
    CHECK(moe.balance_loss() > 0.0);
}
