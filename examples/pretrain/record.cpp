#include "record.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

namespace pretrain {

namespace {

using Json = nlohmann::ordered_json;
constexpr int format_version = 2;
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

template <class T>
concept HasFields = requires(T& value) {
    value.fields([](const char*, auto&) {});
};

// One conversion each way. Every struct is described by its own `fields`; JSON knows no infinities and no
// NaN, so these are written as strings, and a diverged run keeps its record.

Json encode(double value) {
    if (std::isfinite(value)) return value;
    return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}
Json encode(Strategy value) { return name_of(value); }
Json encode(CommKind value) { return name_of(value); }
Json encode(RouterKind value) { return name_of(value); }
Json encode(DeviceKind value) { return name_of(value); }
Json encode(Precision value) { return name_of(value); }
Json encode(const std::string& value) { return value; }
template <std::integral T>
Json encode(T value) {
    return value;
}
template <class T>
Json encode(const std::vector<T>& values);
template <HasFields T>
Json encode(T value) {
    Json object = Json::object();
    value.fields([&](const char* name, auto& field) { object[name] = encode(field); });
    return object;
}
template <class T>
Json encode(const std::vector<T>& values) {
    Json array = Json::array();
    for (const T& value : values) array.push_back(encode(value));
    return array;
}

void decode(const Json& json, double& value) {
    if (!json.is_string()) return void(value = json.get<double>());
    const auto text = json.get<std::string>();
    value = text == "inf"    ? std::numeric_limits<double>::infinity()
            : text == "-inf" ? -std::numeric_limits<double>::infinity()
                             : nan_value;
}
void decode(const Json& json, Strategy& value) { value = strategy_named(json.get<std::string>()); }
void decode(const Json& json, CommKind& value) { value = comm_named(json.get<std::string>()); }
void decode(const Json& json, RouterKind& value) { value = router_named(json.get<std::string>()); }
void decode(const Json& json, DeviceKind& value) { value = device_named(json.get<std::string>()); }
void decode(const Json& json, Precision& value) { value = precision_named(json.get<std::string>()); }
void decode(const Json& json, std::string& value) { value = json.get<std::string>(); }
template <std::integral T>
void decode(const Json& json, T& value) {
    value = json.get<T>();
}
template <class T>
void decode(const Json& json, std::vector<T>& values);
template <HasFields T>
void decode(const Json& json, T& value) {
    value.fields([&](const char* name, auto& field) {
        // A setting that is younger than the file had its default.
        if (std::is_same_v<T, Settings> && !json.contains(name)) return;
        decode(json.at(name), field);
    });
}
template <class T>
void decode(const Json& json, std::vector<T>& values) {
    values.assign(json.size(), T{});
    for (std::size_t i = 0; i < values.size(); ++i) decode(json.at(i), values[i]);
}

Json encode_summary(const RunRecord& run) {
    const Summary s = summarise(run);
    Json perplexity = Json::object();
    for (std::size_t d = 0; d < s.perplexity.size(); ++d) perplexity[run.domains[d]] = encode(s.perplexity[d]);
    return {{"strategy", name_of(run.strategy)},
            {"balance_bsz", balance_bsz(run.settings, run.strategy)},
            {"router", name_of(run.settings.router)},
            {"seed", run.settings.seed},
            {"tokens", s.tokens},
            {"perplexity", std::move(perplexity)},
            {"geometric_perplexity", encode(s.geometric_perplexity)},
            {"final_loss", encode(s.final_loss)},
            {"max_vio_micro", encode(s.max_vio_micro)},
            {"max_vio_global", encode(s.max_vio_global)},
            {"mutual_information", encode(s.information)},
            {"largest_share", encode(s.share)},
            {"explained_by_byte", encode(s.by_byte)},
            {"explained_by_position", encode(s.by_position)},
            {"routing_kept", encode(s.kept)},
            {"dropped", encode(s.dropped)},
            {"tokens_per_second", encode(s.tokens_per_second)}};
}

/// Numbers side by side on one line, so that a person can read the file and a diff stays small.
std::string pretty(const Json& json, int depth = 0) {
    const std::string indent(static_cast<std::size_t>(depth + 1) * 2, ' '),
        outer(static_cast<std::size_t>(depth) * 2, ' ');
    if (json.is_object() && !json.empty()) {
        std::string text = "{\n";
        for (auto it = json.begin(); it != json.end(); ++it)
            text += (it == json.begin() ? "" : ",\n") + indent + Json(it.key()).dump() + ": " + pretty(*it, depth + 1);
        return text + "\n" + outer + "}";
    }
    if (json.is_array() && !json.empty() && (json[0].is_object() || json[0].is_array())) {
        std::string text = "[\n";
        for (std::size_t i = 0; i < json.size(); ++i) text += (i ? ",\n" : "") + indent + pretty(json[i], depth + 1);
        return text + "\n" + outer + "]";
    }
    return json.dump();
}

double mean(const std::vector<double>& values) {
    return values.empty() ? nan_value
                          : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

/// Mean over layers and over the steps from `from` on.
double mean_from(const std::vector<std::vector<double>>& series, std::size_t from) {
    std::vector<double> all;
    for (std::size_t i = from; i < series.size(); ++i) all.insert(all.end(), series[i].begin(), series[i].end());
    return mean(all);
}

}  // namespace

double DomainLoss::perplexity() const { return std::exp(loss); }

steelyard::Specialization specialization_of(const std::vector<std::vector<std::int64_t>>& counts) {
    const std::size_t domains = counts.empty() ? 0 : counts[0].size();
    std::vector<std::int64_t> table;  // [E, D]
    for (const auto& expert : counts) table.insert(table.end(), expert.begin(), expert.end());
    return steelyard::measure_specialization({table.data(), counts.size(), domains});
}

Summary summarise(const RunRecord& run) {
    Summary s;
    const auto steps = static_cast<std::size_t>(run.series.size());
    s.tokens = run.series.size() * run.settings.tokens_per_step();
    s.geometric_perplexity = s.by_byte = s.by_position = s.kept = s.dropped = nan_value;
    if (!run.evaluations.empty()) {
        const Evaluation& last = run.evaluations.back();
        std::vector<double> losses;
        for (const DomainLoss& domain : last.domains) {
            s.perplexity.push_back(domain.perplexity());
            losses.push_back(domain.loss);
        }
        s.geometric_perplexity = std::exp(mean(losses));
        for (const auto& layer : last.counts) {
            const steelyard::Specialization found = specialization_of(layer);
            s.information.push_back(found.mutual_information);
            s.share.push_back(found.largest_share);
        }
        std::vector<double> by_byte, by_position, kept;
        std::int64_t choices = 0, dropped = 0;
        for (const LayerRouting& layer : last.routing) {
            by_byte.push_back(layer.by_byte);
            by_position.push_back(layer.by_position);
            kept.push_back(layer.kept);
            choices = std::accumulate(layer.choices.begin(), layer.choices.end(), choices);
            dropped = std::accumulate(layer.dropped.begin(), layer.dropped.end(), dropped);
        }
        s.by_byte = mean(by_byte);
        s.by_position = mean(by_position);
        s.kept = mean(kept);
        if (choices > 0) s.dropped = static_cast<double>(dropped) / static_cast<double>(choices);
    }
    const std::size_t tail = steps - (steps + 9) / 10;
    s.final_loss = mean({run.series.loss.begin() + static_cast<std::ptrdiff_t>(tail), run.series.loss.end()});
    s.max_vio_micro = mean_from(run.series.max_vio_micro, steps / 2);
    s.max_vio_global = mean_from(run.series.max_vio_global, steps / 2);
    s.tokens_per_second = run.wall_seconds > 0 ? static_cast<double>(s.tokens) / run.wall_seconds : nan_value;
    return s;
}

void truncate(RunRecord& run, std::int64_t step) {
    std::size_t keep = 0;
    while (keep < run.series.step.size() && run.series.step[keep] < step) ++keep;
    run.series.fields([&](const char*, auto& values) { values.resize(std::min(values.size(), keep)); });
    std::erase_if(run.loads, [&](const LoadSample& sample) { return sample.step >= step; });
    // An evaluation after `step` steps belongs to what is kept.
    std::erase_if(run.evaluations, [&](const Evaluation& evaluation) { return evaluation.step > step; });
}

std::string to_json(const RunRecord& record) { return pretty(encode(record)); }

RunRecord record_from_json(const std::string& text) {
    RunRecord record;
    try {
        decode(Json::parse(text), record);
    } catch (const nlohmann::json::exception& error) {
        throw UserError(std::string("this is not the record of a run: ") + error.what());
    }
    return record;
}

void write_results(const std::filesystem::path& path, const std::vector<RunRecord>& runs) {
    Json file = {{"format", "steelyard pretrain results"}, {"version", format_version}};
    file["summary"] = Json::array();
    file["runs"] = Json::array();
    for (const RunRecord& run : runs) {
        file["summary"].push_back(encode_summary(run));
        file["runs"].push_back(encode(run));
    }
    // Beside the old file and then over it: an interrupt leaves one of the two whole.
    std::filesystem::path fresh = path;
    fresh += ".new";
    std::ofstream out(fresh, std::ios::binary);
    out << pretty(file) << '\n';
    out.close();
    if (!out) throw UserError("'" + path.string() + "' cannot be written");
    std::filesystem::rename(fresh, path);
}

std::vector<RunRecord> read_results(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw UserError("'" + path.string() + "' cannot be read");
    std::vector<RunRecord> runs;
    try {
        const Json file = Json::parse(in);
        if (const int version = file.at("version").get<int>(); version != format_version)
            throw UserError("'" + path.string() + "' has version " + std::to_string(version) +
                            ", but this program reads " + std::to_string(format_version));
        decode(file.at("runs"), runs);
    } catch (const nlohmann::json::exception& error) {
        throw UserError("'" + path.string() + "' is not the result of a run: " + error.what());
    }
    return runs;
}

}  // namespace pretrain
