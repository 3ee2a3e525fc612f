// The CPU device: an explicit number of threads, and an instruction set.
#pragma once

#include <string>

#include "steelyard/core/status.hpp"
#include "steelyard/core/view.hpp"
#include "steelyard/cpu/isa.hpp"

namespace steelyard {

/// Host memory and host threads. Results are bit-identical for any number of threads.
///
/// Threads come from OpenMP where the program is compiled with it; otherwise every call is serial.
struct Cpu {
    using space = HostSpace;
    int threads = 1;
    /// What kernels run on; by default the best that the machine has.
    Isa isa = Isa::automatic;

    [[nodiscard]] Status check() const {
        if (threads < 1)
            return Status::refuse(Code::invalid_argument, "device", "threads", "at least 1", std::to_string(threads));
        if (!has_isa(isa))
            return Status::refuse(Code::invalid_argument, "device", "isa", "an instruction set of this machine",
                                  std::string(name_of(isa)));
        return {};
    }

    friend bool operator==(const Cpu&, const Cpu&) = default;
};

}  // namespace steelyard
