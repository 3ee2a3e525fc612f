// expect: steelyard: Overflow must provide `static constexpr bool drops`, `check`, `==` and, where it drops, `scratch_bytes` and `admit`: see docs/policies/overflow.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine : Dropless {
#ifdef STEELYARD_INVALID
    static constexpr bool drops = true;
#endif
};

using Layer = MoE<float, TopK, SwiGlu, NoBalance, SelfComm, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
