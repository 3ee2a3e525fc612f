#include "pretrain/any_comm.hpp"

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "steelyard/comm/laws.hpp"
#include "steelyard/comm/threads.hpp"

using namespace steelyard;

TEST_CASE("ranks behind virtual calls keep the laws of a communication backend") {
    for (const int ranks : {1, 3}) {
        CAPTURE(ranks);
        const auto with_group = [ranks](auto body) {
            ThreadGroup group(ranks, {.timeout = 1.0, .reserve = 64});
            std::vector<Status> found(static_cast<std::size_t>(ranks));
            run_ranks(group, [&](const ThreadComm& comm) {
                found[static_cast<std::size_t>(comm.rank())] = body(pretrain::AnyComm(comm));
            });
            for (Status& status : found)
                if (!status) return std::move(status);
            return Status();
        };
        CHECK(check_comm_laws(with_group, {.refused_within = 3.0}).message() == "ok");
    }
}
