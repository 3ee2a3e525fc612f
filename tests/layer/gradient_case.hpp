// Finite differences of a whole layer: of the task's loss plus the balance loss, by every parameter and by x.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "support/finite_differences.hpp"
#include "support/rig.hpp"

namespace steelyard::testing {

/// Sizes of the gradient tests: small, and no two alike.
inline constexpr LayerShape gradient_shape{
    .tokens = 9, .width = 5, .experts = 6, .sequences = 3, .micro_steps = 3, .ranks = 1};

struct GradientCase {
    std::uint64_t seed = 1;
    bool padded = false;
    bool labelled = false;  ///< ids 0, 1, 2, 0, ...
    bool chained = false;   ///< logits come from a layer before and go to one after
};

/// Runs a past (a step, and the other micro-steps of this one, out of order), then differentiates micro-step 1.
///
/// Every evaluation is a forward from the same state; one that chose other experts would fail the test: the seeds are
/// such that the choices are away from ties.
template <class LayerT>
void check_gradients(const typename LayerT::Config& config, const GradientCase& options = {}) {
    const index_t tokens = config.shape.tokens, width = config.shape.width;
    Rig<LayerT> rig(config, options.seed);
    const auto batch_at = [&](std::int64_t step, std::int64_t micro_step) {
        const auto place = static_cast<std::uint64_t>(10 * step + micro_step);
        Batch<double> batch(tokens, width, 100 * options.seed + place,
                            {.step = step, .micro_step = micro_step, .total_tokens = 3 * tokens,
                             .token_offset = micro_step * tokens},
                            rig.layer.outputs());
        batch.sequences = {0, 3, 3, tokens};
        for (index_t t = 0; options.labelled && t < tokens; ++t) batch.ids.push_back(static_cast<std::int32_t>(t % 3));
        if (options.chained) {
            batch.prior.resize(static_cast<std::size_t>(tokens * config.shape.experts));
            batch.dlogits.resize(batch.prior.size());
            fill_random<double>(batch.prior, 3 * place + 1);
            fill_random<double>(batch.dlogits, 3 * place + 2);
        }
        if (options.padded) {
            batch.mask.assign(static_cast<std::size_t>(tokens), 1);
            batch.mask[1] = batch.mask[static_cast<std::size_t>(tokens - 2)] = 0;
        }
        return batch;
    };
    REQUIRE(rig.forward(batch_at(0, 0)).message() == "ok");
    REQUIRE(rig.end_step(0).message() == "ok");
    for (const std::int64_t micro_step : {0, 2, 1})
        REQUIRE(rig.forward(batch_at(1, micro_step)).message() == "ok");
    const auto past = rig.state_bytes();

    auto batch = batch_at(1, 1);
    REQUIRE(rig.forward(batch).message() == "ok");
    const auto chosen = rig.routing().expert;
    const std::vector<expert_t> choices(chosen.data, chosen.data + chosen.size());
    REQUIRE(rig.backward(batch).message() == "ok");

    int refused = 0, other_choices = 0;
    const auto loss = [&] {
        rig.restore(past);
        refused += !rig.forward(batch);
        const auto now = rig.routing().expert;
        other_choices += !std::equal(choices.begin(), choices.end(), now.data);
        return rig.task_loss(batch) + rig.balance_loss();
    };
    rig.layer.each_param(rig.params, [&](const std::string& name, auto weights) {
        if (!weights.present()) return;
        const auto size = static_cast<std::size_t>(weights.size());
        const auto offset = static_cast<std::size_t>(weights.data - rig.param_values().data());
        CAPTURE(name);
        CHECK(difference_error({weights.data, size}, rig.grad_values().subspan(offset, size), loss) <= 1e-6);
    });
    const std::vector<double> dx(rig.dx);
    CHECK(difference_error(batch.x, dx, loss) <= 1e-6);
    const std::vector<double> dprior(rig.dprior);
    CHECK(difference_error(batch.prior, dprior, loss) <= 1e-6);
    CHECK(refused == 0);
    CHECK(other_choices == 0);

    // Gradients that replace what was there are those that were added to nothing, whatever was there.
    const std::vector<double> added(rig.grad_values().begin(), rig.grad_values().end());
    rig.layer.each_param(rig.grads, [](const std::string&, auto tensor) {
        std::fill_n(tensor.data, tensor.size(), std::numeric_limits<double>::quiet_NaN());
    });
    rig.write_grads = Write::assign;
    rig.restore(past);
    REQUIRE(rig.forward(batch).message() == "ok");
    REQUIRE(rig.backward(batch).message() == "ok");
    CHECK(std::equal(added.begin(), added.end(), rig.grad_values().begin()));
}

}  // namespace steelyard::testing
