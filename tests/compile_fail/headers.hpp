// What most cases include, precompiled.
#pragma once

#include "steelyard/expert/swiglu.hpp"
#include "steelyard/layer/moe.hpp"
#include "steelyard/router/top_k.hpp"
