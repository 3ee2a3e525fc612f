// Everything that is compiled once for each instruction set, in this order. See cpu/kernels.hpp.

#include "steelyard/cpu/kernels/vector.inl"
#include "steelyard/cpu/kernels/rows.inl"
#include "steelyard/cpu/kernels/logits.inl"
#include "steelyard/cpu/kernels/score.inl"
#include "steelyard/cpu/kernels/choose.inl"
#include "steelyard/cpu/kernels/select.inl"
#include "steelyard/cpu/kernels/select_gradient.inl"
#include "steelyard/cpu/kernels/router.inl"
#include "steelyard/cpu/kernels/activation.inl"
#include "steelyard/cpu/kernels/draw.inl"
#include "steelyard/cpu/kernels/ffn_function.inl"
#include "steelyard/cpu/kernels/format.inl"
#include "steelyard/cpu/kernels/tile.inl"
#include "steelyard/cpu/kernels/operand.inl"
#include "steelyard/cpu/kernels/pack.inl"
#include "steelyard/cpu/kernels/product.inl"
#include "steelyard/cpu/kernels/ffn_forward.inl"
#include "steelyard/cpu/kernels/ffn_backward.inl"
#include "steelyard/cpu/kernels/expert.inl"
#if defined(STEELYARD_CPU_KERNELS_LINKED)
#include "steelyard/cpu/kernels/linked.inl"
#endif

/// The kernels that code outside calls, through with_kernels.
struct Kernels : RowKernels, LogitsKernels, RouterKernels, DrawKernels, ExpertKernels {};
