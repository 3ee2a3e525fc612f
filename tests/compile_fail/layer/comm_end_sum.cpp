// expect: steelyard: CommBackend must provide rank, size, begin_sum and end_sum: see docs/policies/comm.md
// errors: 1
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"

using namespace steelyard;

struct Mine {
    int rank() const { return 0; }
    int size() const { return 1; }
    Status begin_sum(std::span<std::int64_t>) const { return {}; }
#ifndef STEELYARD_INVALID
    Status end_sum(std::span<std::int64_t>) const { return {}; }
#endif
};

using Layer = MoE<float, TopK, SwiGlu, SynchronizedLoss, Mine>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
