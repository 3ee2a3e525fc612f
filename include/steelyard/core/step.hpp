// Where in training a call stands, and how much of the global batch it holds.
#pragma once

#include <cstdint>

#include "steelyard/core/view.hpp"

namespace steelyard {

/// The part of an optimizer step that one call of a layer stands for.
///
/// **Normalisation contract.** The gradients of all ranks and all micro-steps are meant to be *summed*.
/// Every term of a balance loss is divided by `total_tokens`, the number of valid tokens in the whole
/// optimizer step over all ranks and micro-steps, so that the sum is the same however the batch is
/// split. A framework that averages over R ranks sets `grad_scale = R`; loss scaling goes there too.
struct StepInfo {
    /// Optimizer step, from 0. With `micro_step` the key under which an observation is kept once.
    std::int64_t step = 0;
    /// Accumulation step within the optimizer step, from 0.
    std::int64_t micro_step = 0;
    /// Valid tokens of the whole optimizer step, over ranks and micro-steps. 0: this call is the whole.
    std::int64_t total_tokens = 0;
    /// Position of this call's first token in the step's global batch; keys the random numbers, so
    /// that noise does not depend on how the batch is split.
    std::int64_t token_offset = 0;
    /// Multiplies the balance gradients (not the reported loss).
    double grad_scale = 1.0;
};

/// What a forward is for.
enum class Mode {
    train,     ///< observe, count, compute the balance loss
    evaluate,  ///< no noise, no observation, no communication: touches no state
};

}  // namespace steelyard
