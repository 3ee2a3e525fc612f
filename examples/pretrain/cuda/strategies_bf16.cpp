#include "block.hpp"

namespace pretrain {
template std::unique_ptr<CudaBlock> make_cuda_block<steelyard::bf16>(const Gpu&, const Settings&, Strategy, int,
                                                                     const AnyComm&);
}  // namespace pretrain
