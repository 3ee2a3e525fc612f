#include "block.hpp"

namespace pretrain {
template std::unique_ptr<CudaBlock> make_cuda_block<float>(const Gpu&, const Settings&, Strategy, int,
                                                           const AnyComm&);
}  // namespace pretrain
