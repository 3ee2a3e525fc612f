// The scope of docs/policies/balance.md, and the policies that docs/balance.md puts together.
#include <doctest/doctest.h>

#include <vector>

#include "steelyard/balance/laws.hpp"
#include "steelyard/steelyard.hpp"

namespace docs_balance {

using namespace steelyard;

/// f over the last 8 optimizer steps of all ranks and this call's own tokens: a window that is never empty.
struct WindowAndNow : Windowed<8> {
    template <class Space>
    constexpr void resolve(const StepInfo&, const LoadLog<Space>&, view<const std::int64_t, 1, Space> past,
                           view<std::int64_t, 1, Space> load) const {
        for (index_t w = 0; w < load.extents[0]; ++w) load[w] += past[w];  // [E + 1]: the choices, then the tokens
    }
    friend bool operator==(const WindowAndNow&, const WindowAndNow&) = default;
};

using WindowAndNowLoss = Balance<WindowAndNow, LoadBalancingLoss>;

const LayerShape small{.tokens = 12, .width = 4, .experts = 5, .sequences = 2, .micro_steps = 2};

}  // namespace docs_balance

using namespace docs_balance;

TEST_CASE("the scope of the documentation obeys the laws of balance") {
    const Status laws = check_balance_laws(Cpu{}, WindowAndNowLoss{}, small, 2);
    CHECK_MESSAGE(laws.ok(), laws.message());
}

TEST_CASE("the policies that the documentation puts together obey the laws of balance") {
    // The paper's hybrid, spelled out: the buffered loss, and a micro-batch loss at 1 % of its weight.
    const AllOf hybrid(BufferedLoss{.objective = {.coefficient = 0.008}},
                       MicroBatchLoss{.objective = {.coefficient = 0.008 * 0.01}});

    // DeepSeek-V3's: a bias that follows the load, a small loss within each sequence, and a z-loss.
    const AllOf deepseek(LossFree{.objective = {.rate = 1e-3}}, SequenceLoss{.objective = {.coefficient = 1e-4}},
                         RouterZLoss{});

    // Micro-batch balance for 10,000 steps, then over the whole batch.
    const Scheduled<MicroBatchLoss, SynchronizedLoss> schedule{.at_step = 10000};

    for (const Status& laws : {check_balance_laws(Cpu{}, hybrid, small, 2),
                               check_balance_laws(Cpu{}, deepseek, small, 2),
                               check_balance_laws(Cpu{}, schedule, small, 2)})
        CHECK_MESSAGE(laws.ok(), laws.message());
}
