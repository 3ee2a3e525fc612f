// expect: steelyard: Router must provide `Status check(const LayerShape&) const`: see docs/policies/router.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine : TopK {
#ifdef STEELYARD_INVALID
    bool check(const LayerShape& shape) const { return k <= shape.experts; }
#else
    Status check(const LayerShape& shape) const { return TopK::check(shape); }
#endif
};

using Layer = MoE<float, Mine, SwiGlu>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
