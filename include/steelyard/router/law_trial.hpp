// A router with parameters and tokens of its own, and what its calls write: what the laws of routers are tried on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "steelyard/core/bytes.hpp"
#include "steelyard/core/random.hpp"
#include "steelyard/router/concept.hpp"

namespace steelyard::detail::router_laws {

/// What one call of `route` wrote.
struct Outcome {
    std::vector<double> logits, probs, weight, smooth_load;
    std::vector<expert_t> expert;

    Outcome(index_t tokens, index_t experts, index_t top_k, bool with_smooth_load)
        : logits(size(tokens, experts), std::nan("")),
          probs(size(tokens, experts), std::nan("")),
          weight(size(tokens, top_k), std::nan("")),
          smooth_load(with_smooth_load ? size(tokens, experts) : 0, std::nan("")),
          expert(size(tokens, top_k), -77) {}

    Routing<double> routing(index_t tokens, index_t experts, index_t top_k) {
        return {{logits.data(), tokens, experts},
                {probs.data(), tokens, experts},
                {expert.data(), tokens, top_k},
                {weight.data(), tokens, top_k},
                {smooth_load.data(), smooth_load.empty() ? 0 : tokens, experts}};
    }
    bool same_bits(const Outcome& other) const {
        return expert == other.expert && equal(probs, other.probs) && equal(weight, other.weight) &&
               equal(smooth_load, other.smooth_load);
    }
    static bool equal(const std::vector<double>& a, const std::vector<double>& b) {
        return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
    }
    static std::size_t size(index_t rows, index_t columns) { return static_cast<std::size_t>(rows * columns); }
};

/// A router with parameters, tokens and a mask of its own.
template <class R, class Device>
struct Trial {
    using Params = typename R::template Params<double, HostSpace>;
    using Traits = RouterTraits<R>;
    using ReadOnly = typename R::template Params<const double, HostSpace>;

    const R& router;
    const Device& device;
    LayerShape shape;
    index_t T, E, K, d;
    Bytes param_block, scratch;
    Params params;
    std::vector<double> x, prior;
    std::vector<std::uint8_t> mask;
    std::vector<index_t> sequences;
    std::vector<std::int32_t> ids;
    TokenInfo<> info;

    Trial(const R& r, const LayerShape& s, const Device& dev)
        : router(r),
          device(dev),
          shape(s),
          T(s.tokens),
          E(s.experts),
          K(r.top_k(s)),
          d(s.width),
          param_block(bytes_of<Params>(r, s)),
          scratch(r.template scratch_bytes<double>(dev, s)),
          params(place<Params>(param_block.data(), r, s)),
          x(Outcome::size(s.tokens, s.width)),
          prior(Traits::uses_prior ? Outcome::size(s.tokens, s.experts) : 0),
          mask(static_cast<std::size_t>(s.tokens), 1),
          ids(static_cast<std::size_t>(s.tokens)) {
        const Philox stream(2024, Stream::user);
        std::uint64_t at = 0;
        const auto draw = [&] { return 2.0 * stream.uniform(at++) - 1.0; };
        const auto fill = [&](const std::string&, auto& tensor) {
            for (index_t i = 0; i < tensor.size(); ++i) tensor.data[i] = draw();
        };
        for_each_tensor(params, fill, r, s);
        for (auto* of : {&x, &prior})
            for (double& value : *of) value = draw();
        for (index_t t = 0; t < T; ++t) ids[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(t % 2);
        for (index_t s_ = 0; s_ <= shape.sequences; ++s_) sequences.push_back(T * s_ / shape.sequences);
        std::fill_n(x.begin(), d, 0.0);  // token 0: a linear router ties all experts
        for (index_t t = 3; t < T; t += 5) mask[static_cast<std::size_t>(t)] = 0;
        info.mask = {mask.data(), T};
        info.ids = {ids.data(), T};
        info.sequences = {sequences.data(), shape.sequences + 1};
        info.step.step = 3;
        info.step.token_offset = 1000;
    }

    [[nodiscard]] bool valid(index_t t) const { return mask[static_cast<std::size_t>(t)] != 0; }
    [[nodiscard]] Outcome outcome() const { return {T, E, K, Traits::has_smooth_load}; }

    /// Tokens of one call, of which the first is token `first` of the trial.
    [[nodiscard]] RouterInput<double> input(const std::vector<double>& rows, const TokenInfo<>& of,
                                            const std::vector<float>& bias = {}, index_t first = 0) const {
        const index_t tokens = static_cast<index_t>(rows.size()) / d;
        RouterInput<double> in{.x = {rows.data(), tokens, d}, .tokens = of, .layer = 7};
        if (!bias.empty()) in.selection_bias = {bias.data(), E};
        if (Traits::uses_prior) in.prior = view<const double, 2>(prior.data(), T, E).slice(first, first + tokens);
        return in;
    }
    Status route(const RouterInput<double>& in, Outcome& out) {
        return router.template route<double>(device, read_only<ReadOnly>(params, router, shape), in,
                                             out.routing(in.x.extents[0], E, K), scratch.data());
    }
    Status route(const std::vector<double>& rows, const TokenInfo<>& of, const std::vector<float>& bias, Outcome& out) {
        return route(input(rows, of, bias), out);
    }
};

}  // namespace steelyard::detail::router_laws
