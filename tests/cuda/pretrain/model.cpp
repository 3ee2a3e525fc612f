// pretrain's whole model on the GPU against the CPU's: losses, gradients, and training.
#include <doctest/doctest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "close.hpp"
#include "pretrain/cuda/strategies.hpp"
#include "pretrain/initial.hpp"
#include "pretrain/replica.hpp"
#include "pretrain/same_runs.hpp"
#include "pretrain/strategies.hpp"
#include "pretrain/training.hpp"
#include "steelyard/comm/threads.hpp"

namespace {

using namespace pretrain;
using steelyard::Mode;
using steelyard::StepInfo;
using steelyard::ThreadComm;

Settings tiny() {
    Settings s;
    s.ranks = 1;
    s.accumulate = 1;
    s.micro_batch = 3;
    s.sequence = 37;
    s.layers = 2;
    s.dim = 48;
    s.heads = 2;
    s.experts = 6;
    s.hidden = 40;
    s.balance_coefficient = 0.5;  // large, so that an error in its gradient shows
    s.z_loss = 0.1;
    return s;
}
std::string text_of(const Settings& s, Strategy strategy) {
    return name_of(strategy) + ", " + name_of(s.precision) + ", " + name_of(s.router) + ": ";
}

auto make_blocks(const Threads&, const Settings& s, Strategy strategy, const ThreadComm& comm) {
    return make_moe_blocks<float>(s, strategy, comm);
}
auto make_blocks(const Gpu& gpu, const Settings& s, Strategy strategy, const ThreadComm& comm) {
    return make_cuda_blocks(gpu, s, strategy, comm);
}

template <class Device>
Transformer<float, Device> make_model(const Settings& s, Strategy strategy, const ThreadComm& comm, Device device) {
    auto blocks = make_blocks(device, s, strategy, comm);
    return Transformer<float, Device>(model_shape(s), std::move(blocks), std::move(device));
}

/// A model with weights on one batch of random bytes, after forward and backward.
template <class Device>
struct Trial {
    Trial(const Settings& s, Strategy strategy, Device device)
        : model(make_model(s, strategy, alone.comm(0), std::move(device))),
          weights(model.param_bytes()),
          gradient(model.param_bytes()),
          bytes(model.shape().tokens() + 1) {
        Bytes first(model.param_bytes());
        initialise(model.tensors(first.data()), s.layers, 3);
        weights.load(first.span());
        const steelyard::Philox philox(5, steelyard::Stream::user);
        for (index_t t = 0; t < bytes.size(); ++t)
            bytes.data()[t] = static_cast<std::byte>(philox.below(static_cast<std::uint64_t>(t), 256));
        const index_t count = model.shape().tokens();
        const auto* begin = reinterpret_cast<const std::uint8_t*>(bytes.data());
        const std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
        const auto params = model.place_params(weights.data());
        model.take_params(params);
        REQUIRE(model.forward(params, {begin, count}, {begin + 1, count}, {ids.data(), count}, StepInfo{}, Mode::train)
                    .message() == "ok");
        REQUIRE(
            model.backward(params, 1.0f / static_cast<float>(count), StepInfo{}, model.place_params(gradient.data()))
                .message() == "ok");
        REQUIRE(model.await().message() == "ok");
        REQUIRE(pretrain::finish(model.device()).message() == "ok");
        const auto contents = gradient.contents();
        grads.resize(contents.size() / sizeof(float));
        std::memcpy(grads.data(), contents.data(), contents.size());
    }
    /// The part of the gradient that is one tensor's.
    [[nodiscard]] std::span<const float> grad(const Tensor<float>& tensor) const {
        const auto* base = reinterpret_cast<const float*>(gradient.data());
        return std::span(grads).subspan(static_cast<std::size_t>(tensor.data - base),
                                        static_cast<std::size_t>(tensor.size()));
    }
    [[nodiscard]] std::span<const float> losses() const {
        return {model.losses().data, static_cast<std::size_t>(model.losses().extents[0])};
    }

