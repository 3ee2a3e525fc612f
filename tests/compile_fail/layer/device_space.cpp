// expect: steelyard: Device must name its memory `space` and provide `Status check() const`: see docs/policies/device.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine {
#ifndef STEELYARD_INVALID
    using space = HostSpace;
#endif
    Status check() const { return {}; }
    friend bool operator==(const Mine&, const Mine&) = default;
};

using Layer = MoE<float, TopK, SwiGlu, NoBalance, SelfComm, Dropless, KeepActivations, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
