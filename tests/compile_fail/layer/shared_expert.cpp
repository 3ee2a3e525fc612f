// expect: steelyard: Expert must provide `Status check(const LayerShape&) const`: see docs/policies/expert.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine : SwiGlu {
#ifdef STEELYARD_INVALID
    void check(const LayerShape&) const {}
#endif
};

using Layer = MoE<float, TopK, WithShared<SwiGlu, Mine>>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
