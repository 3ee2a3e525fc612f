# The target steelyard::nccl: the library, NCCL and the CUDA runtime; no CUDA compiler. Used by the build tree and by
# the installed package. STEELYARD_HAS_NCCL is for programs that can run with and without NCCL; no header reads it.
add_library(steelyard_nccl INTERFACE)
add_library(steelyard::nccl ALIAS steelyard_nccl)
target_link_libraries(steelyard_nccl INTERFACE steelyard::steelyard NCCL::nccl CUDA::cudart)
target_compile_definitions(steelyard_nccl INTERFACE STEELYARD_HAS_NCCL=1)
