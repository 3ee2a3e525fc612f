#include <doctest/doctest.h>

#include "steelyard/ops/laws.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;

namespace {

/// The CPU under another name, with one operation that goes wrong.
struct Skewed : Cpu {};

}  // namespace

namespace steelyard {
template <>
struct router_ops<Skewed> : router_ops<Cpu> {};
template <>
struct expert_ops<Skewed> : expert_ops<Cpu> {};
template <>
struct balance_ops<Skewed> : balance_ops<Cpu> {};
template <>
struct plan_ops<Skewed> : plan_ops<Cpu> {
    template <class T>
    static void combine(const Cpu& device, const Plan<>& plan, view<const T, 2> rows, view<const T, 2> weight,
                        view<T, 2> y, Write write) {
        plan_ops<Cpu>::combine<T>(device, plan, rows, weight, y, write);
        y(0, 0) *= T(1.01);
    }
};
}  // namespace steelyard

TEST_CASE("the CPU keeps the laws of a device, in both element types and for any number of threads") {
    static_assert(Device<Cpu>);
    for (const int threads : {1, 2, 3}) {
        CHECK(check_device_laws<double>(Cpu{threads}, 1e-12).message() == "ok");
        CHECK(check_device_laws<float>(Cpu{threads}, 1e-5).message() == "ok");
    }
}

TEST_CASE("a device without threads is refused by name") {
    const Status refused = check_device_laws<float>(Cpu{0}, 1e-5);
    CHECK(refused.message() == "steelyard: device: threads: expected at least 1, came 0");
}

TEST_CASE("an operation that goes wrong is found and named") {
    static_assert(Device<Skewed>);
    const Status found = check_device_laws<double>(Skewed{}, 1e-12);
    CHECK(found.stage() == "device.laws");
    CHECK(found.tensor() == "ffn_forward, combine");
}

TEST_CASE("a type without kernels is no device") {
    struct NoKernels {
        using space = HostSpace;
        [[nodiscard]] Status check() const { return {}; }
    };
    static_assert(!Device<NoKernels>);
    CHECK_FALSE(Device<NoKernels>);
}
