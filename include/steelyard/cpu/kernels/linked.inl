// The kernels of products and experts, which take longest to compile, one by one for all that a layer computes with.
// Where they are linked (STEELYARD_CPU_KERNELS_LINKED) a translation unit only declares them; steelyard/cpu.cpp defines
// them. All of one computation are here: compiled with other options, of which some fuse multiply-adds, its parts would
// not give the same bits.

#if defined(STEELYARD_CPU_KERNELS_HERE)
#define STEELYARD_CPU_KERNEL template
#else
#define STEELYARD_CPU_KERNEL extern template
#endif

STEELYARD_CPU_KERNEL void tile<float>(index_t, index_t, const TileCall<float>&);
STEELYARD_CPU_KERNEL void tile<double>(index_t, index_t, const TileCall<double>&);
STEELYARD_CPU_KERNEL void tile<bf16>(index_t, index_t, const TileCall<bf16>&);
STEELYARD_CPU_KERNEL void tile<std::int8_t>(index_t, index_t, const TileCall<std::int8_t>&);

STEELYARD_CPU_KERNEL void multiply<float>(const Product<float>&);
STEELYARD_CPU_KERNEL void multiply<double>(const Product<double>&);
STEELYARD_CPU_KERNEL void multiply<float>(const OuterProduct<float>&);
STEELYARD_CPU_KERNEL void multiply<double>(const OuterProduct<double>&);

STEELYARD_CPU_KERNEL void ffn_hidden<float, float>(const FfnForward<float, float>&, index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_hidden<float, bf16>(const FfnForward<float, bf16>&, index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_hidden<float, std::int8_t>(const FfnForward<float, std::int8_t>&, index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_hidden<double, double>(const FfnForward<double, double>&, index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_output<float, float>(const FfnForward<float, float>&, index_t, index_t, index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_output<float, bf16>(const FfnForward<float, bf16>&, index_t, index_t, index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_output<float, std::int8_t>(const FfnForward<float, std::int8_t>&, index_t, index_t,
                                                         index_t, index_t);
STEELYARD_CPU_KERNEL void ffn_output<double, double>(const FfnForward<double, double>&, index_t, index_t, index_t,
                                                     index_t);
STEELYARD_CPU_KERNEL void ffn_backward_hidden<float>(const FfnBackward<float>&);
STEELYARD_CPU_KERNEL void ffn_backward_hidden<double>(const FfnBackward<double>&);
STEELYARD_CPU_KERNEL void ffn_activate<float>(const FfnFunction&, bool, index_t, index_t, const FfnRows<const float>&,
                                              float*, index_t);
STEELYARD_CPU_KERNEL void ffn_activate<double>(const FfnFunction&, bool, index_t, index_t, const FfnRows<const double>&,
                                               double*, index_t);
STEELYARD_CPU_KERNEL void ffn_activate_backward<float>(const FfnBackward<float>&, index_t, const float*, index_t);
STEELYARD_CPU_KERNEL void ffn_activate_backward<double>(const FfnBackward<double>&, index_t, const double*, index_t);

#undef STEELYARD_CPU_KERNEL
