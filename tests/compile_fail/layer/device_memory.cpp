// expect: CudaSpace
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

using Layer = MoE<float, TopK, SwiGlu>;

#ifdef STEELYARD_INVALID
using Tokens = view<const float, 2, CudaSpace>;
#else
using Tokens = view<const float, 2, HostSpace>;
#endif

// Memory of the device does not reach a layer of the CPU.
static_assert(requires(Layer::ForwardArgs& args, const Tokens& x) { args.x = x; });
