// Steelyard: with weights packed beforehand, in training for backward too, and with weights as they are.
#include "layer_contender.hpp"

namespace steelyard_bench {
namespace {

class Ours final : public LayerContender<SwiGlu> {
public:
    Ours(const Model& model, const Case& of, bool pack) : LayerContender(model, SwiGlu{.hidden = of.shape.hidden}) {
        if (!pack) return;
        const LayerShape shape{.tokens = 1, .width = of.shape.width, .experts = of.shape.experts};
        const Cpu device{.threads = 2};
        const PackedFor purpose = of.pass == Pass::train ? PackedFor::training : PackedFor::inference;
        const auto bytes = expert_.packed_bytes<float>(device, shape, format(of.type), purpose);
        memory_ = HugeMemory(static_cast<std::size_t>(bytes));
        const auto& weights = model.weights();
        throw_if_refused(expert_.pack<float>(device, shape, {weights.gate, weights.up, weights.down}, memory_.span(),
                                             format(of.type), purpose));
        packed_ = {memory_.as<const std::byte>(), bytes};
    }

private:
    static PackedFormat format(Type type) {
        constexpr PackedFormat formats[] = {PackedFormat::full, PackedFormat::bf16, PackedFormat::int8};
        return formats[static_cast<int>(type)];
    }
    HugeMemory memory_;
};

std::unique_ptr<Contender> packed(const Model& model, const Case& of) {
    return std::make_unique<Ours>(model, of, true);
}
std::unique_ptr<Contender> plain(const Model& model, const Case& of) {
    return std::make_unique<Ours>(model, of, false);
}

const Registration registered[] = {
    Registration({.name = "Steelyard",
                  .version = "weights packed beforehand, in training for backward too",
                  .place = 0,
                  .supports = [](const Case& of) { return of.pass == Pass::forward || of.type == Type::f32; },
                  .make = packed}),
    Registration({.name = "not packed",
                  .version = "Steelyard with weights as they are",
                  .place = 1,
                  .supports = [](const Case& of) { return of.type == Type::f32; },
                  .make = plain})};

}  // namespace

double weight_bytes(Type type) {
    constexpr double bytes[] = {4.0, 2.0, 1.0 + 4.0 / cpu::int8_group};
    return bytes[static_cast<int>(type)];
}

std::unique_ptr<Contender> make_reference(const Model& model) {
    return std::make_unique<LayerContender<SwiGlu>>(model, SwiGlu{.hidden = model.shape().hidden});
}

}  // namespace steelyard_bench
