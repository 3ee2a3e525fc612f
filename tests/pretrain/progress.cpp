#include "pretrain/progress.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

using namespace pretrain;

namespace {

const ProgressState half{50, 100, 2.3456, 12345, 0.9, 0.25, 75};

std::string all_of(std::FILE* file) {
    std::rewind(file);
    std::string text;
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) text += static_cast<char>(c);
    return text;
}

}  // namespace

TEST_CASE("the line shows loss, MaxVio, speed and time left") {
    CHECK(progress_line("sync", half, 140) ==
          "sync [===============               ]  50 %  step 50/100  loss 2.346  MaxVio 0.90 micro 0.25 global  12k "
          "tok/s  "
          "1:15 left");
}

TEST_CASE("the line never exceeds the terminal; the bar gives way first") {
    for (int width = 0; width < 200; ++width)
        CHECK(progress_line("sync", half, width).size() <= static_cast<std::size_t>(width));
    CHECK(progress_line("sync", half, 100).find("1:15 left") != std::string::npos);
    CHECK(progress_line("sync", half, 95).find('[') == std::string::npos);
    CHECK(progress_line("sync", half, 95).find("1:15 left") != std::string::npos);
}

TEST_CASE("durations read as clocks") {
    CHECK(duration_text(0) == "0:00");
    CHECK(duration_text(65.4) == "1:05");
    CHECK(duration_text(7384) == "2:03:04");
    CHECK(duration_text(-3) == "0:00");
    CHECK(duration_text(std::nan("")) == "?");
}

TEST_CASE("outside a terminal there are few plain lines, and none when quiet") {
    std::FILE* file = std::tmpfile();
    REQUIRE(file != nullptr);
    {
        Progress progress("micro", 100, false, 0, file);
        for (std::int64_t step = 1; step <= 100; ++step) progress.update({step, 100, 2.0, 1000, 1, 1, -1});
        progress.say("checkpoint written");
    }
    const std::string text = all_of(file);
    CHECK(text.find('\r') == std::string::npos);
    CHECK(text.find('\x1b') == std::string::npos);
    CHECK(std::count(text.begin(), text.end(), '\n') == 3);  // the first step, the last, and what was said
    std::fclose(file);

    file = std::tmpfile();
    {
        Progress progress("micro", 2, true, 0, file);
        progress.update(half);
        progress.say("nothing");
    }
    CHECK(all_of(file).empty());
    std::fclose(file);
}
