#include "busy.hpp"

#include <algorithm>
#include <fstream>
#include <limits>

namespace steelyard_bench {
namespace {

std::vector<std::string>& processes() {
    static std::vector<std::string> ours = {"self"};
    return ours;
}

/// User and system time of a process; 0 where it is gone.
double ticks_of(const std::string& process) {
    std::ifstream file("/proc/" + process + "/stat");
    file.ignore(std::numeric_limits<std::streamsize>::max(), ')');  // the name may hold anything
    std::string skipped;
    for (int i = 0; i < 11; ++i) file >> skipped;
    double user = 0, system = 0;
    file >> user >> system;
    return user + system;
}

}  // namespace

Busy::Busy() {
    std::ifstream file("/proc/stat");
    std::string name;
    file >> name;
    double ticks = 0;
    for (int column = 0; column < 8 && file >> ticks; ++column) {  // user nice system idle iowait irq softirq steal
        all_ += ticks;
        if (column == 3 || column == 4) idle_ += ticks;
    }
    for (const auto& process : processes()) ours_ += ticks_of(process);
}

double Busy::others_since(const Busy& before) const {
    const double all = all_ - before.all_;
    return all <= 0 ? 0 : std::max(0.0, (all - (idle_ - before.idle_) - (ours_ - before.ours_)) / all);
}

void Busy::add_worker(int process) { processes().push_back(std::to_string(process)); }

}  // namespace steelyard_bench
