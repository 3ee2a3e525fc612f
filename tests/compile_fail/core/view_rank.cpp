// expect: steelyard: a view has at least one dimension
#include "steelyard/core/view.hpp"

#ifdef STEELYARD_INVALID
using Scores = steelyard::view<float, -1>;
#else
using Scores = steelyard::view<float, 1>;
#endif

bool given(const Scores& scores) { return scores.present(); }
