// Gradients of the whole layer under each option of the router.
#include "layer/gradient_case.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

// A bias that moves the choices, a loss on the probabilities and one on the logits: all that meets the router.
using Everything = AllOf<LossFree, BufferedLoss, RouterZLoss>;
const Everything everything{LossFree{{}, {.rate = 0.02}}, BufferedLoss{{}, {.coefficient = 2.0}},
                            RouterZLoss{{}, {.coefficient = 0.3}}};

void check(const TopK& router, const GradientCase& options = {}) {
    using Layer = MoE<double, TopK, SwiGlu, Everything>;
    check_gradients<Layer>(
        {.shape = gradient_shape, .router = router, .expert = {.hidden = 4}, .balance = everything, .layer = 3},
        options);
}

}  // namespace

TEST_CASE("gradients of the whole layer for both scores and both gate weights, every number of experts") {
    for (const Score score : {Score::softmax, Score::sigmoid})
        for (const GateWeight weight : {GateWeight::score, GateWeight::renormalized})
            for (const int k : {1, 2, 3, 6}) {
                CAPTURE(static_cast<int>(score));
                CAPTURE(static_cast<int>(weight));
                CAPTURE(k);
                check({.k = k, .score = score, .weight = weight, .scale = k == 2 ? 2.5 : 1.0}, {.padded = k == 3});
            }
}

TEST_CASE("gradients of the whole layer with groups of experts, ranked by their best or by their two best") {
    for (const Score score : {Score::softmax, Score::sigmoid}) {
        CAPTURE(static_cast<int>(score));
        check({.k = 3, .score = score, .scale = 16, .groups = 3, .kept_groups = 2, .group_score = GroupScore::max});
        check({.k = 2,
               .score = score,
               .scale = 2.5,
               .groups = 3,
               .kept_groups = 1,
               .group_score = GroupScore::top2_sum});
        check({.k = 2, .score = score, .groups = 2, .kept_groups = 1, .group_score = GroupScore::top2_sum},
              {.padded = true});
    }
}

TEST_CASE("gradients of the whole layer with jitter on the inputs and noise on the logits") {
    for (const Score score : {Score::softmax, Score::sigmoid}) {
        CAPTURE(static_cast<int>(score));
        check({.k = 2, .score = score, .jitter = 0.3});
        check({.k = 2, .score = score, .noise = 0.5});
        check({.k = 2, .score = score, .jitter = 0.1, .noise = 0.2, .seed = 9}, {.padded = true});
    }
}
