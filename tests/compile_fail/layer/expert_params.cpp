// expect: steelyard: Expert must provide `template <class T, class Space> struct Params`: see docs/policies/expert.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine : SwiGlu {
#ifdef STEELYARD_INVALID
    template <class T>
    struct Params {};
#endif
};

using Layer = MoE<float, TopK, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
