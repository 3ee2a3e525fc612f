// expect: steelyard: a scope that communicates, sums the step or keeps a window must have remembers = true
// errors: 1
#include "steelyard/balance/policy.hpp"

struct Odd : steelyard::ScopeDefaults {
#ifdef STEELYARD_INVALID
    static constexpr bool communicates = true;
#else
    static constexpr bool communicates = true, remembers = true;
#endif
};

[[maybe_unused]] constexpr bool used = steelyard::Balance<Odd, steelyard::LoadBalancingLoss>::has_load;
