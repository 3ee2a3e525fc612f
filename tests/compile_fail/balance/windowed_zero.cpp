// expect: steelyard: Windowed needs at least one step
// errors: 1
#include "steelyard/balance/policy.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Policy = WindowedLoss<0>;
#else
using Policy = WindowedLoss<1>;
#endif

index_t bytes(const Policy& policy, const LayerShape& shape) {
    return bytes_of<Policy::State<>>(policy, shape) + bytes_of<Policy::Record<>>(policy, shape);
}
