// Every operation of pretrain's model on the GPU against the CPU's, on sizes that fill no warp, block or tile.
#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "close.hpp"
#include "cuda/device_memory.hpp"
#include "pretrain/attention.hpp"
#include "pretrain/cross_entropy.hpp"
#include "pretrain/embedding.hpp"
#include "pretrain/host.hpp"
#include "pretrain/rms_norm.hpp"
#include "pretrain/rotary.hpp"

namespace {

using namespace pretrain;
using gpu::Host;
using gpu::Tensor;
using test::finish;
using Space = steelyard::CudaSpace;

const Threads one(1);

struct Sizes {
    index_t sequences, length, heads, head;
    [[nodiscard]] index_t width() const { return heads * head; }
    [[nodiscard]] index_t tokens() const { return sequences * length; }
    [[nodiscard]] std::string text() const {
        return std::to_string(sequences) + " sequences of " + std::to_string(length) + ", " + std::to_string(heads) +
               " heads of " + std::to_string(head) + ": ";
    }
};
/// The default sizes of pretrain come last.
const std::vector<Sizes> all_sizes = {{1, 1, 1, 2},   {2, 35, 2, 6},   {1, 8, 1, 34},  {3, 33, 1, 66},
                                      {2, 70, 3, 24}, {1, 300, 2, 32}, {2, 128, 4, 24}};

Host<float> numbers(index_t rows, index_t columns, unsigned seed) { return gpu::random<float>(rows, columns, seed); }
Host<std::uint8_t> bytes(index_t count, unsigned below, unsigned seed) {
    Host<std::uint8_t> all(1, count);
    std::mt19937 generator(seed);
    for (index_t i = 0; i < count; ++i) all(0, i) = static_cast<std::uint8_t>(generator() % below);
    return all;
}
view<const std::uint8_t, 1> line(const Host<std::uint8_t>& of) { return {of.data.data(), of.columns}; }

void check(const std::string& what, const Host<float>& got, const Host<float>& want, double tolerance = 1e-5) {
    const auto span = [](const Host<float>& of) {
        return std::span<const float>(of.data.data(), static_cast<std::size_t>(of.rows * of.columns));
    };
    test::check_close(what, span(got), span(want), tolerance);
}

template <int Rank, class... Extents>
view<float, Rank, Space> shaped(const Tensor<float>& of, Extents... extents) {
    return {of.get().data, extents...};
}

TEST_CASE("pretrain on the GPU: linear maps") {
    for (const Sizes& n : all_sizes) {
        const index_t t = n.tokens(), in = n.width(), out = 3 * n.head + 1;
        const Host<float> x = numbers(t, in, 1), w = numbers(out, in, 2), dy = numbers(t, out, 3);
        Host<float> y(t, out), dx(t, in), dw = numbers(out, in, 4);
        const Tensor<float> far_x(x), far_w(w), far_dy(dy), far_y(t, out), far_dx(t, in), far_dw(dw);
        linear_forward<float>(one, x.get(), w.get(), y.get());
        linear_backward_input<float>(one, dy.get(), w.get(), dx.get());
        linear_backward_weight<float>(one, dy.get(), x.get(), dw.get());
        linear_forward<float>(test::gpu(), far_x.get(), far_w.get(), far_y.get());
        linear_backward_input<float>(test::gpu(), far_dy.get(), far_w.get(), far_dx.get());
        linear_backward_weight<float>(test::gpu(), far_dy.get(), far_x.get(), far_dw.get());
        finish();
        check(n.text() + "linear_forward", far_y.host(), y);
        check(n.text() + "linear_backward_input", far_dx.host(), dx);
        check(n.text() + "linear_backward_weight", far_dw.host(), dw);
    }
}

TEST_CASE("pretrain on the GPU: the norm") {
    for (const Sizes& n : all_sizes) {
        const index_t t = n.tokens(), d = n.width();
        const Host<float> x = numbers(t, d, 1), gain = numbers(1, d, 2), dy = numbers(t, d, 3);
        Host<float> y(t, d), inverse(1, t), dx = numbers(t, d, 4), dgain = numbers(1, d, 5);
        const Tensor<float> far_x(x), far_gain(gain), far_dy(dy), far_y(t, d), far_inverse(1, t), far_dx(dx),
            far_dgain(dgain);
        const view<const float, 1> gain_line(gain.data.data(), d);
        rms_norm_forward<float>(one, x.get(), gain_line, y.get(), inverse.line());
        rms_norm_backward<float>(one, x.get(), gain_line, inverse.line(), dy.get(), dx.get(), dgain.line());
        rms_norm_forward<float>(test::gpu(), far_x.get(), far_gain.line(), far_y.get(), far_inverse.line());
        rms_norm_backward<float>(test::gpu(), far_x.get(), far_gain.line(), far_inverse.line(), far_dy.get(),
                                 far_dx.get(), far_dgain.line());
        finish();
        check(n.text() + "rms_norm_forward", far_y.host(), y);
        check(n.text() + "rms_norm_forward's inverse", far_inverse.host(), inverse);
        check(n.text() + "rms_norm_backward", far_dx.host(), dx);
        check(n.text() + "rms_norm_backward's dgain", far_dgain.host(), dgain);
    }
}

TEST_CASE("pretrain on the GPU: rotary positions and attention") {
    for (const Sizes& n : all_sizes) {
        const index_t t = n.tokens(), d = n.width(), s = n.sequences, h = n.heads, l = n.length;
        Host<float> qkv = numbers(t, 3 * d, 1), table(l, n.head), p(s * h * l, l), y(t, d), dqkv(t, 3 * d),
                    ds(s * h * query_tile, l);
        const Host<float> dy = numbers(t, d, 2);
        const view<float, 3> turns(table.data.data(), l, 2, n.head / 2);
        rotary_table<float>(turns);
        const Tensor<float> far_qkv(qkv), far_p(s * h * l, l), far_y(t, d), far_dy(dy), far_ds(s * h * l, l),
            far_dqkv(t, 3 * d), far_table(l, n.head);
        upload<float, 3>(test::gpu(), turns, shaped<3>(far_table, l, 2, n.head / 2));
        const auto far_turns = shaped<3>(far_table, l, 2, n.head / 2);

        rotary<float>(one, qkv.get(), turns, 1.0f);
        rotary<float>(test::gpu(), far_qkv.get(), far_turns, 1.0f);
        finish();
        check(n.text() + "rotary", far_qkv.host(), qkv, 1e-6);

        const view<float, 4> probabilities(p.data.data(), s, h, l, l);
        const auto far_probabilities = shaped<4>(far_p, s, h, l, l);
        attention_forward<float>(one, qkv.get(), probabilities, y.get());
        attention_backward<float>(one, qkv.get(), probabilities, dy.get(),
                                  view<float, 3>(ds.data.data(), s * h, query_tile, l), dqkv.get());
        attention_forward<float>(test::gpu(), far_qkv.get(), far_probabilities, far_y.get());
        attention_backward<float>(test::gpu(), far_qkv.get(), far_probabilities, far_dy.get(),
                                  shaped<3>(far_ds, s * h, l, l), far_dqkv.get());
        finish();
        check(n.text() + "attention_forward", far_y.host(), y);
        check(n.text() + "attention_backward", far_dqkv.host(), dqkv);
        rotary<float>(one, dqkv.get(), turns, -1.0f);
        rotary<float>(test::gpu(), far_dqkv.get(), far_turns, -1.0f);
        finish();
        check(n.text() + "rotary, back", far_dqkv.host(), dqkv);
    }
}

TEST_CASE("pretrain on the GPU: the embedding, bit for bit") {
    for (const Sizes& n : all_sizes) {
        const index_t t = n.tokens(), d = n.width(), vocabulary = 37;
        const Host<std::uint8_t> tokens = bytes(t, 9, 1);  // some often, most never
        const Host<float> table = numbers(vocabulary, d, 2), dy = numbers(t, d, 3);
        Host<float> y(t, d), dtable = numbers(vocabulary, d, 4);
        const Tensor<float> far_table(table), far_dy(dy), far_y(t, d), far_dtable(dtable);
        const PinnedBytes pinned(t);
        const Tensor<std::uint8_t> room(1, t + 5);
        std::copy_n(tokens.data.data(), t, pinned.as<std::uint8_t>().data());
        const auto far_tokens = brought(test::gpu(), {pinned.as<std::uint8_t>().data(), t}, room.line());
        embedding_forward<float>(one, line(tokens), table.get(), y.get());
        embedding_backward<float>(one, line(tokens), dy.get(), dtable.get());
        embedding_forward<float>(test::gpu(), far_tokens, far_table.get(), far_y.get());
        embedding_backward<float>(test::gpu(), far_tokens, far_dy.get(), far_dtable.get());
        finish();
        check(n.text() + "embedding_forward", far_y.host(), y, 0.0);
        check(n.text() + "embedding_backward", far_dtable.host(), dtable, 0.0);
    }
}

TEST_CASE("pretrain on the GPU: cross entropy, into pinned memory") {
    for (const index_t vocabulary : {index_t{1}, index_t{37}, index_t{256}}) {
        for (const index_t t : {index_t{1}, index_t{9}, index_t{261}}) {
            const std::string text = std::to_string(t) + " tokens of " + std::to_string(vocabulary) + ": ";
            const Host<std::uint8_t> targets = bytes(t, static_cast<unsigned>(vocabulary), 1);
            Host<float> z = numbers(t, vocabulary, 2), losses(1, t), far_losses(1, t);
            for (float& number : z.data) number *= 30;  // some probabilities are 0
            const Tensor<float> far_z(z);
            const Tensor<std::uint8_t> far_targets(targets);
            const PinnedBytes pinned(t * index_t{sizeof(float)});
            cross_entropy_forward<float>(one, line(targets), z.get(), losses.line());
            cross_entropy_forward<float>(test::gpu(), far_targets.line(), far_z.get(),
                                         view<float, 1>(pinned.as<float>().data(), t));
            mark(test::gpu());
            REQUIRE(await_mark(test::gpu()).ok());
            std::copy_n(pinned.as<float>().data(), t, far_losses.data.data());
            check(text + "cross_entropy_forward", far_losses, losses);
            check(text + "cross_entropy_forward's probabilities", far_z.host(), z);
            cross_entropy_backward<float>(one, line(targets), 0.125f, z.get());
            cross_entropy_backward<float>(test::gpu(), far_targets.line(), 0.125f, far_z.get());
            finish();
            check(text + "cross_entropy_backward", far_z.host(), z);
        }
    }
}

TEST_CASE("pretrain on the GPU: sums, clearing, AdamW") {
    for (const index_t count : {index_t{1}, index_t{255}, index_t{4097}, index_t{100'003}}) {
        const std::string text = std::to_string(count) + " numbers: ";
        const Host<float> a = numbers(1, count, 1), b = numbers(1, count, 2);
        Host<float> sum(1, count);
        const Tensor<float> far_a(a), far_b(b), far_sum(1, count);
        add<float>(one, a.get(), b.get(), sum.get());
        add<float>(test::gpu(), far_a.get(), far_b.get(), far_sum.get());
        finish();
        check(text + "add", far_sum.host(), sum, 0.0);
        clear<float>(test::gpu(), far_sum.get());
        finish();
        check(text + "clear", far_sum.host(), Host<float>(1, count), 0.0);

        // More ranks than one launch adds up; from the fourth number on.
        const index_t skipped = 3;
        std::vector<Bytes> parts;
        std::vector<GpuBytes> far_parts;
        std::vector<const Bytes*> pointers;
        std::vector<const GpuBytes*> far_pointers;
        for (unsigned r = 0; r < 67; ++r) {
            const Host<float> part = numbers(1, count + skipped, 10 + r);
            const auto raw = std::as_bytes(std::span(part.data).first(static_cast<std::size_t>(count + skipped)));
            parts.emplace_back(static_cast<index_t>(raw.size())).load(raw);
            far_parts.emplace_back(static_cast<index_t>(raw.size())).load(raw);
        }
        for (const Bytes& part : parts) pointers.push_back(&part);
        for (const GpuBytes& part : far_parts) far_pointers.push_back(&part);
        for (const std::size_t ranks : {std::size_t{1}, std::size_t{3}, std::size_t{67}}) {
            sum_parts<float>(one, std::span(pointers).first(ranks), skipped, sum.line());
            sum_parts<float>(test::gpu(), std::span(far_pointers).first(ranks), skipped, far_sum.line());
            finish();
            check(text + "sum_parts of " + std::to_string(ranks), far_sum.host(), sum, 0.0);
        }
        const index_t block = 4096, blocks = tiles_of(count, block);
        std::vector<double> squares(static_cast<std::size_t>(blocks));
        const PinnedBytes far_squares(blocks * index_t{sizeof(double)});
        sum_squares<float>(one, view<const float, 1>(a.data.data(), count), block, squares.data());
        sum_squares<float>(test::gpu(), far_a.line(), block, far_squares.as<double>().data());
        finish();
        test::check_close(text + "sum_squares", std::span<const double>(far_squares.as<double>()),
                          std::span<const double>(squares), 1e-12);

        Host<float> p = numbers(1, count, 3), m = numbers(1, count, 4), v = numbers(1, count, 5);
        for (float& number : v.data) number *= number;
        const Tensor<float> far_p(p), far_m(m), far_v(v);
        for (const std::int64_t t : {std::int64_t{1}, std::int64_t{50}}) {
            const AdamWFactors<float> by({}, t, 1e-2, 0.1, 0.3);
            adamw<float>(one, by, p.line(), a.data.data(), m.data.data(), v.data.data());
            adamw<float>(test::gpu(), by, far_p.line(), far_a.get().data, far_m.get().data, far_v.get().data);
        }
        finish();
        check(text + "adamw", far_p.host(), p);
        check(text + "adamw's first moment", far_m.host(), m, 1e-6);
        check(text + "adamw's second moment", far_v.host(), v, 1e-6);
    }
}

TEST_CASE("pretrain on the GPU: between float and bf16, bit for bit") {
    using steelyard::bf16;
    const index_t sizes[] = {1, 700, 33};
    std::vector<Host<float>> wide;
    std::vector<Tensor<float>> far_wide;
    std::vector<Tensor<bf16>> far_narrow;
    Twins twins{.count = 3};
    for (int i = 0; i < 3; ++i) {
        wide.push_back(numbers(1, sizes[i], static_cast<unsigned>(i)));
        far_wide.emplace_back(wide.back());
        far_narrow.emplace_back(1, sizes[i]);
        twins.of[i] = {far_wide.back().get().data, far_narrow.back().get().data, sizes[i]};
    }
    narrow(test::gpu(), twins);
    finish();
    for (std::size_t i = 0; i < 3; ++i) CHECK_MESSAGE(far_narrow[i].host().same(wide[i].as<bf16>()), "narrow ", i);
    drain(test::gpu(), twins);
    finish();
    for (std::size_t i = 0; i < 3; ++i) {
        Host<float> sum = wide[i];
        const Host<float> rounded = wide[i].as<bf16>().as<float>();
        for (std::size_t j = 0; j < sum.data.size(); ++j) sum.data[j] += rounded.data[j];
        check("drain", far_wide[i].host(), sum, 0.0);
        CHECK_MESSAGE(far_narrow[i].host().same(Host<bf16>(1, sizes[i])), "drain leaves zeros ", i);
    }
    for (std::size_t i = 0; i < 3; ++i) {
        const Tensor<bf16> some(wide[i].as<bf16>());
        Twins single{.count = 1};
        single.of[0] = {far_wide[i].get().data, some.get().data, sizes[i]};
        widen(test::gpu(), single);
        finish();
        check("widen", far_wide[i].host(), wide[i].as<bf16>().as<float>(), 0.0);
    }
}

}  // namespace
