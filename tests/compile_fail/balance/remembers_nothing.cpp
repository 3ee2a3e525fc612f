// expect: steelyard: a scope that does not count has no load to remember
// errors: 1
#include "steelyard/balance/policy.hpp"

struct Odd : steelyard::ScopeDefaults {
#ifdef STEELYARD_INVALID
    static constexpr bool counts = false, remembers = true;
#else
    static constexpr bool counts = false;
#endif
};

[[maybe_unused]] constexpr bool used = steelyard::Balance<Odd, steelyard::ZLoss>::has_load;
