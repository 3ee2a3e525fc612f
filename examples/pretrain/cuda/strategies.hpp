// The MoE blocks of a model on the GPU: the strategies of the table, in float or bf16.
#pragma once

#include <memory>
#include <vector>

#include "gpu.hpp"
#include "pretrain/any_comm.hpp"
#include "pretrain/moe_block.hpp"
#include "pretrain/settings.hpp"
#include "steelyard/core/bf16.hpp"

namespace pretrain {

using CudaBlock = MoeBlock<float, steelyard::CudaSpace>;

/// The block of one layer, whose layer of the library is of `Element`. Compiled in strategies_float.cpp and
/// strategies_bf16.cpp.
template <class Element>
[[nodiscard]] std::unique_ptr<CudaBlock> make_cuda_block(const Gpu& gpu, const Settings& settings, Strategy strategy,
                                                         int layer, const AnyComm& comm);

/// The blocks of all layers, as the Transformer takes them.
[[nodiscard]] inline std::vector<std::unique_ptr<CudaBlock>> make_cuda_blocks(const Gpu& gpu, const Settings& settings,
                                                                              Strategy strategy,
                                                                              const AnyComm& comm) {
    const auto make = settings.in_bf16() ? make_cuda_block<steelyard::bf16> : make_cuda_block<float>;
    std::vector<std::unique_ptr<CudaBlock>> blocks;
    for (int l = 0; l < settings.layers; ++l) blocks.push_back(make(gpu, settings, strategy, l, comm));
    return blocks;
}

}  // namespace pretrain
