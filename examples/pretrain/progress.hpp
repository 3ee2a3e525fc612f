// What a user watches while training runs.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace pretrain {

/// What is known after a step.
struct ProgressState {
    std::int64_t step = 0, steps = 0;  ///< steps done, steps of the run
    double loss = 0;                   ///< nats per byte
    double tokens_per_second = 0;
    double max_vio_micro = 0, max_vio_global = 0;
    double seconds_left = 0;  ///< below 0: not known yet
};

/// One line of at most `width` columns: "micro [====>     ]  40 %  loss 2.31  ...". The bar gives way first.
[[nodiscard]] std::string progress_line(const std::string& title, const ProgressState& state, int width);

/// "1:05", "2:03:04".
[[nodiscard]] std::string duration_text(double seconds);

/// A bar that redraws itself on a terminal; elsewhere one line about every thirty seconds. Draws nothing
/// when quiet. One thread calls it.
class Progress {
public:
    /// `first_step` is above 0 in a resumed run, so that the time left counts only what this process did.
    Progress(std::string title, std::int64_t steps, bool quiet, std::int64_t first_step = 0,
             std::FILE* stream = stderr);
    /// Leaves the last line standing.
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    /// After each step; `seconds_left` is filled in here.
    void update(ProgressState state);
    /// A line of its own above the bar, such as "checkpoint written".
    void say(const std::string& line);

private:
    using Clock = std::chrono::steady_clock;
    void clear_line();

    std::string title_;
    std::int64_t steps_, first_step_;
    bool quiet_, terminal_, drawn_ = false, printed_ = false;
    std::FILE* stream_;
    Clock::time_point start_, last_;
};

}  // namespace pretrain
