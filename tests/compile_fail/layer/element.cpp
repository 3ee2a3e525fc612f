// expect: steelyard: the element type of a layer is float or double on the CPU
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Element = int;
#else
using Element = float;
#endif

using Layer = MoE<Element, TopK, SwiGlu>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
