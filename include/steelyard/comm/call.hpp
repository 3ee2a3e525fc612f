// One call of a collective, as every rank must agree on it; shared by the backends.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "steelyard/core/status.hpp"

namespace steelyard {

/// The element types that the backends of this library sum and move.
template <class T>
concept CommElement = std::same_as<T, std::int64_t> || std::same_as<T, float> || std::same_as<T, double>;

namespace detail::comm {

enum class Kind : std::uint8_t { sum = 1, broadcast, all_gather, barrier };
enum class Element : std::uint8_t { none = 0, int64, float32, float64 };

template <CommElement T>
constexpr Element element_of() {
    if constexpr (std::same_as<T, std::int64_t>) return Element::int64;
    if constexpr (std::same_as<T, float>) return Element::float32;
    return Element::float64;
}

/// What a rank calls. Ranks whose calls differ have lost step with each other.
struct Call {
    Kind kind = Kind::barrier;
    Element element = Element::none;
    std::int32_t root = 0;
    std::uint64_t words = 0;
    bool operator==(const Call&) const = default;
};

template <CommElement T>
constexpr Call sum_of(std::span<T> words) {
    return {Kind::sum, element_of<T>(), 0, words.size()};
}

/// to += from. Integers wrap around, as a sum modulo 2^64.
template <CommElement T>
void accumulate(T* to, const T* from, std::size_t count) {
    if constexpr (std::same_as<T, std::int64_t>) {
        for (std::size_t i = 0; i < count; ++i)
            to[i] = static_cast<T>(static_cast<std::uint64_t>(to[i]) + static_cast<std::uint64_t>(from[i]));
    } else {
        for (std::size_t i = 0; i < count; ++i) to[i] += from[i];
    }
}

inline std::string text(const Call& call) {
    static constexpr const char* elements[] = {"", " int64", " float", " double"};
    const std::string size = std::to_string(call.words) + elements[static_cast<int>(call.element)];
    switch (call.kind) {
        case Kind::sum: return "a sum of " + size;
        case Kind::broadcast: return "a broadcast of " + size + " from rank " + std::to_string(call.root);
        case Kind::all_gather: return "an all_gather of " + size;
        case Kind::barrier: break;
    }
    return "a barrier";
}

/// "rank 3", or "ranks 0, 2, 5", of the ranks below `size` that `is_in` picks.
template <class Predicate>
std::string ranks_text(int size, Predicate is_in) {
    std::string list;
    int count = 0;
    for (int r = 0; r < size; ++r)
        if (is_in(r)) list += (count++ ? ", " : "") + std::to_string(r);
    return count == 0 ? "no rank" : (count == 1 ? "rank " : "ranks ") + list;
}

/// "ranks 0, 2: a sum of 5 int64; rank 1: a sum of 6 int64": who called what, among the ranks that `known` picks.
template <class CallOf, class Known>
std::string calls_text(int size, CallOf call_of, Known known) {
    std::string list;
    for (int r = 0; r < size; ++r) {
        bool told = !known(r);
        for (int s = 0; s < r && !told; ++s) told = known(s) && call_of(s) == call_of(r);
        if (told) continue;
        const auto same = [&](int other) { return known(other) && call_of(other) == call_of(r); };
        list += (list.empty() ? "" : "; ") + ranks_text(size, same) + ": " + text(call_of(r));
    }
    return list;
}

inline std::string seconds_text(double seconds) {
    const auto thousandths = static_cast<long long>(seconds * 1000.0 + 0.5);
    std::string part = std::to_string(thousandths % 1000 + 1000).substr(1);
    while (!part.empty() && part.back() == '0') part.pop_back();
    return std::to_string(thousandths / 1000) + (part.empty() ? "" : "." + part) + " s";
}

/// "collective 17 on rank 2"
inline std::string place_text(std::uint64_t number, int rank) {
    return "collective " + std::to_string(number) + " on rank " + std::to_string(rank);
}

/// The call order of one rank: a sum that was begun is ended, with the same words, before anything else.
/// A refusal here is the caller's slip on this rank alone, and leaves the group as it was.
struct Turn {
    const void* begun = nullptr;
    Call call;
    bool under_way = false;

    Status may_begin(std::string_view stage, int rank) const {
        if (!under_way) return {};
        return Status::refuse(Code::invalid_argument, stage, "the next call on rank " + std::to_string(rank),
                              "end_sum first", "another call while " + text(call) + " is under way");
    }

    Status may_end(std::string_view stage, int rank, const void* words, const Call& ended) const {
        if (under_way && begun == words && call == ended) return {};
        return Status::refuse(Code::invalid_argument, stage, "end_sum on rank " + std::to_string(rank),
                              under_way ? "the words of " + text(call) + " that was begun" : "a begin_sum before it",
                              !under_way                ? "end_sum alone"
                              : begun == words          ? text(ended)
                                                        : text(ended) + " at another address");
    }
};

inline Status check_root(std::string_view stage, int root, int size) {
    if (root >= 0 && root < size) return {};
    return Status::refuse(Code::invalid_argument, stage, "root", "a rank in [0, " + std::to_string(size) + ")",
                          std::to_string(root));
}

inline Status check_gather(std::string_view stage, std::size_t mine, std::size_t all, int size) {
    const std::size_t expected = mine * static_cast<std::size_t>(size);
    if (all == expected) return {};
    return Status::refuse(Code::invalid_argument, stage, "all",
                          std::to_string(expected) + " words (" + std::to_string(size) + " ranks of " +
                              std::to_string(mine) + ")",
                          std::to_string(all));
}

}  // namespace detail::comm
}  // namespace steelyard
