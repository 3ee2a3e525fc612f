// Packed weights through a layer: the bits of the matrices, with the matrices absent, and what is refused.
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "support/rig.hpp"

namespace {

using namespace steelyard;
using namespace steelyard::testing;

constexpr LayerShape shape{.tokens = 40, .width = 21, .experts = 5};

template <class Expert>
Bytes packed(const Cpu& device, const Expert& expert, const LayerShape& of,
             const typename Expert::template Params<const float>& params, PackedFor purpose) {
    Bytes bytes(expert.template packed_bytes<float>(device, of, PackedFormat::full, purpose));
    REQUIRE(expert.template pack<float>(device, of, params, bytes.span(), PackedFormat::full, purpose).ok());
    return bytes;
}

view<const std::byte, 1> view_of(const Bytes& bytes) { return {bytes.data(), bytes.size()}; }

template <class Params>
void without_matrices(Params& params) {
    params.up.data = params.down.data = nullptr;
    if (params.gate.present()) params.gate.data = nullptr;
}

/// Forward and backward with `prepare(args.params, purpose)` before each, against those of the matrices.
template <class Layer, class Prepare>
void check_same_bits(const typename Layer::Config& config, Prepare&& prepare) {
    Rig<Layer> plain(config), other(config);
    const Batch<float> batch(shape.tokens, shape.width, 3);
    REQUIRE(plain.forward(batch).ok());
    REQUIRE(plain.backward(batch).ok());
    auto forward = other.forward_args(batch);
    prepare(forward.params);
    REQUIRE(other.layer.forward({}, forward).message() == "ok");
    CHECK(same_bits(other.y, plain.y));
    // The workspace is dead between the calls.
    std::fill_n(other.workspace.data(), other.workspace.size(), std::byte{0xFF});
    auto backward = other.backward_args(batch);
    prepare(backward.params);
    REQUIRE(other.layer.backward(backward).message() == "ok");
    CHECK(same_bits(other.dx, plain.dx));
    CHECK(same_bits(std::span<const float>(other.grad_values()), std::span<const float>(plain.grad_values())));
}

template <class Expert, class Retention = KeepActivations>
void check_expert(const Expert& expert) {
    using Layer = MoE<float, TopK, Expert, SynchronizedLoss, SelfComm, Dropless, Retention>;
    const typename Layer::Config config{.shape = shape, .router = {.k = 2}, .expert = expert, .device = {.threads = 2}};
    const Rig<Layer> same(config);
    const auto params = same.layer.read_only_params(same.params).experts;
    const Bytes training = packed(config.device, expert, shape, params, PackedFor::training);
    const Bytes inference = packed(config.device, expert, shape, params, PackedFor::inference);
    CHECK(inference.size() < training.size());
    check_same_bits<Layer>(config, [&](auto& p) { p.experts.packed = view_of(inference); });
    check_same_bits<Layer>(config, [&](auto& p) { p.experts.packed = view_of(training); });
    check_same_bits<Layer>(config, [&](auto& p) {
        p.experts.packed = view_of(training);
        without_matrices(p.experts);
    });
}

}  // namespace

TEST_CASE("a layer with packed experts has the bits of one without, also where the matrices are absent") {
    check_expert(SwiGlu{.hidden = 19});
    check_expert<SwiGlu, RecomputeActivations>(SwiGlu{.hidden = 19});
    check_expert(Mlp{.hidden = 34, .activation = Activation::gelu, .bias = true});
    check_expert(ClampedSwiGlu{.hidden = 3});
}

TEST_CASE("a shared expert is packed apart from the routed ones") {
    using Expert = WithShared<SwiGlu, Mlp>;
    using Layer = MoE<float, TopK, Expert, SynchronizedLoss>;
    const Layer::Config config{.shape = shape,
                               .router = {.k = 2},
                               .expert = {SwiGlu{19}, Mlp{34, Activation::silu, true}},
                               .device = {.threads = 2}};
    const Rig<Layer> same(config);
    const auto params = same.layer.read_only_params(same.params);
    LayerShape one = shape;
    one.experts = 1;
    const Bytes routed = packed(config.device, config.expert.routed, shape, params.experts, PackedFor::training);
    const Bytes shared = packed(config.device, config.expert.shared, one, params.shared, PackedFor::training);
    check_same_bits<Layer>(config, [&](auto& p) { p.experts.packed = view_of(routed); });
    check_same_bits<Layer>(config, [&](auto& p) { p.shared.packed = view_of(shared); });
    check_same_bits<Layer>(config, [&](auto& p) {
        p.experts.packed = view_of(routed), p.shared.packed = view_of(shared);
        without_matrices(p.experts), without_matrices(p.shared);
    });

    Rig<Layer> rig(config);
    const Batch<float> batch(shape.tokens, shape.width, 3);
    auto args = rig.forward_args(batch);
    args.params.experts.packed = view_of(routed), args.params.shared.packed = view_of(routed);
    const std::string message = rig.layer.forward({}, args).message();
    CHECK(message.starts_with(
        "steelyard: layer.forward: params.shared.packed: expected 1 experts of width 21, hidden 34, "
        "not gated, elements of 4 bytes, "));
    CHECK(message.find(", came 5 experts of width 21, hidden 19, gated, elements of 4 bytes, ") != std::string::npos);
}

