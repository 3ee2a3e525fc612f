// The CUDA device, for a plain C++ compiler: link steelyard::cuda.
#pragma once

#include "steelyard/cuda/balance.hpp"
#include "steelyard/cuda/device.hpp"
#include "steelyard/cuda/expert.hpp"
#include "steelyard/cuda/memory.hpp"
#include "steelyard/cuda/plan.hpp"
#include "steelyard/cuda/resources.hpp"
#include "steelyard/cuda/router.hpp"
