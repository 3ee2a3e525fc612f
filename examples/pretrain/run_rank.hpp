// A rank's run on the CPU. Compiled once: threads and processes differ in what they talk by alone.
#pragma once

#include "run.hpp"

namespace pretrain {

/// Trains until the last step, or until somebody asks to stop. Every rank of the group calls it.
void run_rank(Shared<float>& shared, const AnyComm& comm, Team team);

}  // namespace pretrain
