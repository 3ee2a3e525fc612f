#ifdef STEELYARD_HAS_MPI
#include "steelyard/comm/mpi.hpp"
#include "strategies_table.hpp"

namespace pretrain {
template std::unique_ptr<MoeBlock<float>> make_moe_block(const Settings&, Strategy, int, const steelyard::MpiComm&);
}
#endif
