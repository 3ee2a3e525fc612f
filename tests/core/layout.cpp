#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "steelyard/core/layout.hpp"

using namespace steelyard;

namespace {

struct Dims {
    index_t experts = 0;
    index_t width = 0;
};

struct Linear {
    view<float, 2> weight;  // [E, d]
    view<double, 1> bias;   // [E]

    template <class Field>
    void fields(Field&& field, const Dims& dims) {
        field("weight", weight, dims.experts, dims.width);
        field("bias", bias, dims.experts);
    }
};

struct Block {
    Linear gate;
    view<std::int32_t, 1> count;  // [E]
    Linear up;

    template <class Field>
    void fields(Field&& field, const Dims& dims) {
        field.group("gate", gate, dims);
        field("count", count, dims.experts);
        field.group("up", up, dims);
    }
};

template <class T>
struct Inner {
    view<T, 2> weight;  // [E, d]

    template <class Field>
    void fields(Field&& field, const Dims& dims) {
        field("weight", weight, dims.experts, dims.width);
    }
};

template <class T>
struct Pair {
    Inner<T> first;
    view<T, 1> second;  // [E]

    template <class Field>
    void fields(Field&& field, const Dims& dims) {
        field.group("first", first, dims);
        field("second", second, dims.experts);
    }
};

struct alignas(layout_alignment) Memory {
    std::byte bytes[4096];
};

index_t at(const void* tensor, const Memory& memory) { return static_cast<const std::byte*>(tensor) - memory.bytes; }

/// A linear whose memory is somewhere: good until a test breaks it.
Linear filled(Memory& memory, const Dims& dims) { return place<Linear>(memory.bytes, dims); }

}  // namespace

TEST_CASE("the size of a bundle is the sum of its tensors, each rounded up to the alignment") {
    // weight: 3 * 5 * 4 = 60 bytes -> 64. bias: 3 * 8 = 24 -> 64.
    CHECK(bytes_of<Linear>(Dims{3, 5}) == 128);
    // weight: 4 * 5 * 4 = 80 -> 128. bias: 32 -> 64.
    CHECK(bytes_of<Linear>(Dims{4, 5}) == 192);
    CHECK(bytes_of<Linear>(Dims{0, 5}) == 0);
    // Two linears and 3 * 4 = 12 -> 64.
    CHECK(bytes_of<Block>(Dims{3, 5}) == 128 + 64 + 128);
}

TEST_CASE("a bundle is placed where its sizes say: aligned, in order, without overlap") {
    Memory memory;
    const Block block = place<Block>(memory.bytes, Dims{3, 5});
    CHECK(at(block.gate.weight.data, memory) == 0);
    CHECK(at(block.gate.bias.data, memory) == 64);
    CHECK(at(block.count.data, memory) == 128);
    CHECK(at(block.up.weight.data, memory) == 192);
    CHECK(at(block.up.bias.data, memory) == 256);
    CHECK(block.up.weight.extents[0] == 3);
    CHECK(block.up.weight.extents[1] == 5);
    CHECK(block.up.weight.dense());
    CHECK(is_aligned(block.up.bias.data));
}

TEST_CASE("each tensor of a bundle is named by its groups and itself") {
    Memory memory;
    Block block = place<Block>(memory.bytes, Dims{3, 5});
    std::vector<std::string> names;
    std::vector<index_t> sizes;
    for_each_tensor(
        block,
        [&](const std::string& name, const auto& tensor) {
            names.push_back(name);
            sizes.push_back(tensor.size());
        },
        Dims{3, 5});
    CHECK(names == std::vector<std::string>{"gate.weight", "gate.bias", "count", "up.weight", "up.bias"});
    CHECK(sizes == std::vector<index_t>{15, 3, 3, 15, 3});
}

TEST_CASE("a bundle that was placed passes its own check") {
    Memory memory;
    CHECK(check_bundle("expert", "params", Absent::refused, place<Block>(memory.bytes, Dims{3, 5}), Dims{3, 5}).ok());
}

TEST_CASE("a bundle without elements needs no memory") {
    CHECK(check_bundle("expert", "params", Absent::refused, place<Linear>(nullptr, Dims{0, 5}), Dims{0, 5}).ok());
}

TEST_CASE("a tensor of other extents is refused with both extents") {
    Memory memory;
    const Status status = check_bundle("expert", "params", Absent::refused, filled(memory, Dims{3, 5}), Dims{3, 4});
    CHECK(status.code() == Code::invalid_argument);
    CHECK(status.message() == "steelyard: expert: params.weight: expected [3, 4], came [3, 5]");
}

