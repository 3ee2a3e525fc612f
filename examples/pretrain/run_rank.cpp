#include "run_rank.hpp"

#include "strategies.hpp"

namespace pretrain {

void run_rank(Shared<float>& shared, const AnyComm& comm, Team team) {
    const Settings& settings = shared.settings;
    Run<float>(shared, comm, team, make_moe_blocks<float>(settings, shared.strategy, comm), Threads(settings.threads))
        .go();
}

}  // namespace pretrain
