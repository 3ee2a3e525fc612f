// What is made of matrix products runs on the instruction set that the device names, like everything else.
#include <doctest/doctest.h>

#include "cpu/ffn_run.hpp"
#include "cpu/instruction_sets.hpp"
#include "steelyard/cpu/expert.hpp"

using namespace steelyard;
using namespace steelyard::testing;

TEST_CASE("low-rank experts whose b is 0 give the bits of their base, on every instruction set") {
    const FfnCase c{.rows = {21}, .width = 37, .hidden = 29, .function = Activation::silu, .gated = true};
    constexpr index_t rank = 3;
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        const Cpu device{.isa = isa};
        FfnRun<float> base(c), run(c);
        base.forward(device);
        Tensor<float, 3> a_in, a_hidden, b_in, b_hidden;
        a_in.make(0, 0.3, index_t{1}, rank, c.width), a_hidden.make(0, 0.2, index_t{1}, rank, c.hidden);
        b_in.make(0, 0.0, index_t{1}, c.hidden, rank), b_hidden.make(0, 0.0, index_t{1}, c.width, rank);
        const LowRank<const float> in{a_in.v, b_in.v}, out{a_hidden.v, b_hidden.v};
        const LowRankUpdates<const float> updates{in, in, out};
        Tensor<float, 2> low_gate, low_up;
        low_gate.make(0, 0.0, c.filled(), rank), low_up.make(0, 0.0, c.filled(), rank);
        Bytes scratch(expert_ops<Cpu>::low_rank_scratch_bytes<float>(device, c.width, c.hidden, rank));
        expert_ops<Cpu>::low_rank_forward<float>(device, c.function, run.weights(), updates, 1.0, run.x.v, run.plan,
                                                 run.kept(), {low_gate.v, low_up.v}, run.rows.v, scratch.data());
        CHECK(same_bits(run.kept_gate, base.kept_gate));
        CHECK(same_bits(run.kept_up, base.kept_up));
        CHECK(same_bits(run.rows, base.rows));
    }
}

TEST_CASE("a grouped linear map is a product of the device's instruction set") {
    for (const Isa isa : instruction_sets()) {
        CAPTURE(name_of(isa));
        const Cpu device{.isa = isa};
        const FfnCase c{.rows = {13}, .width = 41, .hidden = 19, .gated = true};
        FfnRun<float> run(c);
        Tensor<float, 2> rows, product;
        rows.make(0, 0.0, c.filled(), c.hidden), product.make(0, 0.0, c.filled(), c.hidden);
        Bytes scratch(expert_ops<Cpu>::linear_scratch_bytes<float>(device, c.width, c.hidden));
        expert_ops<Cpu>::linear_forward<float>(device, run.weights().gate, {.from = run.x.v, .by_token = true},
                                               run.plan, rows.v, scratch.data());
        Bytes room(cpu::gemm_scratch_bytes<float>());
        cpu::gemm_nt<float>(run.x.v, run.weights().gate[0], product.v, Write::assign, room.data(), isa);
        CHECK(same_bits(rows, product));
    }
}
