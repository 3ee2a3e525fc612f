// What is measured: sizes, routing, element type, pass and threads of one line of the table.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "../shape.hpp"

namespace steelyard_bench {

/// Elements of the experts' weights.
enum class Type { f32, bf16, int8 };
[[nodiscard]] std::string_view name_of(Type type);
/// Bytes of a weight in our formats, scales included.
[[nodiscard]] double weight_bytes(Type type);

/// How unevenly tokens choose: zipf adds the logarithm of 1 / rank to the logits of each expert.
enum class Skew { uniform, zipf };
[[nodiscard]] std::string_view name_of(Skew skew);

/// Forward for inference, or forward and backward of a training step.
enum class Pass { forward, train };
[[nodiscard]] std::string_view name_of(Pass pass);

struct Case {
    Shape shape;
    Skew skew = Skew::uniform;
    Type type = Type::f32;
    Pass pass = Pass::forward;
    int threads = 1;

    /// Decode: the caches are emptied before every call, as the other layers of a model would do.
    [[nodiscard]] bool cold() const { return pass == Pass::forward && shape.tokens <= 64; }
    /// Different batches of tokens, taken in turn: few tokens choose few of the experts.
    [[nodiscard]] index_t sets() const { return shape.tokens > 64 ? 1 : shape.tokens > 16 ? 2 : 8; }
    [[nodiscard]] double flops() const { return shape.forward_flops() * (pass == Pass::train ? 3 : 1); }
    /// "A/T4096/f32/uniform/forward/1t"
    [[nodiscard]] std::string name() const;
    /// Whether the same weights serve both, in the same elements and order.
    [[nodiscard]] bool shares_model(const Case& other) const;
};

struct CaseChoice {
    bool quick = false, tiny = false;
    std::string filter;  ///< a regular expression that the name must match somewhere; empty: all
    std::vector<int> threads = {1, 2};
};

/// The cases in the order in which they are measured: those with the same model side by side.
[[nodiscard]] std::vector<Case> list_cases(const CaseChoice& choice);

}  // namespace steelyard_bench
