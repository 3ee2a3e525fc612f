// The CUDA device: a stream, and what its kernels need to start.
#pragma once

#include <cstdint>
#include <type_traits>

#include "steelyard/core/bf16.hpp"
#include "steelyard/core/status.hpp"
#include "steelyard/core/view.hpp"

// What cudaStream_t, cudaEvent_t and cublasHandle_t point to: so that no CUDA header is needed to name them.
struct CUstream_st;
struct CUevent_st;
struct cublasContext;

namespace steelyard {

/// Which expert products run.
enum class CudaExperts {
    automatic,  ///< grouped where the GPU and the sizes allow it, looped elsewhere
    looped,     ///< one cuBLAS product for each expert; waits for the plan's counts on the host. The oracle.
    grouped,    ///< one kernel for all experts, which reads the counts on the device: sm_90, bf16, widths of 8 n
};

/// Memory and kernels of one GPU, in the order of one stream.
///
/// Every operation enqueues and returns: results are there once the stream has come so far. A value is a handful of
/// pointers that someone else owns: `CudaResources` makes and keeps them, or the caller's framework does. Calls on one
/// value come from one thread at a time.
///
/// Results are bit-identical from run to run on one kind of GPU. What the host must not wait for, such as a token whose
/// logits are not finite, is written to `faults` (see `CudaFaults`).
struct Cuda {
    using space = CudaSpace;
    template <class T>
    static constexpr bool has_element = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

    CUstream_st* stream = nullptr;   ///< cudaStream_t
    cublasContext* blas = nullptr;   ///< cublasHandle_t with a workspace of its own
    CUstream_st* side = nullptr;     ///< cudaStream_t: statistics and their sums, beside the experts
    CUevent_st* forked = nullptr;    ///< cudaEvent_t: where `side` left `stream`
    CUevent_st* joined = nullptr;    ///< cudaEvent_t: where it comes back
    std::int64_t* faults = nullptr;  ///< [CudaFaults::words] in pinned host memory
    CudaExperts experts = CudaExperts::automatic;

    /// Refuses a value that lacks what kernels need. The stream itself may be null: the default stream.
    [[nodiscard]] Status check() const {
        const auto missing = [](const char* what) {
            return Status::refuse(Code::invalid_argument, "device", what, "what CudaResources made", "a null pointer");
        };
        if (blas == nullptr) return missing("blas");
        if (side == nullptr) return missing("side");
        if (forked == nullptr || joined == nullptr) return missing("events");
        if (faults == nullptr) return missing("faults");
        return {};
    }

    friend bool operator==(const Cuda&, const Cuda&) = default;
};

/// The words at `Cuda::faults`: what kernels found wrong, for the host to look at after it has synchronised.
struct CudaFaults {
    enum Word : int {
        bad_logits = 0,  ///< the first token whose logits were not all finite since the words were cleared; or -1
        words = 8,
    };
};

}  // namespace steelyard
