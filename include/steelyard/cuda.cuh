// The CUDA device's definitions, for nvcc: in exactly one translation unit of a program, which steelyard::cuda is.
#pragma once

#include "steelyard/cuda.hpp"
#include "steelyard/cuda/balance.cuh"
#include "steelyard/cuda/expert.cuh"
#include "steelyard/cuda/memory.cuh"
#include "steelyard/cuda/plan.cuh"
#include "steelyard/cuda/resources.cuh"
#include "steelyard/cuda/router.cuh"
