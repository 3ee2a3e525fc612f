#include "steelyard/plan/dispatch.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/cpu/plan.hpp"

using namespace steelyard;

namespace {

/// A plan of these choices in memory of its own.
struct Planned {
    index_t tokens, experts, top_k;
    std::vector<expert_t> choices;
    Bytes block, scratch;
    Plan<> plan;

    Planned(index_t t, index_t e, index_t k, std::vector<expert_t> c, Cpu device = {})
        : tokens(t),
          experts(e),
          top_k(k),
          choices(std::move(c)),
          block(bytes_of<Plan<>>(t, e, k)),
          scratch(plan_scratch_bytes(device, {.tokens = t, .width = 1, .experts = e}, static_cast<int>(k))),
          plan(place<Plan<>>(block.data(), t, e, k)) {
        for (index_t i = 0; i <= e; ++i) plan.offsets(i) = -7;
        for (index_t i = 0; i < t * k; ++i) plan.choice(i) = plan.row.data[i] = -7;
    }
    [[nodiscard]] Status make(Cpu device = {}) {
        return make_plan(device, {choices.data(), tokens, top_k}, plan, scratch.data());
    }
};

}  // namespace

TEST_CASE("A plan of four tokens and three experts by hand") {
    Planned p(4, 3, 2, {2, 0, 1, 2, -1, -1, 0, 2});
    REQUIRE(p.make().ok());
    CHECK(std::vector<index_t>(p.plan.offsets.data, p.plan.offsets.data + 4) == std::vector<index_t>{0, 2, 3, 6});
    CHECK(std::vector<int>(p.plan.choice.data, p.plan.choice.data + 6) == std::vector<int>{1, 6, 2, 0, 3, 7});
    CHECK(std::vector<int>(p.plan.row.data, p.plan.row.data + 8) == std::vector<int>{3, 0, 2, 4, -1, -1, 1, 5});

    const std::vector<double> x{1, 10, 2, 20, 3, 30, 4, 40};
    std::vector<double> rows(14, -1.0);
    REQUIRE(dispatch<double>(Cpu{}, p.plan, view<const double, 2>(x.data(), 4, 2), view<double, 2>(rows.data(), 7, 2))
                .ok());
    CHECK(rows == std::vector<double>{1, 10, 4, 40, 2, 20, 1, 10, 2, 20, 4, 40, -1, -1});

    std::vector<double> y(8, -1.0);
    const view<const double, 2> filled(rows.data(), 7, 2);
    REQUIRE(combine<double>(Cpu{}, p.plan, filled, {}, view<double, 2>(y.data(), 4, 2)).ok());
    CHECK(y == std::vector<double>{2, 20, 4, 40, 0, 0, 8, 80});
    const std::vector<double> weight{0.5, 0.25, 1, 2, 9, 9, 3, 4};
    REQUIRE(combine<double>(Cpu{}, p.plan, filled, view<const double, 2>(weight.data(), 4, 2),
                            view<double, 2>(y.data(), 4, 2))
                .ok());
    CHECK(y == std::vector<double>{0.75, 7.5, 6, 60, 0, 0, 28, 280});

    const std::vector<double> dy{1, 1, 1, 0, 1, 1, 0, 1};
    std::vector<double> dweight(8, 100.0);
    plan_ops<Cpu>::combine_backward<double>(Cpu{}, p.plan, filled, view<const double, 2>(dy.data(), 4, 2),
                                            view<double, 2>(dweight.data(), 4, 2));
    CHECK(dweight == std::vector<double>{111, 111, 102, 102, 100, 100, 140, 140});
}

