// The comm backend of docs/policies/comm.md.
#include <doctest/doctest.h>

#include <cstdint>
#include <span>
#include <vector>

#include "steelyard/comm/laws.hpp"
#include "steelyard/steelyard.hpp"

namespace {

using namespace steelyard;

/// One rank of a group that counts what it sends: a backend is four functions around whatever moves the words.
class CountingComm {
public:
    explicit CountingComm(ThreadComm inner, std::int64_t* sent = nullptr) : inner_(inner), sent_(sent) {}

    int rank() const { return inner_.rank(); }
    int size() const { return inner_.size(); }

    /// Posts the sum and returns. `words` belongs to the sum until `end_sum`.
    Status begin_sum(std::span<std::int64_t> words) const {
        if (sent_ != nullptr) *sent_ += static_cast<std::int64_t>(words.size());
        return inner_.begin_sum(words);
    }

    /// Waits. `words` then holds the sum, bit for bit the same on every rank.
    Status end_sum(std::span<std::int64_t> words) const { return inner_.end_sum(words); }

private:
    ThreadComm inner_;
    std::int64_t* sent_;
};

static_assert(CommBackend<CountingComm>);

/// What `check_comm_laws` asks for: a fresh group of three ranks, each calling `body` with its handle.
const auto with_group = [](auto body) -> Status {
    ThreadGroup group(3, {.timeout = 0.5});
    std::vector<Status> found(3);
    run_ranks(group, [&](ThreadComm comm) {
        found[static_cast<std::size_t>(comm.rank())] = body(CountingComm(comm));
    });
    for (Status& status : found)
        if (!status) return std::move(status);
    return {};
};

template <class Policy>
std::int64_t words_sent_by_one_forward() {
    using Layer = MoE<float, TopK, SwiGlu, Policy, CountingComm>;
    const LayerShape shape{.tokens = 4, .width = 8, .experts = 6};
    std::int64_t sent[2] = {};
    ThreadGroup group(2);
    run_ranks(group, [&](ThreadComm comm) {
        Module moe(Layer({.shape = shape, .expert = {.hidden = 8}}), CountingComm(comm, &sent[comm.rank()]));
        std::vector<float> x(4 * 8, 0.5f), y(4 * 8);
        moe.forward({x.data(), 4, 8}, {y.data(), 4, 8});
    });
    CHECK(sent[0] == sent[1]);
    return sent[0];
}

}  // namespace

TEST_CASE("the comm backend of the documentation obeys the laws of backends") {
    const Status laws = check_comm_laws(with_group, {.refused_within = 3.0});
    CHECK_MESSAGE(laws.ok(), laws.message());
}

TEST_CASE("a synchronised layer sends one integer for each expert and five more; a rank-local one sends nothing") {
    CHECK(words_sent_by_one_forward<SynchronizedLoss>() == 6 + 1 + SumHead::words);
    CHECK(words_sent_by_one_forward<MicroBatchLoss>() == 0);
    CHECK(words_sent_by_one_forward<WindowedLoss<4>>() == 0);
}
