#include "steelyard/cuda/memory.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "cuda/device_memory.hpp"
#include "steelyard/cuda.hpp"
#include "steelyard/ops/device.hpp"

using namespace steelyard;
using gpu::Host;
using gpu::Pinned;
using gpu::Tensor;
using ops = memory_ops<Cuda>;

namespace {

template <class T>
view<const T, 2, CudaSpace> fixed(const Tensor<T>& of) {
    return of.get();
}

}  // namespace

TEST_CASE_TEMPLATE("fills keep to their rows", T, std::uint8_t, bf16, float, std::int64_t) {
    for (const index_t padding : {0, 3})
        for (const index_t columns : {1, 5, 64}) {
            T value{};
            for (const unsigned char byte : {0x00, 0x2b}) {
                std::memset(static_cast<void*>(&value), byte,
                            1);  // the first byte alone: no pattern that a memset knows
                const Tensor<T> tensor(70, columns, padding);
                ops::fill(gpu::device(), tensor.get(), value);
                gpu::finish();
                REQUIRE(tensor.host().same(Host<T>(70, columns, value)));
            }
        }
    const Tensor<T> none(0, 4);
    ops::fill(gpu::device(), none.get(), T{});
    gpu::finish();
}

TEST_CASE("copies go between memories, rows dense or padded") {
    const Host<float> numbers = gpu::random<float>(33, 7, 1);
    for (const index_t from_padding : {0, 2})
        for (const index_t to_padding : {0, 5}) {
            const Tensor<float> from(numbers, from_padding), to(33, 7, to_padding);
            ops::copy(gpu::device(), fixed(from), to.get());
            const Pinned<float> back(33, 7);
            ops::copy(gpu::device(), fixed(to), back.get());
            const Tensor<float> again(33, 7, from_padding);
            ops::upload(gpu::device(), view<const float, 2>(back.get()), again.get());
            gpu::finish();
            REQUIRE(to.host().same(numbers));
            REQUIRE(back.host().same(numbers));
            REQUIRE(again.host().same(numbers));
        }
}

TEST_CASE("what is forked and joined stands in order") {
    const Cuda device = gpu::device();
    const Pinned<std::int64_t> source(1, 1), result(1, 1);
    const Tensor<std::int64_t> word(1, 1), beside(1, 1);
    struct Late {
        std::int64_t* to;
        std::int64_t value;
        static void write(void* argument) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            const Late& late = *static_cast<Late*>(argument);
            *late.to = late.value;
        }
    };
    for (std::int64_t round = 0; round < 3; ++round) {
        Late first{source.get().data, 5 + round};
        ops::run_on_host(device, &Late::write, &first);
        ops::upload(device, view<const std::int64_t, 2>(source.get()), word.get());
        const Cuda side = ops::fork(device);
        REQUIRE(side.stream == device.side);
        ops::copy(side, fixed(word), beside.get());
        Late second{source.get().data, 70 + round};
        ops::run_on_host(side, &Late::write, &second);
        ops::join(device);
        ops::upload(device, view<const std::int64_t, 2>(source.get()), word.get());
        ops::copy(device, fixed(beside), result.get());
        ops::wait(device);
        REQUIRE(result.host()(0, 0) == 5 + round);
        REQUIRE(word.host()(0, 0) == 70 + round);
    }
    std::atomic<int> called = 0;
    ops::run_on_host(device, [&called] { ++called; });
    ops::wait(device);
    REQUIRE(called == 1);
}

TEST_CASE("resources make a device that works, on a stream of the caller's too") {
    static_assert(Device<Cuda>);
    CHECK(!Cuda{}.check().ok());
    CudaResources own;
    CHECK(own.device().check().ok());
    CHECK(own.device(CudaExperts::looped).experts == CudaExperts::looped);
    CudaResources adopted(own.device().stream), of_default(nullptr);
    CHECK(adopted.device().stream == own.device().stream);
    for (CudaResources* all : {&own, &adopted, &of_default}) {
        const Tensor<float> tensor(3, 5);
        ops::fill(all->device(), tensor.get(), 1.5f);
        CHECK(all->synchronize().ok());
        CHECK(check_cuda(all->device()).ok());
        CHECK(tensor.host().same(Host<float>(3, 5, 1.5f)));
    }
}

TEST_CASE("a launch that the GPU refuses throws, and names it") {
    const Cuda device = gpu::device();
    const Host<float> logits(4, 1100);
    const Tensor<float> z(logits), probs(4, 1100), weight(4, 2);
    const Tensor<expert_t> expert(4, 2);
    try {
        router_ops<Cuda>::select<float>(device, SelectionRule{2}, {}, {},
                                        {z.get(), probs.get(), expert.get(), weight.get()}, nullptr);
        FAIL("1100 experts are too many");
    } catch (const Error& error) {
        CHECK(std::string(error.what()) ==
              "steelyard: router: experts: expected at most 1024 on the CUDA device, came 1100");
    }
    gpu::finish();
}
