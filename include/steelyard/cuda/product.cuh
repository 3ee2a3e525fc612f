// Dense products by cuBLAS, of matrices in rows.
#pragma once

#include <cublas_v2.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "steelyard/cuda/call.cuh"
#include "steelyard/cuda/device.hpp"
#include "steelyard/cuda/kernels/warp.cuh"

namespace steelyard::cuda {

/// The same as check_call, of cuBLAS.
inline void check_blas(cublasStatus_t result, const char* call) {
    if (result == CUBLAS_STATUS_SUCCESS) return;
    throw Error(Status::refuse(Code::device_failure, "cuda", call, "success",
                               std::string(cublasGetStatusName(result)) + ": " + cublasGetStatusString(result)));
}

/// Whether an operand of a product is read as it lies or with rows and columns exchanged.
enum class Turn { no, yes };

/// c [m, n] (= or +=) op(a) op(b), all in rows; op exchanges rows and columns. Elements of a and b are float,
/// multiplied without TF32, or bf16, summed in float; those of c may be float for both.
template <Turn turn_a, Turn turn_b, class T, class C>
void multiply(const Cuda& device, index_t m, index_t n, index_t k, Matrix<const T> a, Matrix<const T> b, Matrix<C> c,
              Write write) {
    if (m == 0 || n == 0) return;
    constexpr auto type_of = [](bool is_bf16) { return is_bf16 ? CUDA_R_16BF : CUDA_R_32F; };
    constexpr cudaDataType type = type_of(std::is_same_v<T, bf16>), result_type = type_of(std::is_same_v<C, bf16>);
    const float one = 1.0f, beta = write == Write::add ? 1.0f : 0.0f;
    // In columns, as cuBLAS sees it, the product is that of the exchanged operands.
    const cublasStatus_t result = cublasGemmEx(
        device.blas, turn_b == Turn::yes ? CUBLAS_OP_T : CUBLAS_OP_N, turn_a == Turn::yes ? CUBLAS_OP_T : CUBLAS_OP_N,
        static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &one, b.data, type, static_cast<int>(b.stride),
        a.data, type, static_cast<int>(a.stride), &beta, c.data, result_type, static_cast<int>(c.stride),
        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    check_blas(result, "cublasGemmEx");
}

/// A grid of blocks of `threads` for `items` threads.
inline unsigned blocks_for(index_t items, int threads) {
    return static_cast<unsigned>((items + threads - 1) / threads);
}

/// Whether rows can be moved 16 bytes at a time.
template <class T, class... Rows>
bool takes_packs(index_t width, const Rows&... rows) {
    const auto fits = [](const auto& of) {
        return reinterpret_cast<std::uintptr_t>(of.data) % 16 == 0 && of.strides[0] % whole_pack<T> == 0;
    };
    return width % whole_pack<T> == 0 && (fits(rows) && ...);
}

}  // namespace steelyard::cuda