namespace {

using Layer = MoE<float, TopK, SwiGlu, SynchronizedLoss>;

/// A layer with a packed copy, and calls that break one thing each.
struct Packed {
    SwiGlu expert{.hidden = 19};
    Rig<Layer> rig;
    Batch<float> batch{shape.tokens, shape.width, 3};
    Bytes bytes;

    explicit Packed(PackedFor purpose = PackedFor::inference)
        : rig({.shape = shape, .router = {.k = 2}, .expert = expert}) {
        bytes = packed({}, expert, shape, rig.layer.read_only_params(rig.params).experts, purpose);
    }

    template <class Break>
    std::string forward(Break&& breaks) {
        auto args = rig.forward_args(batch);
        args.params.experts.packed = view_of(bytes);
        breaks(args.params.experts);
        std::fill(rig.y.begin(), rig.y.end(), 77.0f);
        const auto state = rig.state_bytes();
        const std::string message = rig.layer.forward({}, args).message();
        if (message != "ok") {
            CHECK(std::all_of(rig.y.begin(), rig.y.end(), [](float value) { return value == 77.0f; }));
            CHECK(rig.state_bytes() == state);
        }
        return message;
    }
    std::string forward_with(const Bytes& other) {
        return forward([&](auto& experts) { experts.packed = view_of(other); });
    }
    Bytes of(const SwiGlu& other, const LayerShape& other_shape) const {
        const Bytes memory(static_cast<index_t>(sizeof(float)) * 3 * other_shape.experts * other.hidden *
                           other_shape.width);
        auto* const data = reinterpret_cast<const float*>(memory.data());
        const index_t e = other_shape.experts, h = other.hidden, d = other_shape.width;
        return packed({}, other, other_shape,
                      {{data, e, h, d}, {data + e * h * d, e, h, d}, {data + 2 * e * h * d, e, d, h}},
                      PackedFor::inference);
    }
};

/// The sizes that a packed copy of the layer's has, and those that came instead.
std::string sizes(index_t experts, index_t width, index_t hidden) {
    return std::to_string(experts) + " experts of width " + std::to_string(width) + ", hidden " +
           std::to_string(hidden);
}
void check_names(const std::string& message, const std::string& wanted, const std::string& came) {
    CAPTURE(message);
    const std::string begin = "steelyard: layer.forward: params.experts.packed: expected " + wanted;
    CHECK(message.starts_with(begin));
    CHECK(message.find(", came " + came) != std::string::npos);
}

}  // namespace

TEST_CASE("forward refuses packed experts of other sizes and other bytes, and leaves y as it was") {
    Packed p;
    REQUIRE(p.forward([](auto&) {}) == "ok");
    LayerShape other = shape;
    other.experts = 4;
    check_names(p.forward_with(p.of(p.expert, other)), sizes(5, 21, 19), sizes(4, 21, 19));
    other = shape, other.width = 22;
    check_names(p.forward_with(p.of(p.expert, other)), sizes(5, 21, 19), sizes(5, 22, 19));
    check_names(p.forward_with(p.of(SwiGlu{.hidden = 20}, shape)), sizes(5, 21, 19), sizes(5, 21, 20));

    const std::string block = "a block that pack() wrote";
    check_names(p.forward_with(Bytes(p.bytes.size())), block, "other bytes");
    check_names(p.forward([](auto& experts) { experts.packed.extents[0] = 16; }), block + ", aligned to 64 bytes",
                "16 bytes");
    check_names(p.forward([](auto& experts) { experts.packed.extents[0] -= 1; }),
                "at least " + std::to_string(p.bytes.size()) + " bytes", std::to_string(p.bytes.size() - 1));
    const Bytes moved(p.bytes.size() + 64);
    std::memcpy(moved.data() + 4, p.bytes.data(), static_cast<std::size_t>(p.bytes.size()));
    check_names(p.forward([&](auto& experts) { experts.packed.data = moved.data() + 4; }),
                block + ", aligned to 64 bytes", "a misaligned pointer");
}

