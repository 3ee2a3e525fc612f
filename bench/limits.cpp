#include "limits.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "steelyard/cpu/vector.hpp"

namespace steelyard_bench {
namespace {

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Body>
double best_seconds(int tries, Body&& body) {
    double best = 1e30;
    for (int i = 0; i < tries; ++i) {
        const double start = seconds();
        body();
        best = std::min(best, seconds() - start);
    }
    return best;
}

/// Independent chains of multiply-adds: enough of them to hide the latency of each.
template <class T>
double fma_gflops() {
    using Simd = steelyard::cpu::Simd<T>;
    constexpr int chains = 12;
    constexpr std::int64_t rounds = 4'000'000;
    typename Simd::vec sum[chains], scale{}, step{};
    for (int i = 0; i < Simd::lanes; ++i) scale[i] = T(0.999), step[i] = T(0.001);
    for (auto& s : sum) s = step;
    const double time = best_seconds(5, [&] {
        for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
            for (int c = 0; c < chains; ++c) sum[c] = sum[c] * scale + step;
        }
        for (auto& s : sum) benchmark::DoNotOptimize(s);
    });
    return 2.0 * chains * Simd::lanes * static_cast<double>(rounds) / time * 1e-9;
}

Limits measure() {
    constexpr std::size_t bytes = std::size_t{256} << 20;
    Limits found;
    found.fma_gflops_float = fma_gflops<float>();
    found.fma_gflops_double = fma_gflops<double>();
    std::vector<std::uint64_t> from(bytes / 8, 1), to(bytes / 8, 2);
    found.read_gbytes = static_cast<double>(bytes) * 1e-9 / best_seconds(5, [&] {
        std::uint64_t sum[8] = {};
        for (std::size_t i = 0; i < from.size(); i += 8)
            for (std::size_t j = 0; j < 8; ++j) sum[j] += from[i + j];
        benchmark::DoNotOptimize(sum);
    });
    found.copy_gbytes = 2 * static_cast<double>(bytes) * 1e-9 / best_seconds(5, [&] {
        std::memcpy(to.data(), from.data(), bytes);
        benchmark::ClobberMemory();
    });
    return found;
}

}  // namespace

const Limits& limits() {
    static const Limits found = measure();
    return found;
}

}  // namespace steelyard_bench
