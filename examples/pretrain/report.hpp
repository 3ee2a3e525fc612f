// What a user reads at the end: a table in the terminal and one self-contained page.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "record.hpp"

namespace pretrain {

/// The strategies side by side: perplexity per domain and its geometric mean, MaxVio, specialisation, speed.
[[nodiscard]] std::string table_text(const std::vector<RunRecord>& runs);

/// What the numbers say, in a few sentences computed from them; nothing is claimed that they do not show.
[[nodiscard]] std::vector<std::string> findings(const std::vector<RunRecord>& runs);

/// The page, with pictures by gnuplot as inline SVG; it loads nothing from anywhere. Without gnuplot it has
/// no pictures and says so. `gnuplot` is the program to call.
[[nodiscard]] std::string report_html(const std::vector<RunRecord>& runs, const std::string& gnuplot = "gnuplot");

/// Writes results.json and report.html into `folder`; returns the path of the page.
std::filesystem::path write_report(const std::filesystem::path& folder, const std::vector<RunRecord>& runs);

}  // namespace pretrain
