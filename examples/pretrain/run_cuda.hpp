// Runs on a GPU, in builds that have the CUDA device.
#pragma once

#include <optional>
#include <string>

#include "checkpoint.hpp"
#include "corpus.hpp"

namespace pretrain {

/// Why `--device cuda` cannot run here, in one sentence; empty where it can.
[[nodiscard]] std::string cuda_complaint();

/// Ranks as threads that share the GPU. `patience`: seconds that a rank waits for the others.
[[nodiscard]] RunRecord run_cuda(const Settings& settings, Strategy strategy, const Corpus& corpus,
                                 const std::optional<Checkpoint>& from, double patience);

}  // namespace pretrain