TEST_CASE("forward refuses packed experts of another gating, element, format or register width") {
    Packed p;
    // What other layers and machines would have written.
    const auto with = [&](auto&& change) {
        Bytes changed(p.bytes.size());
        std::memcpy(changed.data(), p.bytes.data(), static_cast<std::size_t>(p.bytes.size()));
        change(*reinterpret_cast<cpu::PackedHeader*>(changed.data()));
        return p.forward_with(changed);
    };
    const auto& header = *reinterpret_cast<const cpu::PackedHeader*>(p.bytes.data());
    const std::string panels = ", panels of " + std::to_string(header.panel) + " columns",
                      others = ", panels of " + std::to_string(2 * header.panel) + " columns";
    const std::string wanted = sizes(5, 21, 19) + ", gated, elements of 4 bytes";
    check_names(with([](auto& h) { h.gated = 0; }), wanted + panels, sizes(5, 21, 19) + ", not gated");
    check_names(with([](auto& h) { h.element = 8; }), wanted + panels,
                sizes(5, 21, 19) + ", gated, elements of 8 bytes");
    check_names(with([](auto& h) { h.panel *= 2; }), wanted + panels, wanted + others);
    check_names(with([](auto& h) { h.format = 9; }), "a format of PackedFormat", "9");
    check_names(with([](auto& h) { h.format = -1; }), "a format of PackedFormat", "-1");
}

TEST_CASE("matrices may be absent where the packed copy does without them, and biases never") {
    Packed p;
    CHECK(p.forward([](auto& experts) { without_matrices(experts); }) == "ok");
    CHECK(p.forward([](auto& experts) { experts.packed = {}, experts.down.data = nullptr; }) ==
          "steelyard: layer.forward: params.experts.down: expected a tensor of [5, 21, 19], came a null pointer");
    CHECK(p.forward([](auto& experts) { experts.up.extents[0] = 4; }) ==
          "steelyard: layer.forward: params.experts.up: expected [5, 19, 21], came [4, 19, 21]");

    // A copy for inference does not serve backward.
    REQUIRE(p.forward([](auto&) {}) == "ok");
    auto args = p.rig.backward_args(p.batch);
    args.params.experts.packed = view_of(p.bytes);
    without_matrices(args.params.experts);
    const auto before = p.rig.dx;
    CHECK(p.rig.layer.backward(args).message() ==
          "steelyard: layer.backward: params.experts.gate: expected a tensor of [5, 19, 21], came a null pointer");
    CHECK(same_bits(p.rig.dx, before));

    using Biased = MoE<float, TopK, Mlp, SynchronizedLoss>;
    const Mlp expert{.hidden = 6, .activation = Activation::relu, .bias = true};
    Rig<Biased> rig({.shape = shape, .router = {.k = 2}, .expert = expert});
    const Bytes bytes = packed({}, expert, shape, rig.layer.read_only_params(rig.params).experts, PackedFor::inference);
    auto forward = rig.forward_args(p.batch);
    forward.params.experts.packed = view_of(bytes);
    without_matrices(forward.params.experts);
    CHECK(rig.layer.forward({}, forward).message() == "ok");
    forward.params.experts.up_bias.data = nullptr;
    CHECK(rig.layer.forward({}, forward).message() ==
          "steelyard: layer.forward: params.experts.up_bias: expected a tensor of [5, 6], came a null pointer");
}

TEST_CASE(
    "pack refuses memory that is too small or misaligned, absent matrices, and formats for inference in training") {
    Packed p;
    const auto params = p.rig.layer.read_only_params(p.rig.params).experts;
    const Bytes block(p.bytes.size() + 64);
    const auto size = static_cast<std::size_t>(p.bytes.size());
    const auto pack = [&](std::size_t offset, std::size_t bytes, const auto& from, PackedFormat format,
                          PackedFor purpose) {
        return p.expert.pack<float>(Cpu{}, shape, from, block.span().subspan(offset, bytes), format, purpose).message();
    };
    const PackedFormat full = PackedFormat::full;
    const PackedFor inference = PackedFor::inference;
    CHECK(pack(0, size, params, full, inference) == "ok");
    CHECK(pack(0, size - 1, params, full, inference) == "steelyard: expert.pack: packed: expected at least " +
                                                            std::to_string(size) + " bytes, came " +
                                                            std::to_string(size - 1));
    CHECK(pack(4, size, params, full, inference).starts_with("steelyard: expert.pack: packed: expected "));
    auto absent = params;
    absent.down.data = nullptr;
    CHECK(pack(0, size, absent, full, inference) ==
          "steelyard: expert.pack: params.down: expected a tensor of [5, 21, 19], came a null pointer");
    CHECK(pack(0, size, params, PackedFormat::bf16, PackedFor::training)
              .starts_with("steelyard: expert.pack: format: expected "));
}
