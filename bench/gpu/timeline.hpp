// When each kernel began and ended, and on which stream: through CUPTI, which comes with the CUDA toolkit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(STEELYARD_BENCH_CUPTI)
#include <cupti.h>
#include <cxxabi.h>
#endif

namespace bench {

struct Interval {
    std::string name;
    std::uint32_t stream;
    double begin, end;  // microseconds from the first
};

#if defined(STEELYARD_BENCH_CUPTI)

/// Records what the GPU does from its construction to `stop`. One at a time.
class Timeline {
public:
    static constexpr bool available = true;

    Timeline() {
        kept().clear();
        call(cuptiActivityRegisterCallbacks(give, take));
        for (const CUpti_ActivityKind kind : kinds) call(cuptiActivityEnable(kind));
    }
    /// What was recorded, in order of time. The GPU must be idle.
    std::vector<Interval> stop() {
        call(cuptiActivityFlushAll(0));
        for (const CUpti_ActivityKind kind : kinds) call(cuptiActivityDisable(kind));
        std::vector<Interval> all = kept();
        std::sort(all.begin(), all.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
        const double first = all.empty() ? 0 : all.front().begin;
        for (Interval& one : all) one.begin -= first, one.end -= first;
        return all;
    }

private:
    static constexpr CUpti_ActivityKind kinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                                                   CUPTI_ACTIVITY_KIND_MEMSET};
    static constexpr std::size_t buffer_bytes = std::size_t{1} << 20;

    static std::vector<Interval>& kept() {
        static std::vector<Interval> of;
        return of;
    }
    static void call(CUptiResult result) {
        if (result != CUPTI_SUCCESS) throw std::runtime_error("CUPTI: error " + std::to_string(result));
    }
    static void CUPTIAPI give(std::uint8_t** buffer, std::size_t* bytes, std::size_t* most) {
        *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(8, buffer_bytes));
        *bytes = buffer_bytes, *most = 0;
    }
    static void CUPTIAPI take(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
        CUpti_Activity* record = nullptr;
        while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
            if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
                const auto& of = *reinterpret_cast<const CUpti_ActivityKernel10*>(record);
                keep(short_name(of.name), of);
            } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
                keep("copy", *reinterpret_cast<const CUpti_ActivityMemcpy6*>(record));
            } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
                keep("fill", *reinterpret_cast<const CUpti_ActivityMemset4*>(record));
            }
        }
        std::free(buffer);
    }
    template <class Record>
    static void keep(std::string name, const Record& of) {
        kept().push_back(
            {std::move(name), of.streamId, static_cast<double>(of.start) * 1e-3, static_cast<double>(of.end) * 1e-3});
    }
    /// Without return type and arguments; of a grouped product, what its finish is.
    static std::string short_name(const char* mangled) {
        int status = 0;
        char* const text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
        std::string name = status == 0 ? text : mangled;
        std::free(text);
        const std::size_t finish = name.find("Finish");
        const std::string what =
            finish == std::string::npos ? "" : " " + name.substr(finish, name.find_first_of("<>(", finish) - finish);
        name = name.substr(0, name.find_first_of("<("));
        if (const std::size_t space = name.rfind(' '); space != std::string::npos) name = name.substr(space + 1);
        if (const std::size_t colon = name.rfind("::"); colon != std::string::npos) name = name.substr(colon + 2);
        return name + what;
    }
};

#else

class Timeline {
public:
    static constexpr bool available = false;

    Timeline() { throw std::runtime_error("built without CUPTI: no timeline"); }
    std::vector<Interval> stop() { return {}; }
};

#endif

/// Microseconds in which one of them at least was at work.
inline double busy(const std::vector<Interval>& in_order) {
    double sum = 0, until = 0;
    for (const Interval& one : in_order) {
        sum += std::max(0.0, one.end - std::max(one.begin, until));
        until = std::max(until, one.end);
    }
    return sum;
}

/// A line for each: begin, end, duration in microseconds, stream, name. Streams are numbered in order of appearance.
inline void print(const std::vector<Interval>& all) {
    std::map<std::uint32_t, std::size_t> streams;
    std::printf("%12s %12s %10s  stream  what\n", "begin us", "end us", "us");
    for (const Interval& one : all)
        std::printf("%12.1f %12.1f %10.1f  %6zu  %s\n", one.begin, one.end, one.end - one.begin,
                    streams.emplace(one.stream, streams.size()).first->second, one.name.c_str());
}

}  // namespace bench
