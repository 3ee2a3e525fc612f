#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "steelyard/comm/laws.hpp"
#include "steelyard/comm/threads.hpp"

namespace {

using steelyard::CommLawOptions;
using steelyard::run_ranks;
using steelyard::Status;
using steelyard::ThreadComm;
using steelyard::ThreadGroup;
using Words = std::span<std::int64_t>;

/// Groups of thread ranks whose handles are wrapped in `Wrap`.
template <class Wrap>
auto groups_of(int ranks) {
    return [ranks](auto body) {
        ThreadGroup group(ranks, {.timeout = 1.0, .reserve = 64});
        std::vector<Status> found(static_cast<std::size_t>(ranks));
        run_ranks(group, [&](const ThreadComm& comm) {
            found[static_cast<std::size_t>(comm.rank())] = body(Wrap{comm});
        });
        for (Status& status : found)
            if (!status) return std::move(status);
        return Status();
    };
}

struct Faithful : ThreadComm {};

/// What every broken backend below has in common.
struct Wrapped {
    ThreadComm inner;
    int rank() const { return inner.rank(); }
    int size() const { return inner.size(); }
    Status begin_sum(Words words) const { return inner.begin_sum(words); }
    Status end_sum(Words words) const { return inner.end_sum(words); }
};

struct AllRankZero : Wrapped {
    int rank() const { return 0; }
};

struct ByWayOfDouble : Wrapped {
    Status end_sum(Words words) const {
        Status s = inner.end_sum(words);
        for (auto& word : words)
            if (word > std::int64_t{1} << 53) word = word / 1024 * 1024;
        return s;
    }
};

struct WaitsInBegin : Wrapped {
    Status begin_sum(Words words) const {
        if (Status s = inner.begin_sum(words); !s) return s;
        return inner.end_sum(words);
    }
    Status end_sum(Words) const { return {}; }
};

struct SaysOk : Wrapped {
    Status end_sum(Words words) const {
        (void)inner.end_sum(words);
        return {};
    }
};

struct ForgetsRefusals : Wrapped {
    Status begin_sum(Words words) const {
        (void)inner.begin_sum(words);
        return {};
    }
    Status end_sum(Words words) const {
        Status s = inner.end_sum(words);
        return s.message().find("stays refused") == std::string::npos ? s : Status();
    }
};

struct RefusesLate : Wrapped {
    Status end_sum(Words words) const {
        Status s = inner.end_sum(words);
        if (!s) std::this_thread::sleep_for(std::chrono::milliseconds(2500));
        return s;
    }
};

struct InAnyOrder : ThreadComm {
    using ThreadComm::begin_sum;
    using ThreadComm::end_sum;
    Status end_sum(std::span<float> words) const {
        Status s = ThreadComm::end_sum(words);
        if (rank() == 1) words[0] = words[0] * 1.0000002f;
        return s;
    }
};

template <class Wrap>
Status laws_of(int ranks, CommLawOptions options = {.refused_within = 20.0, .rounds = 20}) {
    return steelyard::check_comm_laws(groups_of<Wrap>(ranks), options);
}

}  // namespace

TEST_CASE("ThreadComm obeys the comm laws with 1, 3 and 8 ranks") {
    for (const int ranks : {1, 3, 8})
        CHECK(laws_of<Faithful>(ranks, {.refused_within = 20.0, .rounds = 200}).message() == "ok");
}

TEST_CASE("the comm laws catch a backend that breaks them") {
    const auto broken = [](const Status& status, const char* law) {
        CAPTURE(status.message());
        CHECK(!status);
        CHECK(status.message().find(law) != std::string::npos);
    };
    broken(laws_of<AllRankZero>(2), "law 1");
    broken(laws_of<ByWayOfDouble>(2), "law 2 (sums of any length");
    broken(laws_of<WaitsInBegin>(2), "law 2 (begin_sum does not wait)");
    broken(laws_of<InAnyOrder>(2), "law 3");
    broken(laws_of<SaysOk>(2), "law 4 (another number of words)");
    broken(laws_of<ForgetsRefusals>(2), "the group to stay refused");
    broken(laws_of<RefusesLate>(2, {.refused_within = 2.0, .rounds = 2}), "a refusal within");
}
