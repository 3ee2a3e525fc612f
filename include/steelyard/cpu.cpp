// The CPU kernels compiled once, for programs of several translation units: part of the program where the others are
// compiled with STEELYARD_CPU_KERNELS_LINKED, and with the same -march as they. The target steelyard::cpu does both.
#if !defined(STEELYARD_CPU_KERNELS_LINKED)
#define STEELYARD_CPU_KERNELS_LINKED
#endif
#define STEELYARD_CPU_KERNELS_HERE
#include "steelyard/cpu/kernels.hpp"
