# The target steelyard::cuda: the kernels of the CUDA device, compiled, and what they call. Used by the build tree; the
# installed package brings the library that was made of it.
set(STEELYARD_CUDA_ARCHITECTURES 80-real 90a-real 80-virtual CACHE STRING
  "GPU architectures that steelyard::cuda is compiled for; PTX of the oldest serves those that are not among them")

add_library(steelyard_cuda STATIC include/steelyard/cuda.cu)
add_library(steelyard::cuda ALIAS steelyard_cuda)
target_link_libraries(steelyard_cuda PUBLIC steelyard CUDA::cudart CUDA::cublas)
# Kernels call the library's constexpr functions. 2810: an assignment of a nodiscard class is no discarded value. CMake
# knows no cuda_std_20 of compilers that are newer than itself.
target_compile_options(steelyard_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 --expt-relaxed-constexpr -diag-suppress=2810 -Xcompiler=-Wall,-Wextra>)
# The grouped kernels are made of instructions that only this target has; without it experts are looped over.
if(STEELYARD_CUDA_ARCHITECTURES MATCHES "90a")
  target_compile_definitions(steelyard_cuda PRIVATE STEELYARD_CUDA_SM_90A)
endif()
set_target_properties(steelyard_cuda PROPERTIES
  EXPORT_NAME cuda
  CUDA_ARCHITECTURES "${STEELYARD_CUDA_ARCHITECTURES}"
  CUDA_RUNTIME_LIBRARY Shared
  POSITION_INDEPENDENT_CODE ON)
