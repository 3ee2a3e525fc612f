// expect: steelyard: AllOf takes at most one policy with a selection bias: two would fight over the selection
// errors: 1
#include "steelyard/balance/policy.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Policy = AllOf<LossFree, LossFree>;
#else
using Policy = AllOf<LossFree, MicroBatchLoss>;
#endif

bool steers() { return Policy::has_bias; }
