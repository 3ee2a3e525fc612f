// expect: steelyard: Expert must provide `forward`, `backward`, `scratch_bytes` and `==` as the concept Expert says: see docs/policies/expert.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine : SwiGlu {
#ifdef STEELYARD_INVALID
    void forward() const;
#endif
};

using Layer = MoE<float, TopK, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
