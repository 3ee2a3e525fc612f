// expect: steelyard: Router must provide `route`, `backward`, `scratch_bytes` and `==` as the concept Router says: see docs/policies/router.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine : TopK {
#ifdef STEELYARD_INVALID
    void route() const;
#endif
};

using Layer = MoE<float, Mine, SwiGlu>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
