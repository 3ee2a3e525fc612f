#include "case.hpp"

#include <regex>

namespace steelyard_bench {
namespace {

constexpr Shape with_tokens(Shape shape, index_t tokens) {
    shape.tokens = tokens;
    return shape;
}

constexpr Shape decode{"C", 1, 2048, 768, 128, 8};
constexpr Shape models[] = {{"Qwen3-30B-A3B", 1, 2048, 768, 128, 8},
                            {"OLMoE", 1, 2048, 1024, 64, 8},
                            {"DeepSeek-V2-Lite", 1, 2048, 1408, 64, 6}};
constexpr Shape tiny{"tiny", 48, 64, 160, 6, 2};  // the test's

/// A shape with a type and a pass.
struct Group {
    Shape shape;
    Type type;
    Pass pass;
};

/// Everything of one set of weights comes in a row.
std::vector<Group> groups(const CaseChoice& choice) {
    std::vector<Group> found;
    constexpr Type types[] = {Type::f32, Type::bf16, Type::int8};
    if (choice.tiny) {
        for (const Type type : types) found.push_back({tiny, type, Pass::forward});
        found.push_back({tiny, Type::f32, Pass::train});
        return found;
    }
    for (const Shape& shape : {shape_a, shape_b}) {
        for (const Type type : types) found.push_back({shape, type, Pass::forward});
        found.push_back({shape, Type::f32, Pass::train});
    }
    for (const Type type : types)
        for (const index_t tokens : {1, 2, 4, 8, 16})
            if (!choice.quick || tokens == 1 || tokens == 16)
                found.push_back({with_tokens(decode, tokens), type, Pass::forward});
    if (choice.quick) return found;
    for (const Shape& model : models) {
        for (const Type type : types)
            for (const index_t tokens : {1, 64, 1024, 4096})
                found.push_back({with_tokens(model, tokens), type, Pass::forward});
        found.push_back({with_tokens(model, 1024), Type::f32, Pass::train});
    }
    return found;
}

}  // namespace

std::string_view name_of(Type type) {
    constexpr std::string_view names[] = {"f32", "bf16", "int8"};
    return names[static_cast<int>(type)];
}

std::string_view name_of(Skew skew) { return skew == Skew::uniform ? "uniform" : "zipf"; }
std::string_view name_of(Pass pass) { return pass == Pass::forward ? "forward" : "train"; }

std::string Case::name() const {
    std::string text = shape.name;
    text += "/T" + std::to_string(shape.tokens);
    for (const std::string_view part : {name_of(type), name_of(skew), name_of(pass)}) (text += '/') += part;
    return text + "/" + std::to_string(threads) + "t";
}

bool Case::shares_model(const Case& other) const {
    return shape.width == other.shape.width && shape.hidden == other.shape.hidden &&
           shape.experts == other.shape.experts && type == other.type && pass == other.pass;
}

std::vector<Case> list_cases(const CaseChoice& choice) {
    const std::regex filter(choice.filter);
    std::vector<Case> found;
    for (const Group& group : groups(choice))
        for (const Skew skew : {Skew::uniform, Skew::zipf})
            for (const int threads : choice.threads) {
                if (choice.quick && skew == Skew::zipf) continue;
                if (choice.quick && group.type != Type::f32 && threads != choice.threads.front()) continue;
                Case one{group.shape, skew, group.type, group.pass, threads};
                if (choice.filter.empty() || std::regex_search(one.name(), filter)) found.push_back(one);
            }
    return found;
}

}  // namespace steelyard_bench
