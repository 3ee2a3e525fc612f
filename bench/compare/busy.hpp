// Whether somebody else was at work on the machine: medians forgive some of it, not all.
#pragma once

#include <string>
#include <vector>

namespace steelyard_bench {

/// The processors' time up to now, in ticks of the system's clock.
class Busy {
public:
    Busy();
    /// The share of all processors' time since then that was neither idle nor ours or our workers'.
    [[nodiscard]] double others_since(const Busy& before) const;
    /// Counts another process as ours: PyTorch's.
    static void add_worker(int process);

private:
    double all_ = 0, idle_ = 0, ours_ = 0;
};

}  // namespace steelyard_bench
