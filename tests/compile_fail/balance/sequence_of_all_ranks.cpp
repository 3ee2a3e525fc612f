// expect: steelyard: a scope with a load for each sequence is the rank's own
// errors: 1
#include "steelyard/balance/policy.hpp"

struct Odd : steelyard::ScopeDefaults {
#ifdef STEELYARD_INVALID
    static constexpr bool per_sequence = true, communicates = true, remembers = true;
#else
    static constexpr bool per_sequence = true;
#endif
};

[[maybe_unused]] constexpr bool used = steelyard::Balance<Odd, steelyard::LoadBalancingLoss>::has_load;
