// expect: steelyard: this objective acts on a load: give it a scope that counts, such as MicroBatch
// errors: 1
#include "steelyard/balance/policy.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Policy = Balance<PerToken, LoadBalancingLoss>;
#else
using Policy = Balance<MicroBatch, LoadBalancingLoss>;
#endif

index_t bytes(const Policy& policy, const LayerShape& shape) {
    return bytes_of<Policy::State<>>(policy, shape) + bytes_of<Policy::Record<>>(policy, shape);
}
