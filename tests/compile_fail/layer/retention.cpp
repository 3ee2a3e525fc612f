// expect: steelyard: Retention is KeepActivations or RecomputeActivations
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
struct Mine {};
#else
using Mine = KeepActivations;
#endif

using Layer = MoE<float, TopK, SwiGlu, NoBalance, SelfComm, Dropless, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
