#include <benchmark/benchmark.h>

#include <cstdio>

#include "limits.hpp"

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
    const auto& limits = steelyard_bench::limits();
    const auto add = [](const char* name, double value) {
        char text[32];
        std::snprintf(text, sizeof text, "%.1f", value);
        benchmark::AddCustomContext(name, text);
    };
    add("limit: FMA float, GFLOP/s a thread", limits.fma_gflops_float);
    add("limit: FMA double, GFLOP/s a thread", limits.fma_gflops_double);
    add("limit: read, GB/s a thread", limits.memory.at(1).read_gbytes);
    add("limit: copy, GB/s a thread (read + written)", limits.memory.at(1).copy_gbytes);
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
