// Everything that a plain C++ compiler can use: the layer, its policies and the CPU device.
//
// MPI needs its own header: steelyard/comm/mpi.hpp.
#pragma once

#include "steelyard/balance/policy.hpp"
#include "steelyard/comm/self.hpp"
#include "steelyard/comm/threads.hpp"
#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/balance.hpp"
#include "steelyard/cpu/expert.hpp"
#include "steelyard/cpu/plan.hpp"
#include "steelyard/cpu/router.hpp"
#include "steelyard/diagnostics/load.hpp"
#include "steelyard/diagnostics/specialization.hpp"
#include "steelyard/expert/mlp.hpp"
#include "steelyard/expert/shared.hpp"
#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/module.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/plan/dispatch.hpp"
#include "steelyard/router/top_k.hpp"
