// From a strategy's name to a compiled balance policy: the one place where run time meets compile time.
#pragma once

#include <memory>
#include <vector>

#include "any_comm.hpp"
#include "moe_block.hpp"
#include "settings.hpp"

namespace pretrain {

/// The MoE block of one layer under a strategy. Compiled in strategies.cpp for the elements that runs use.
/// Throws `UserError` for a number of windows that is not compiled.
template <class T>
[[nodiscard]] std::unique_ptr<MoeBlock<T>> make_moe_block(const Settings& settings, Strategy strategy, int layer,
                                                          const AnyComm& comm);

/// The blocks of all layers, as the Transformer takes them.
template <class T>
[[nodiscard]] std::vector<std::unique_ptr<MoeBlock<T>>> make_moe_blocks(const Settings& settings, Strategy strategy,
                                                                        const AnyComm& comm) {
    std::vector<std::unique_ptr<MoeBlock<T>>> blocks;
    for (int l = 0; l < settings.layers; ++l) blocks.push_back(make_moe_block<T>(settings, strategy, l, comm));
    return blocks;
}

}  // namespace pretrain
