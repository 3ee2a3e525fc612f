// Parts of an NcclComm: the current device, looks at a stream, the verdicts on its sums, the end of a communicator.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

namespace steelyard::detail::comm {

struct FreeDeviceWords {
    void operator()(std::int64_t* words) const { (void)cudaFree(words); }
};
struct FreePinnedWords {
    void operator()(std::int64_t* words) const { (void)cudaFreeHost(words); }
};
using DeviceWords = std::unique_ptr<std::int64_t[], FreeDeviceWords>;
using PinnedWords = std::unique_ptr<std::int64_t[], FreePinnedWords>;

inline cudaError_t allocate(DeviceWords& words, std::size_t count) {
    void* memory = nullptr;
    const cudaError_t result = cudaMalloc(&memory, count * sizeof(std::int64_t));
    if (result == cudaSuccess) words.reset(static_cast<std::int64_t*>(memory));
    return result;
}

/// Filled with zeros.
inline cudaError_t allocate(PinnedWords& words, std::size_t count) {
    void* memory = nullptr;
    const cudaError_t result = cudaMallocHost(&memory, count * sizeof(std::int64_t));
    if (result == cudaSuccess)
        words.reset(static_cast<std::int64_t*>(std::memset(memory, 0, count * sizeof(std::int64_t))));
    return result;
}

/// Makes a device current as long as it lives; none when `device` is below 0.
class OnCudaDevice {
public:
    explicit OnCudaDevice(int device) {
        int current = -1;
        if (device < 0 || cudaGetDevice(&current) != cudaSuccess || current == device) return;
        if (cudaSetDevice(device) == cudaSuccess) before_ = current;
    }
    OnCudaDevice(const OnCudaDevice&) = delete;
    OnCudaDevice& operator=(const OnCudaDevice&) = delete;
    ~OnCudaDevice() {
        if (before_ >= 0) (void)cudaSetDevice(before_);
    }

private:
    int before_ = -1;
};

/// Time since something began, and the pauses between looks at it: yields first and sleeps later.
class Polling {
public:
    [[nodiscard]] bool is_over(double seconds) const {
        return std::chrono::duration<double>(Clock::now() - start_).count() > seconds;
    }
    [[nodiscard]] auto deadline(double seconds) const {
        return start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    }
    void pause() {
        if (++polls_ < 1000)
            std::this_thread::yield();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    }

private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point start_ = Clock::now();
    int polls_ = 0;
};

inline bool is_capturing(cudaStream_t stream) {
    auto status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

/// cudaStreamQuery, which leaves no "not ready" behind for whoever asks for the last error next.
inline cudaError_t query(cudaStream_t stream) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaErrorNotReady) (void)cudaGetLastError();
    return state;
}

/// What came of the last sums: for each, its summed head [sum n, sum n^2], which the GPU writes to pinned memory.
class NcclVerdicts {
public:
    static constexpr std::size_t head = 2;
    static constexpr std::size_t slots = 256;

    struct Posted {
        std::uint64_t number = 0;
        std::size_t words = 0;
    };

    cudaError_t open(int ranks) {
        ranks_ = static_cast<std::uint64_t>(ranks);
        return allocate(words_, head * slots);
    }
    [[nodiscard]] bool present() const { return words_ != nullptr; }

    /// Where the head of this sum goes. A sum in a graph keeps its place.
    std::int64_t* place(Posted posted) {
        posted_[posted.number % slots] = posted;
        return words_.get() + head * (posted.number % slots);
    }

    /// Whether ranks passed different numbers of words: R * sum n^2 = (sum n)^2 only if all are equal.
    [[nodiscard]] bool differs(std::size_t slot) const {
        const auto sum = static_cast<std::uint64_t>(total(slot));
        const auto squares = static_cast<std::uint64_t>(words_[head * slot + 1]);
        const std::uint64_t mean = sum / ranks_;
        return sum % ranks_ != 0 || squares != ranks_ * mean * mean;
    }
    [[nodiscard]] std::int64_t total(std::size_t slot) const { return words_[head * slot]; }
    [[nodiscard]] const Posted& posted(std::size_t slot) const { return posted_[slot]; }

    /// The slot of the earliest mismatch; `slots` if there is none.
    [[nodiscard]] std::size_t mismatch() const {
        std::size_t found = slots;
        for (std::size_t slot = 0; slot < slots; ++slot)
            if (differs(slot) && (found == slots || posted_[slot].number < posted_[found].number)) found = slot;
        if (found == slots) return found;
        // A graph on a stream that nobody waited for may be writing one of the two words; a mismatch lasts.
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return differs(found) ? found : slots;
    }

private:
    PinnedWords words_;                   // [slots, 2]
    std::array<Posted, slots> posted_{};  // what they are the heads of
    std::uint64_t ranks_ = 1;
};

/// Aborts a communicator; nothing else ends a kernel that waits for a rank which does not come. Whether the
/// communicator and the stream came to rest within `seconds`.
///
/// On a thread of its own, because ncclCommAbort returns only when every graph that holds a collective of this
/// communicator is destroyed, and may wait for a device that is stuck.
inline bool abort_communicator(ncclComm_t comm, cudaStream_t stream, double seconds) {
    struct Ending {
        std::mutex mutex;
        std::condition_variable changed;
        bool over = false;
    };
    Polling polling;
    const auto ending = std::make_shared<Ending>();
    try {
        std::thread([comm, ending] {
            (void)ncclCommAbort(comm);
            const std::lock_guard lock(ending->mutex);
            ending->over = true;
            ending->changed.notify_all();
        }).detach();
    } catch (const std::system_error&) {
        return false;  // no thread to be had, and without one this rank could hang
    }
    {
        std::unique_lock lock(ending->mutex);
        if (!ending->changed.wait_until(lock, polling.deadline(seconds), [&] { return ending->over; })) return false;
    }
    if (is_capturing(stream)) return false;
    for (; query(stream) == cudaErrorNotReady; polling.pause())
        if (polling.is_over(seconds)) return false;
    return true;
}

}  // namespace steelyard::detail::comm
