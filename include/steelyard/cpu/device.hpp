// The CPU device: one explicit number of threads.
#pragma once

#include <string>

#include "steelyard/core/status.hpp"
#include "steelyard/core/view.hpp"

namespace steelyard {

/// Host memory and host threads. Results are bit-identical for any number of threads.
///
/// Threads come from OpenMP where the program is compiled with it; otherwise every call is serial.
struct Cpu {
    using space = HostSpace;
    int threads = 1;

    [[nodiscard]] Status check() const {
        if (threads >= 1) return {};
        return Status::refuse(Code::invalid_argument, "device", "threads", "at least 1", std::to_string(threads));
    }

    friend bool operator==(const Cpu&, const Cpu&) = default;
};

}  // namespace steelyard
