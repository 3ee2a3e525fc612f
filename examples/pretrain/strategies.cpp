#include "strategies_table.hpp"

namespace pretrain {
template std::unique_ptr<MoeBlock<float>> make_moe_block(const Settings&, Strategy, int, const AnyComm&);
}
