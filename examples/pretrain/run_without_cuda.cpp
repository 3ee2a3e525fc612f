// In builds without the CUDA device.
#include "run_cuda.hpp"

namespace pretrain {

std::string cuda_complaint() { return "--device cuda: this build of pretrain has no CUDA"; }

RunRecord run_cuda(const Settings&, Strategy, const Corpus&, const std::optional<Checkpoint>&, double) {
    throw UserError(cuda_complaint());
}

}  // namespace pretrain
