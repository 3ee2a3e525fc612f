// expect: steelyard: Overflow must provide `static constexpr bool drops`, `check`, `==` and, where it drops, `scratch_bytes` and `admit`: see docs/policies/overflow.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine {
#ifndef STEELYARD_INVALID
    static constexpr bool drops = false;
#endif
    Status check(const LayerShape&, int) const { return {}; }
    friend bool operator==(const Mine&, const Mine&) = default;
};

using Layer = MoE<float, TopK, SwiGlu, NoBalance, SelfComm, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
