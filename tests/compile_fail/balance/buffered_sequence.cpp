// expect: steelyard: Buffered takes a scope with one load for each call, such as Synchronized or MicroBatch
// errors: 1
#include "steelyard/balance/policy.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Policy = Balance<Buffered<Sequence>, LoadBalancingLoss>;
#else
using Policy = Balance<Buffered<MicroBatch>, LoadBalancingLoss>;
#endif

index_t bytes(const Policy& policy, const LayerShape& shape) {
    return bytes_of<Policy::State<>>(policy, shape) + bytes_of<Policy::Record<>>(policy, shape);
}
