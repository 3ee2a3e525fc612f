// One rank alone: every sum is already complete, so nothing is left to compile.
#pragma once

#include <cstdint>
#include <span>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/concept.hpp"

namespace steelyard {

/// The group of one rank. Empty, stateless, and every call is a no-op but for the size checks of `all_gather`
/// and `broadcast`.
struct SelfComm {
    static constexpr bool stream_ordered = true;  ///< there is nothing to wait for (layer/queued.hpp)

    [[nodiscard]] constexpr int rank() const { return 0; }
    [[nodiscard]] constexpr int size() const { return 1; }

    Status begin_sum(std::span<std::int64_t>) const { return {}; }
    Status begin_sum(std::span<float>) const { return {}; }
    Status begin_sum(std::span<double>) const { return {}; }

    Status end_sum(std::span<std::int64_t>) const { return {}; }
    Status end_sum(std::span<float>) const { return {}; }
    Status end_sum(std::span<double>) const { return {}; }

    template <CommElement T>
    Status broadcast(std::span<T>, int root) const {
        return detail::comm::check_root("SelfComm", root, 1);
    }

    /// Copies `mine` to `all` (=).
    template <CommElement T>
    Status all_gather(std::span<const T> mine, std::span<T> all) const {
        if (Status refused = detail::comm::check_gather("SelfComm", mine.size(), all.size(), 1); !refused)
            return refused;
        for (std::size_t i = 0; i < mine.size(); ++i) all[i] = mine[i];
        return {};
    }

    Status barrier() const { return {}; }
};

static_assert(CommBackend<SelfComm>, "steelyard: SelfComm has left the contract of comm/concept.hpp");
static_assert(CollectiveComm<SelfComm>, "steelyard: SelfComm has left the contract of comm/concept.hpp");

}  // namespace steelyard
