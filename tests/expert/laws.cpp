#include "steelyard/expert/laws.hpp"

#include <doctest/doctest.h>

#include "steelyard/cpu/expert.hpp"
#include "steelyard/expert/mlp.hpp"
#include "steelyard/expert/swiglu.hpp"

using namespace steelyard;

TEST_CASE("the library's experts obey the laws, at every small size and number of threads") {
    for (const int threads : {1, 3})
        for (const LayerShape& shape : {LayerShape{.tokens = 2, .width = 1, .experts = 1},
                                        LayerShape{.tokens = 12, .width = 5, .experts = 4},
                                        LayerShape{.tokens = 33, .width = 17, .experts = 2},
                                        LayerShape{.tokens = 70, .width = 3, .experts = 7}}) {
            for (const index_t hidden : {index_t{1}, index_t{7}, index_t{19}}) {
                const Status s = check_expert_laws(SwiGlu{hidden}, shape, Cpu{threads});
                CHECK_MESSAGE(s.ok(), s.message());
                for (const Activation a : {Activation::relu, Activation::relu2, Activation::gelu, Activation::silu})
                    for (const bool bias : {false, true}) {
                        const Status m = check_expert_laws(Mlp{hidden, a, bias}, shape, Cpu{threads});
                        CHECK_MESSAGE(m.ok(), m.message());
                    }
            }
        }
}
