#include "limits.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "huge_memory.hpp"
#include "shape.hpp"
#include "threads.hpp"

namespace steelyard_bench {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int chains = 12;  // independent chains of multiply-adds: enough to hide the latency of each
typedef float Floats __attribute__((vector_size(vector_bytes)));
typedef double Doubles __attribute__((vector_size(vector_bytes)));
typedef std::int32_t Ints __attribute__((vector_size(vector_bytes)));

/// The compiler may not know where a value came from, nor drop it.
template <class Vector>
void opaque(Vector& value) {
    asm volatile("" : "+m"(value));
}

/// Operations of one thread: `rounds` times `chains` vectors.
template <class Vector, class Element>
double multiply_add(std::int64_t rounds) {
    Vector sum[chains] = {}, scale = Vector{} + Element(0.999), step = Vector{} + Element(0.001);
    opaque(scale), opaque(step);
    for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int c = 0; c < chains; ++c) sum[c] = sum[c] * scale + step;
    }
    for (auto& s : sum) opaque(s);
    return 2.0 * chains * (sizeof(Vector) / sizeof(Element)) * static_cast<double>(rounds);
}

/// Operations of one thread, `each` of a lane's: `add` is one instruction, written out, for around intrinsics of dot
/// products g++ 12 copies every sum there and back, which took half of a Cascade Lake's time.
template <class Sum, class Add>
double dots(std::int64_t rounds, int each, Add&& add) {
    Sum sum[chains] = {};
    for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int c = 0; c < chains; ++c) add(sum[c]);
    }
    Sum total = {};
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) total += sum[c];
    opaque(total);
    return 2.0 * each * chains * (sizeof(Sum) / 4) * static_cast<double>(rounds);
}

double dot_bf16([[maybe_unused]] std::int64_t rounds) {
#if defined(__AVX512BF16__)
    auto one = Ints{} + 0x3f803f80;
    opaque(one);
    return dots<Floats>(rounds, 2, [&](Floats& sum) { asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(one)); });
#else
    return 0;
#endif
}

double dot_int8([[maybe_unused]] std::int64_t rounds) {
#if defined(__AVX512VNNI__)
    auto one = Ints{} + 0x01010101;
    opaque(one);
    return dots<Ints>(rounds, 4, [&](Ints& sum) { asm("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(one)); });
#else
    return 0;
#endif
}

void read_block(const Floats* from, std::size_t count) {
    Floats sum[8] = {};
    for (std::size_t i = 0; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (std::size_t j = 0; j < 8; ++j) sum[j] += from[i + j];
    for (auto& s : sum) opaque(s);
}

void copy_block(const Floats* from, Floats* to, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        to[i] = from[i];
        asm volatile("" ::: "memory");  // keep this loop: memcpy would choose non-temporal stores by itself
    }
}

void stream_block(const Floats* from, Floats* to, std::size_t count) {
#if defined(__AVX512F__)
    for (std::size_t i = 0; i < count; ++i)
        _mm512_stream_ps(reinterpret_cast<float*>(to + i), reinterpret_cast<const __m512&>(from[i]));
    _mm_sfence();
#else
    copy_block(from, to, count);
#endif
}

constexpr std::size_t block_bytes = std::size_t{256} << 20, block_vectors = block_bytes / sizeof(Floats);

/// Two blocks far larger than the caches, filled once.
struct Blocks {
    HugeMemory from{block_bytes}, to{block_bytes};
    Blocks() {
        std::fill_n(from.as<float>(), block_bytes / sizeof(float), 1.0f);
        std::fill_n(to.as<float>(), block_bytes / sizeof(float), 2.0f);
    }
};
const Blocks& blocks() {
    static const Blocks once;
    return once;
}

/// Seconds that `threads` need for body(first, count), each with its part of `count` items.
template <class Body>
double timed_parts(int threads, std::size_t count, Body&& body) {
    const double start = now();
    on_threads(threads, [&](int thread) {
        const std::size_t part = count / static_cast<std::size_t>(threads);
        body(static_cast<std::size_t>(thread) * part, part);
    });
    return now() - start;
}

/// Rate of `threads` that each do `body(rounds)` at the same time; about two milliseconds.
template <class Body>
double rate_now(int threads, Body&& body) {
    constexpr std::int64_t rounds = 600'000;
    std::vector<double> rates(static_cast<std::size_t>(threads));
    on_threads(threads, [&](int thread) {
        const double start = now(), operations = body(rounds);
        rates[static_cast<std::size_t>(thread)] = operations * 1e-9 / (now() - start);
    });
    double sum = 0;
    for (const double rate : rates) sum += rate;
    return sum;
}

template <class Body>
double best_of(int tries, Body&& body) {
    double best = 0;
    for (int i = 0; i < tries; ++i) best = std::max(best, body());
    return best;
}

Bandwidth bandwidth(int threads) {
    const auto* from = blocks().from.as<Floats>();
    auto* to = blocks().to.as<Floats>();
    constexpr double gbytes = static_cast<double>(block_bytes) * 1e-9;
    const auto copied = [&](auto&& copy) {
        return 2 * gbytes / timed_parts(threads, block_vectors, [&](std::size_t first, std::size_t count) {
                   copy(from + first, to + first, count);
               });
    };
    return {.read_gbytes = best_of(7, [&] { return read_gbytes_now(threads); }),
            .copy_gbytes = best_of(7, [&] { return copied(copy_block); }),
            .stream_gbytes = best_of(7, [&] { return copied(stream_block); })};
}

}  // namespace

void copy_ordinary(const void* from, void* to, std::size_t bytes) {
    copy_block(static_cast<const Floats*>(from), static_cast<Floats*>(to), bytes / sizeof(Floats));
}
void copy_streaming(const void* from, void* to, std::size_t bytes) {
    stream_block(static_cast<const Floats*>(from), static_cast<Floats*>(to), bytes / sizeof(Floats));
}

double fma_gflops_now(int threads) { return rate_now(threads, multiply_add<Floats, float>); }
double dot_gflops_bf16_now(int threads) { return rate_now(threads, dot_bf16); }
double dot_gops_int8_now(int threads) { return rate_now(threads, dot_int8); }

double read_gbytes_now(int threads) {
    const auto* from = blocks().from.as<Floats>();
    return static_cast<double>(block_bytes) * 1e-9 /
           timed_parts(threads, block_vectors,
                       [&](std::size_t first, std::size_t count) { read_block(from + first, count); });
}

void evict_caches() { read_block(blocks().from.as<Floats>(), block_vectors / 2); }

Limits measure_limits(const std::vector<int>& threads) {
    Limits found;
    found.fma_gflops_float = best_of(15, [] { return fma_gflops_now(1); });
    found.fma_gflops_double = best_of(15, [] { return rate_now(1, multiply_add<Doubles, double>); });
    found.dot_gflops_bf16 = best_of(15, [] { return dot_gflops_bf16_now(1); });
    found.dot_gops_int8 = best_of(15, [] { return dot_gops_int8_now(1); });
    for (const int count : threads) found.memory[count] = bandwidth(count);
    return found;
}

const Limits& limits() {
    static const Limits found = measure_limits({1});
    return found;
}

}  // namespace steelyard_bench
