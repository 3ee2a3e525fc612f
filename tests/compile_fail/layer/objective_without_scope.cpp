// expect: steelyard: an objective needs a scope: write Balance<MicroBatch, Objective>: see docs/policies/balance.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Policy = LoadBalancingLoss;
#else
using Policy = Balance<MicroBatch, LoadBalancingLoss>;
#endif

using Layer = MoE<float, TopK, SwiGlu, Policy>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
