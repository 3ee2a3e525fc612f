// expect: CudaSpace
// errors: 1
#include "steelyard/core/view.hpp"

using namespace steelyard;

// Memory of the device does not reach host code.
float first(view<const float, 1> scores) { return scores(0); }

#ifdef STEELYARD_INVALID
float read(const view<float, 1, CudaSpace>& scores) { return first(scores); }
#else
float read(const view<float, 1, HostSpace>& scores) { return first(scores); }
#endif