TEST_CASE("Padded rows of every tensor are left alone") {
    const std::vector<float> x{1, 2, -9, 3, 4, -9};
    const std::vector<expert_t> choices{0, -5, 0, -5};  // one choice and one of padding for each token
    std::vector<index_t> offsets(2);
    std::vector<std::int32_t> choice(2), row(6, -8);
    Plan<> plan{{offsets.data(), 2}, {choice.data(), 2}, {row.data(), 2, 1}};
    plan.row.strides[0] = 3;
    view<const expert_t, 2> chosen(choices.data(), 2, 1);
    chosen.strides[0] = 2;
    const Bytes scratch(plan_scratch_bytes(Cpu{}, {.tokens = 2, .width = 2, .experts = 1}, 1));
    REQUIRE(make_plan(Cpu{}, chosen, plan, scratch.data()).ok());
    CHECK(row == std::vector<std::int32_t>{0, -8, -8, 1, -8, -8});
    view<const float, 2> in(x.data(), 2, 2);
    in.strides[0] = 3;
    std::vector<float> rows(8, -1.0f), y(8, -1.0f);
    view<float, 2> to(rows.data(), 2, 2), back(y.data(), 2, 2);
    to.strides[0] = back.strides[0] = 4;
    REQUIRE(dispatch<float>(Cpu{}, plan, in, to).ok());
    CHECK(rows == std::vector<float>{1, 2, -1, -1, 3, 4, -1, -1});
    REQUIRE(combine<float>(Cpu{}, plan, to, {}, back).ok());
    CHECK(y == std::vector<float>{1, 2, -1, -1, 3, 4, -1, -1});
}

TEST_CASE("No tokens make an empty plan") {
    Planned p(0, 3, 2, {});
    REQUIRE(p.make().ok());
    for (index_t e = 0; e <= 3; ++e) CHECK(p.plan.offsets(e) == 0);
    CHECK(dispatch<float>(Cpu{}, p.plan, view<const float, 2>(nullptr, 0, 4), view<float, 2>(nullptr, 0, 4)).ok());
    CHECK(combine<float>(Cpu{}, p.plan, view<const float, 2>(nullptr, 0, 4), {}, view<float, 2>(nullptr, 0, 4)).ok());
}

TEST_CASE("Each argument that does not fit is refused in one sentence and nothing is written") {
    Planned p(2, 3, 2, {0, 3, 1, 2});
    CHECK(p.make().message() == "steelyard: plan: choice 1 of token 0: expected -1 or an expert below 3, came 3");
    CHECK(p.plan.offsets(0) == -7);
    p.choices = {0, 1, -2, 2};
    CHECK(p.make().message() == "steelyard: plan: choice 0 of token 1: expected -1 or an expert below 3, came -2");
    p.choices = {0, 1, 1, 2};
    CHECK(make_plan(Cpu{}, {p.choices.data(), 2, 1}, p.plan, p.scratch.data()).message() ==
          "steelyard: plan: choices: expected [2, 2], came [2, 1]");
    Plan<> torn = p.plan;
    torn.choice.extents[0] = 3;
    CHECK(make_plan(Cpu{}, {p.choices.data(), 2, 2}, torn, p.scratch.data()).message() ==
          "steelyard: plan: plan.choice: expected [4], came [3]");
    torn = p.plan;
    torn.offsets.extents[0] = 1;
    CHECK(make_plan(Cpu{}, {p.choices.data(), 2, 2}, torn, p.scratch.data()).tensor() == "plan.offsets");

    REQUIRE(p.make().ok());
    std::vector<float> x(8), rows(16), y(8);
    const auto message = [&](index_t tokens, index_t filled, index_t width) {
        return dispatch<float>(Cpu{}, p.plan, view<const float, 2>(x.data(), tokens, 4),
                               view<float, 2>(rows.data(), filled, width))
            .message();
    };
    CHECK(message(1, 4, 4) == "steelyard: dispatch: x: expected [2, 4], came [1, 4]");
    CHECK(message(2, 3, 4) == "steelyard: dispatch: rows: expected at least 4 rows, came 3");
    CHECK(message(2, 4, 3) == "steelyard: dispatch: rows: expected [4, 4], came [4, 3]");
    CHECK(message(2, 4, 4) == "ok");
    CHECK(combine<float>(Cpu{}, p.plan, view<const float, 2>(rows.data(), 4, 4), view<const float, 2>(x.data(), 2, 1),
                         view<float, 2>(y.data(), 2, 4))
              .message() == "steelyard: combine: weight: expected [2, 2], came [2, 1]");
    CHECK(combine<float>(Cpu{}, p.plan, view<const float, 2>(rows.data(), 4, 4), {}, view<float, 2>(nullptr, 2, 4))
              .message() == "steelyard: combine: y: expected a tensor of [2, 4], came a null pointer");
}
