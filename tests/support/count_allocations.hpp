// Counts what malloc and its kin hand out in this test program. Include it in exactly one file of the program.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace steelyard::testing {

inline std::atomic<std::size_t> allocation_count{0};

/// Allocations so far, on all threads.
inline std::size_t allocations() { return allocation_count.load(std::memory_order_relaxed); }

}  // namespace steelyard::testing

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define STEELYARD_TEST_SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STEELYARD_TEST_SANITIZED
#endif

#if defined(__GLIBC__) && !defined(STEELYARD_TEST_SANITIZED)
// glibc's own names for the functions that these replace; operator new calls malloc or aligned_alloc.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t bytes) {
    steelyard::testing::allocation_count.fetch_add(1, std::memory_order_relaxed);
    return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) {
    steelyard::testing::allocation_count.fetch_add(1, std::memory_order_relaxed);
    return __libc_calloc(count, bytes);
}
void* realloc(void* memory, std::size_t bytes) {
    steelyard::testing::allocation_count.fetch_add(1, std::memory_order_relaxed);
    return __libc_realloc(memory, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
    steelyard::testing::allocation_count.fetch_add(1, std::memory_order_relaxed);
    return __libc_memalign(alignment, bytes);
}
}
#else
// A sanitizer owns malloc: operator new alone is counted, in all its forms, so that no two allocators are mixed.
namespace steelyard::testing {
inline void* counted(std::size_t bytes, std::size_t alignment) noexcept {
    allocation_count.fetch_add(1, std::memory_order_relaxed);
    const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
    return std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
}
inline void* counted_or_throw(std::size_t bytes, std::size_t alignment = alignof(std::max_align_t)) {
    if (void* memory = counted(bytes, alignment)) return memory;
    throw std::bad_alloc();
}
}  // namespace steelyard::testing

void* operator new(std::size_t bytes) { return steelyard::testing::counted_or_throw(bytes); }
void* operator new[](std::size_t bytes) { return steelyard::testing::counted_or_throw(bytes); }
void* operator new(std::size_t bytes, std::align_val_t at) {
    return steelyard::testing::counted_or_throw(bytes, static_cast<std::size_t>(at));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
    return steelyard::testing::counted(bytes, alignof(std::max_align_t));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
#endif
