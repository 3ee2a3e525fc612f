// Runs whose ranks are MPI processes, in builds that have MPI.
#pragma once

#include "run.hpp"

namespace pretrain {

/// Needs a `Ranks` that started MPI. `patience`: seconds that a rank waits for the others.
[[nodiscard]] RunRecord run_mpi(Shared<float>& shared, double patience);

}  // namespace pretrain
