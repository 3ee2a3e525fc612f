#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "steelyard/core/random.hpp"
#include "steelyard/cpu/kernels.hpp"

using namespace steelyard;

namespace {

/// Rows times panels of the format T, of random words; int8 with scales.
template <class T>
struct Operands {
    using F = cpu::Format<T>;
    static constexpr index_t steps = 150, most_rows = 12, most_panels = 4;  // 64 + 64 + 22 steps of int8
    static constexpr index_t width = cpu::panel_width<T>, groups = 3;

    std::vector<typename F::left> left = std::vector<typename F::left>(most_rows * steps);
    std::vector<typename F::word> right = std::vector<typename F::word>(most_panels * steps * width);
    std::vector<float> left_scale = std::vector<float>(most_rows * groups),
                       right_scale = std::vector<float>(most_panels * groups * width);
    std::vector<std::int32_t> beginning = std::vector<std::int32_t>(most_rows * groups);

    Operands() {
        const Philox random(7, Stream::user);
        std::uint64_t draw = 0;
        const auto fill = [&](auto& words) {
            using Word = typename std::remove_reference_t<decltype(words)>::value_type;
            for (auto& word : words) {
                if constexpr (std::is_floating_point_v<Word>) {
                    word = static_cast<Word>(random.normal(draw++));
                } else {
                    // Small numbers as bf16 too: exponents below that of 1.
                    const auto bits = static_cast<std::uint32_t>(random.below(draw++, 1u << 30)) & 0x3f7f3f7fu;
                    static_assert(sizeof(Word) % sizeof bits == 0);
                    for (std::size_t at = 0; at < sizeof(Word); at += sizeof bits)
                        std::memcpy(reinterpret_cast<char*>(&word) + at, &bits, sizeof bits);
                }
            }
        };
        fill(left), fill(right), fill(left_scale), fill(right_scale);
        for (auto& begin : beginning) begin = static_cast<std::int32_t>(random.below(draw++, 1000));
    }

    [[nodiscard]] std::vector<typename F::sum> multiply(index_t rows, index_t panels, const cpu::Ahead& ahead) const {
        std::vector<typename F::sum> out(static_cast<std::size_t>(rows * panels * width));
        cpu::TileCall<T> call;
        call.steps = steps;
        call.a = left.data(), call.a_row = steps;
        call.b = right.data(), call.b_panel = steps * width;
        call.c = out.data(), call.c_row = panels * width;
        if constexpr (F::grouped) {
            call.a_scale = left_scale.data(), call.a_begin = beginning.data(), call.groups = groups;
            call.b_scale = right_scale.data(), call.b_groups = groups * width;
        }
        cpu::tiles(rows, panels, call, ahead);
        return out;
    }
};

}  // namespace

TEST_CASE_TEMPLATE("what a tile brings nearer changes no bit of it", T, float, double, bf16, std::int8_t) {
    const Operands<T> operands;
    const auto same_bits = [](const auto& a, const auto& b) {
        return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    for (index_t rows = 1; rows <= cpu::register_rows; ++rows)
        for (const index_t panels : {index_t{1}, cpu::panels_at_once(rows)}) {
            CAPTURE(rows);
            CAPTURE(panels);
            const auto plain = operands.multiply(rows, panels, {});
            CHECK(same_bits(operands.multiply(rows, panels, {.panel = true}), plain));
            const auto next = cpu::Ahead::run(operands.right.data(), 4096, rows, operands.steps);
            CHECK(same_bits(operands.multiply(rows, panels, next), plain));
            // And side by side as alone.
            const auto one = operands.multiply(rows, 1, {});
            for (index_t r = 0; r < rows; ++r)
                CHECK(std::memcmp(&one[static_cast<std::size_t>(r * operands.width)],
                                  &plain[static_cast<std::size_t>(r * panels * operands.width)],
                                  static_cast<std::size_t>(operands.width) * sizeof one[0]) == 0);
        }
}
