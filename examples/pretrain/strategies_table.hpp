// The table of strategies: each name and the library's policy that it stands for.
#pragma once

#include "moe_block_of.hpp"
#include "strategies.hpp"

namespace pretrain {

/// make(policy, unit) with the balance policy of a strategy, and the coefficient that its reported loss is divided by.
/// A policy that `make` does not take is refused.
template <class Make>
auto with_strategy(const Settings& s, Strategy strategy, const Make& make) {
    using namespace steelyard;
    using Made = decltype(make(NoBalance{}, 1.0));
    const double c = s.balance_coefficient, unit = c > 0 ? c : 1.0;
    const auto refuse = [&](const std::string& why) -> Made { throw UserError(why); };
    const auto block = [&]<class Main>(const Main& main) -> Made {
        if constexpr (std::is_invocable_v<const Make&, const Main&, double>)
            return make(main, unit);
        else
            return refuse("--balance " + name_of(strategy) + " is not for --device " + name_of(s.device));
    };
    const LoadBalancingLoss loss{c};
    const MicroBatchLoss micro{{}, loss};
    const SynchronizedLoss sync{{}, loss};

    switch (strategy) {
        case Strategy::micro: return block(micro);
        case Strategy::sequence: return block(SequenceLoss{{}, loss});
        case Strategy::sync: return block(sync);
        case Strategy::buffer: return block(BufferedLoss{{}, loss});
        case Strategy::shuffle: return block(ShuffledLoss{Shuffled(s.seed), loss});
        case Strategy::hybrid: return block(hybrid_loss(c, 0.01));
        case Strategy::loss_free: return block(LossFree{{}, {s.bias_rate}});
        case Strategy::none: return block(NoBalance{});
        case Strategy::windowed:  // the number of windows is part of the type
            switch (s.windows) {
                case 1: return block(WindowedLoss<1>{{}, loss});
                case 4: return block(WindowedLoss<4>{{}, loss});
                case 16: return block(WindowedLoss<16>{{}, loss});
                default:
                    return refuse("--windows is compiled for 1, 4 and 16, but " + std::to_string(s.windows) + " came");
            }
        case Strategy::schedule:
            if (s.switch_to == Strategy::sync)
                return block(Scheduled<MicroBatchLoss, SynchronizedLoss>{s.switch_step(), micro, sync});
            return block(Scheduled<SynchronizedLoss, MicroBatchLoss>{s.switch_step(), sync, micro});
    }
    return refuse("strategy '" + name_of(strategy) + "' is not compiled");
}

template <class T>
std::unique_ptr<MoeBlock<T>> make_moe_block(const Settings& s, Strategy strategy, int layer, const AnyComm& comm) {
    if (s.router == RouterKind::merge) {
        if (strategy != Strategy::none) throw UserError("--router merge needs --balance none");
        return std::make_unique<MergedBlock<T>>(s, layer, comm);
    }
    return with_strategy(s, strategy, [&]<class Main>(const Main& main, double unit) -> std::unique_ptr<MoeBlock<T>> {
        return std::make_unique<MoeBlockOf<T, Main>>(s, layer, comm, main, unit);
    });
}

}  // namespace pretrain
