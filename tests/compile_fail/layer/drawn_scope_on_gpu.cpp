// expect: steelyard: a scope that draws over ranks (Shuffled) runs on the CPU device: use Synchronized
// errors: 1
#include "steelyard/cuda.hpp"
#include "steelyard/steelyard.hpp"

using namespace steelyard;

#ifdef STEELYARD_INVALID
using Loss = ShuffledLoss;
#else
using Loss = SynchronizedLoss;
#endif

using Layer = MoE<bf16, TopK, SwiGlu, Loss, SelfComm, Dropless, KeepActivations, Cuda>;

const Layer::Config& of(const Layer& layer) { return layer.config(); }
