// expect: steelyard: BalancePolicy must be Balance<Scope, Objective>, AllOf<...>, Scheduled<...> or meet the concept BalancePolicy: see docs/policies/balance.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Policy = MicroBatch;
#else
using Policy = MicroBatchLoss;
#endif

using Layer = MoE<float, TopK, SwiGlu, Policy>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