TEST_CASE("an absent tensor is refused as a null pointer") {
    Memory memory;
    Linear linear = filled(memory, Dims{3, 5});
    linear.bias.data = nullptr;
    const Status status = check_bundle("expert", "params", Absent::refused, linear, Dims{3, 5});
    CHECK(status.message() == "steelyard: expert: params.bias: expected a tensor of [3], came a null pointer");
}

TEST_CASE("padded rows are taken, overlapping and scattered rows are refused") {
    std::vector<float> memory(64);
    view<float, 2> x(memory.data(), 3, 5);
    x.strides[0] = 8;
    CHECK(check_view("layer", "x", x, 3, 5).ok());

    x.strides[0] = 4;
    CHECK(check_view("layer", "x", x, 3, 5).message() ==
          "steelyard: layer: x: expected contiguous rows that do not overlap, came strides [4, 1]");

    x.strides[0] = 10;
    x.strides[1] = 2;
    CHECK(check_view("layer", "x", x, 3, 5).message() ==
          "steelyard: layer: x: expected contiguous rows that do not overlap, came strides [10, 2]");
}

TEST_CASE("a repeated row is refused") {
    std::vector<float> memory(64);
    view<float, 2> x(memory.data(), 3, 5);
    x.strides[0] = 0;
    CHECK_FALSE(check_view("layer", "x", x, 3, 5).ok());
}

TEST_CASE("the strides of a tensor without elements, or of a dimension of one, do not matter") {
    std::vector<float> memory(64);
    view<float, 2> one_row(memory.data(), 1, 5);
    one_row.strides[0] = 0;
    CHECK(check_view("layer", "x", one_row, 1, 5).ok());
    view<float, 2> none(nullptr, 0, 5);
    none.strides[0] = 0;
    CHECK(check_view("layer", "x", none, 0, 5).ok());
}

TEST_CASE("the first fault of a bundle is the one reported, by its full name") {
    Memory memory;
    Block block = place<Block>(memory.bytes, Dims{3, 5});
    block.count.data = nullptr;
    block.up.bias.data = nullptr;
    const Status status = check_bundle("expert", "", Absent::refused, block, Dims{3, 5});
    CHECK(status.tensor() == "count");
    block.count.data = reinterpret_cast<std::int32_t*>(memory.bytes);
    const Status inner = check_bundle("expert", "", Absent::refused, block, Dims{3, 5});
    CHECK(inner.tensor() == "up.bias");
    block.up.weight.data = nullptr;
    CHECK(check_bundle("expert", "", Absent::refused, block, Dims{3, 5}).tensor() == "up.weight");
}

TEST_CASE("a tensor of a group is named by the bundle, the group and itself") {
    Memory memory;
    Block block = place<Block>(memory.bytes, Dims{3, 5});
    block.up.bias.data = nullptr;
    CHECK(check_bundle("expert", "params", Absent::refused, block, Dims{3, 5}).tensor() == "params.up.bias");
}

TEST_CASE("an absent tensor is taken where that is fine, one of other extents is not") {
    Memory memory;
    Block block = place<Block>(memory.bytes, Dims{3, 5});
    block.count.data = nullptr;
    block.up.bias.data = nullptr;
    CHECK(check_bundle("expert", "params", Absent::fine, block, Dims{3, 5}).ok());
    block.up.weight.extents[1] = 6;
    CHECK(check_bundle("expert", "params", Absent::fine, block, Dims{3, 5}).message() ==
          "steelyard: expert: params.up.weight: expected [3, 5], came [3, 6]");
}

TEST_CASE("the read-only twin of a bundle is the same memory with the same strides") {
    Memory memory;
    Pair<float> pair = place<Pair<float>>(memory.bytes, Dims{3, 5});
    pair.first.weight.strides[0] = 8;
    const auto twin = read_only<Pair<const float>>(pair, Dims{3, 5});
    CHECK(twin.first.weight.data == pair.first.weight.data);
    CHECK(twin.first.weight.extents[1] == 5);
    CHECK(twin.first.weight.strides[0] == 8);
    CHECK(twin.first.weight.strides[1] == 1);
    CHECK(twin.second.data == pair.second.data);
    CHECK(twin.second.extents[0] == 3);
}

TEST_CASE("a block of memory that is too small or misaligned is refused") {
    Memory memory;
    const std::span<const std::byte> block(memory.bytes);
    CHECK(check_block("layer", "context", block, 4096).ok());
    CHECK(check_block("layer", "context", {}, 0).ok());
    CHECK(check_block("layer", "context", block.first(100), 128).message() ==
          "steelyard: layer: context: expected at least 128 bytes, came 100");
    CHECK(check_block("layer", "context", block.subspan(8), 128).message() ==
          "steelyard: layer: context: expected memory aligned to 64 bytes, came a misaligned pointer");
}
