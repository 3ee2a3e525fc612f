// Counts what operator new hands out in this test program.
#pragma once

#include <cstddef>

/// Allocations so far, on all threads.
std::size_t allocations();
