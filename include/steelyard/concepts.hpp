// The axes of the library, each a documented concept: what to read before writing a policy of one's own.
#pragma once

#include "steelyard/balance/policy.hpp"
#include "steelyard/comm/concept.hpp"
#include "steelyard/expert/concept.hpp"
#include "steelyard/layer/retention.hpp"
#include "steelyard/ops/device.hpp"
#include "steelyard/plan/overflow.hpp"
#include "steelyard/router/concept.hpp"
