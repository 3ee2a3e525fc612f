#include "progress.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

namespace pretrain {

namespace {

constexpr int fallback_width = 100;

int terminal_width(std::FILE* stream) {
    winsize size{};
    if (ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
    return fallback_width;
}

template <class... Arguments>
std::string formatted(const char* format, Arguments... arguments) {
    char text[128];
    std::snprintf(text, sizeof text, format, arguments...);
    return text;
}

std::string rate_text(double tokens_per_second) {
    if (tokens_per_second >= 1e6) return formatted("%.1fM", tokens_per_second / 1e6);
    if (tokens_per_second >= 1e4) return formatted("%.0fk", tokens_per_second / 1e3);
    if (tokens_per_second >= 1e3) return formatted("%.1fk", tokens_per_second / 1e3);
    return formatted("%.0f", tokens_per_second);
}

}  // namespace

std::string duration_text(double seconds) {
    if (!std::isfinite(seconds)) return "?";
    const auto whole = static_cast<long long>(std::lround(std::clamp(seconds, 0.0, 1e9)));
    const long long hours = whole / 3600, minutes = whole / 60 % 60, rest = whole % 60;
    if (hours > 0) return formatted("%lld:%02lld:%02lld", hours, minutes, rest);
    return formatted("%lld:%02lld", minutes, rest);
}

std::string progress_line(const std::string& title, const ProgressState& s, int width) {
    const double done = s.steps > 0 ? static_cast<double>(s.step) / static_cast<double>(s.steps) : 0.0;
    std::string numbers = formatted("%3.0f %%  step %lld/%lld  loss %.3f", 100 * done, static_cast<long long>(s.step),
                                    static_cast<long long>(s.steps), s.loss);
    numbers += formatted("  MaxVio %.2f micro %.2f global", s.max_vio_micro, s.max_vio_global);
    numbers += "  " + rate_text(s.tokens_per_second) + " tok/s";
    if (s.seconds_left >= 0) numbers += "  " + duration_text(s.seconds_left) + " left";

    const int bar = std::min(30, width - static_cast<int>(title.size() + numbers.size()) - 4);
    std::string line = title + " ";
    if (bar >= 5) {
        const int filled = std::clamp(static_cast<int>(std::lround(done * bar)), 0, bar);
        line += "[" + std::string(static_cast<std::size_t>(filled), '=') +
                std::string(static_cast<std::size_t>(bar - filled), ' ') + "] ";
    }
    return (line + numbers).substr(0, static_cast<std::size_t>(std::max(width, 0)));
}

Progress::Progress(std::string title, std::int64_t steps, bool quiet, std::int64_t first_step, std::FILE* stream)
    : title_(std::move(title)),
      steps_(steps),
      first_step_(first_step),
      quiet_(quiet),
      terminal_(isatty(fileno(stream)) != 0),
      stream_(stream),
      start_(Clock::now()),
      last_(start_) {}

Progress::~Progress() {
    if (drawn_) std::fputc('\n', stream_);
}

void Progress::clear_line() {
    if (drawn_) std::fputs("\r\x1b[K", stream_);
    drawn_ = false;
}

void Progress::update(ProgressState state) {
    if (quiet_) return;
    const auto now = Clock::now();
    const bool last = state.step >= steps_;
    const auto pause = terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(30'000);
    if (!last && printed_ && now - last_ < pause) return;
    last_ = now;
    printed_ = true;
    state.steps = steps_;
    const std::int64_t here = state.step - first_step_;
    const double elapsed = std::chrono::duration<double>(now - start_).count();
    state.seconds_left = here > 0 ? elapsed / static_cast<double>(here) * static_cast<double>(steps_ - state.step) : -1;
    if (terminal_) {
        // One column less than the terminal has, or some of them wrap.
        std::fprintf(stream_, "\r%s\x1b[K", progress_line(title_, state, terminal_width(stream_) - 1).c_str());
        drawn_ = true;
    } else {
        std::fprintf(stream_, "%s\n", progress_line(title_, state, 1000).c_str());
    }
    std::fflush(stream_);
}

void Progress::say(const std::string& line) {
    if (quiet_) return;
    clear_line();
    std::fprintf(stream_, "%s\n", line.c_str());
    std::fflush(stream_);
}

}  // namespace pretrain