    steelyard::ThreadGroup alone{1};
    Transformer<float, Device> model;
    typename Device::Memory weights, gradient;
    typename Device::HostMemory bytes;
    std::vector<float> grads;
};

/// `loose`: of a single tensor's gradient.
void compare(Settings s, Strategy strategy, double tolerance, double loose) {
    const std::string text = text_of(s, strategy);
    Settings on_cpu = s;
    on_cpu.precision = Precision::usual;
    s.device = DeviceKind::cuda;
    Trial<Threads> near(on_cpu, strategy, Threads(1));
    Trial<Gpu> there(s, strategy, test::gpu());

    const auto near_tensors = near.model.tensors(near.gradient.data());
    const auto there_tensors = there.model.tensors(there.gradient.data());
    REQUIRE(near.model.param_bytes() == there.model.param_bytes());
    REQUIRE(near_tensors.size() == there_tensors.size());
    test::check_close(text + "the losses", there.losses(), near.losses(), tolerance);
    for (index_t l = 0; l < s.layers; ++l) {
        auto& a = there.model.block(l);
        auto& b = near.model.block(l);
        const std::string layer = text + "layer " + std::to_string(l) + "'s ";
        test::check_close(layer + "balance loss", std::abs(a.balance_loss() - b.balance_loss()),
                          tolerance * std::max(1.0, b.balance_loss()));
        test::check_close(layer + "balance losses together", std::abs(a.total_balance_loss() - b.total_balance_loss()),
                          tolerance * std::max(1.0, b.total_balance_loss()));
        CHECK(a.choices().extents[0] == b.choices().extents[0]);
        CHECK(a.choices().extents[1] == b.choices().extents[1]);
        CHECK(a.state().size() == b.state().size());
    }
    test::check_close(text + "the whole gradient", std::span<const float>(there.grads),
                      std::span<const float>(near.grads), tolerance);
    for (std::size_t i = 0; i < near_tensors.size(); ++i) {
        CHECK(near_tensors[i].name == there_tensors[i].name);
        test::check_close(text + "the gradient of " + near_tensors[i].name, there.grad(there_tensors[i]),
                          near.grad(near_tensors[i]), loose);
    }
}

TEST_CASE("pretrain on the GPU: losses and gradients are the CPU's under every strategy, in float") {
    for (const Strategy strategy : all_strategies) {
        if (strategy == Strategy::shuffle) continue;  // refused
        Settings s = tiny();
        s.precision = Precision::single;
        compare(s, strategy, 1e-4, 1e-4);
    }
    Settings s = tiny();
    s.precision = Precision::single;
    s.router = RouterKind::dense;
    compare(s, Strategy::micro, 1e-4, 1e-4);
}

TEST_CASE("pretrain on the GPU: losses and gradients are the CPU's, in bf16") {
    Settings s = tiny();
    s.precision = Precision::bf16;
    s.router = RouterKind::dense;  // with a choice to make, rounding sends some tokens to other experts
    for (const Strategy strategy : {Strategy::micro, Strategy::none}) compare(s, strategy, 2e-2, 5e-2);
}

TEST_CASE("pretrain on the GPU: two gradients have the same bits") {
    for (const Precision precision : {Precision::single, Precision::bf16}) {
        Settings s = tiny();
        s.device = DeviceKind::cuda;
        s.precision = precision;
        const Trial<Gpu> first(s, Strategy::sync, test::gpu()), second(s, Strategy::sync, Gpu());
        CHECK(first.grads == second.grads);
        CHECK(std::ranges::equal(first.losses(), second.losses()));
    }
}

struct Folder {
    std::filesystem::path path = std::filesystem::temp_directory_path() / "steelyard-test-cuda-pretrain";
    Folder() { std::filesystem::remove_all(path); }
    ~Folder() { std::filesystem::remove_all(path); }
};

/// A run of some steps on two ranks.
Settings short_run(const Folder& folder, const std::string& name, DeviceKind device,
                   Precision precision = Precision::usual) {
    Settings s = tiny();
    s.ranks = 2;
    s.accumulate = 2;
    s.micro_batch = 2;
    s.balance_coefficient = 0.01;
    s.z_loss = 0.001;
    s.steps = 6;
    s.bias_rate = 0.1;
    s.eval_sequences = 3;
    s.quiet = true;
    s.device = device;
    s.precision = precision;
    s.out = (folder.path / name).string();
    return s;
}

void check_series(const std::string& text, const RunRecord& got, const RunRecord& want, double tolerance) {
    REQUIRE(got.series.size() == want.series.size());
    for (std::size_t i = 0; i < want.series.loss.size(); ++i) {
        const std::string step = text + "step " + std::to_string(i) + "'s ";
        test::check_close(step + "loss", std::abs(got.series.loss[i] / want.series.loss[i] - 1), tolerance);
        test::check_close(step + "gradient norm",
                          std::abs(got.series.gradient_norm[i] / want.series.gradient_norm[i] - 1), 10 * tolerance);
    }
    REQUIRE(got.evaluations.size() == want.evaluations.size());
    for (std::size_t d = 0; d < want.evaluations.back().domains.size(); ++d)
        test::check_close(
            text + "held-out loss",
            std::abs(got.evaluations.back().domains[d].loss / want.evaluations.back().domains[d].loss - 1), tolerance);
}

TEST_CASE("pretrain on the GPU: training of two ranks follows the CPU's, and runs have the same bits") {
    const Folder folder;
    for (const Strategy strategy : {Strategy::micro, Strategy::sync, Strategy::hybrid, Strategy::windowed,
                                    Strategy::loss_free, Strategy::schedule}) {
        const Settings on_cpu = short_run(folder, "cpu", DeviceKind::cpu);
        const Corpus corpus(on_cpu);
        const RunRecord want = train(on_cpu, strategy, corpus);
        for (const Precision precision : {Precision::single, Precision::bf16}) {
            const Settings once = short_run(folder, "once", DeviceKind::cuda, precision);
            const Settings again = short_run(folder, "again", DeviceKind::cuda, precision);
            const std::string text = text_of(once, strategy);
            check_series(text, train(once, strategy, corpus), want, precision == Precision::bf16 ? 2e-2 : 1e-3);
            (void)train(again, strategy, corpus);
            INFO(text);
            test::check_same(once, again, strategy);
        }
    }
}

TEST_CASE("pretrain on the GPU: an interrupted run goes on bit for bit there, and on the other device") {
    const Folder folder;
    for (const Strategy strategy : {Strategy::buffer, Strategy::loss_free}) {
        const Settings whole = short_run(folder, "whole", DeviceKind::cuda, Precision::single);
        const Corpus corpus(whole);
        const RunRecord record = train(whole, strategy, corpus);
        for (const DeviceKind then : {DeviceKind::cuda, DeviceKind::cpu}) {
            std::filesystem::remove_all(folder.path / "parts");
            Settings parts = short_run(folder, "parts", DeviceKind::cuda, Precision::single);
            ask_to_stop();
            CHECK(train(parts, strategy, corpus).series.size() == 1);
            forget_stop();
            parts.resume = true;
            parts.device = then;
            if (then == DeviceKind::cpu) parts.precision = Precision::usual;
            const RunRecord rest = train(parts, strategy, corpus);
            check_series(text_of(whole, strategy) + "then on " + name_of(then) + ": ", rest, record, 1e-3);
            if (then == DeviceKind::cuda) test::check_same(whole, parts, strategy);
        }
        std::filesystem::remove_all(folder.path / "parts");
        Settings parts = short_run(folder, "parts", DeviceKind::cpu);
        ask_to_stop();
        (void)train(parts, strategy, corpus);
        forget_stop();
        parts.resume = true;
        parts.device = DeviceKind::cuda;
        parts.precision = Precision::single;
        check_series(text_of(whole, strategy) + "begun on the CPU: ", train(parts, strategy, corpus), record, 1e-3);
    }
}

}  // namespace
