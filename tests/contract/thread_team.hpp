// The team of ranks that are threads.
#pragma once

#include <vector>

#include "contract/run_split.hpp"

namespace steelyard::testing::contract {

/// Ranks as threads of this process.
struct ThreadTeam {
    template <class Body>
    SplitResult run(int ranks, Body body) {
        ThreadGroup group(ranks);
        std::vector<SplitResult> results(static_cast<std::size_t>(ranks));
        run_ranks(group, [&](const ThreadComm& comm) { results[static_cast<std::size_t>(comm.rank())] = body(comm); });
        SplitResult sum = results.front();
        for (std::size_t r = 1; r < results.size(); ++r) {
            for (std::size_t i = 0; i < sum.sums.size(); ++i) sum.sums[i] += results[r].sums[i];
            for (std::size_t i = 0; i < sum.choices.size(); ++i) sum.choices[i] += results[r].choices[i];
            sum.ranks.push_back(results[r].ranks.front());
        }
        return sum;
    }
};

}  // namespace steelyard::testing::contract
