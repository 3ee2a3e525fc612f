// expect: steelyard: check_view takes one extent for each dimension
#include "steelyard/core/layout.hpp"

using namespace steelyard;

Status check(const view<float, 2>& scores) {
#ifdef STEELYARD_INVALID
    return check_view("router", "scores", scores, 8);
#else
    return check_view("router", "scores", scores, 8, 4);
#endif
}
