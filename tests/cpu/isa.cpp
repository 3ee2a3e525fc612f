#include "steelyard/cpu/isa.hpp"

#include <doctest/doctest.h>

#include <iterator>
#include <string>

#include "cpu/instruction_sets.hpp"
#include "steelyard/cpu/device.hpp"

using namespace steelyard;

namespace {

constexpr Isa every[] = {Isa::automatic, Isa::compiled, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16};

}  // namespace

TEST_CASE("a device has an instruction set that the machine has, or is refused by name") {
    for (const Isa isa : every) {
        CAPTURE(name_of(isa));
        const Status status = Cpu{.isa = isa}.check();
        CHECK(status.ok() == has_isa(isa));
        if (!status.ok())
            CHECK(status.message() == "steelyard: device: isa: expected an instruction set of this machine, came " +
                                          std::string(name_of(isa)));
    }
    for (const int unknown : {-1, static_cast<int>(std::size(every)), 1000})
        CHECK(Cpu{.isa = static_cast<Isa>(unknown)}.check().message() ==
              "steelyard: device: isa: expected an instruction set of this machine, came an unknown one");
    CHECK(Cpu{.threads = 0, .isa = Isa::compiled}.check().message() ==
          "steelyard: device: threads: expected at least 1, came 0");
}

TEST_CASE("a machine that has an instruction set has those below it") {
    CHECK(has_isa(Isa::automatic));
    CHECK(has_isa(Isa::compiled));
    CHECK(has_isa(compiled_isa));
    for (const Isa isa : {Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16})
        if (has_isa(isa)) CHECK(has_isa(static_cast<Isa>(static_cast<int>(isa) - 1)));
}

TEST_CASE("automatic is the best that the machine has, and what is compiled in anyway is `compiled`") {
    for (const Isa isa : every) {
        if (!has_isa(isa)) continue;
        CAPTURE(name_of(isa));
        const Isa resolved = resolve_isa(isa);
        CHECK(resolved != Isa::automatic);
        CHECK(has_isa(resolved));
        CHECK(resolve_isa(resolved) == resolved);
        CHECK((resolved == Isa::compiled || resolved > compiled_isa));
        if (isa > compiled_isa) CHECK(resolved == isa);
        if (isa == Isa::compiled || (isa != Isa::automatic && isa <= compiled_isa)) CHECK(resolved == Isa::compiled);
        CHECK(resolve_isa(Isa::automatic) >= resolved);
    }
}

TEST_CASE("kernels run on the instruction set that is asked for") {
    for (const Isa isa : testing::instruction_sets()) {
        CAPTURE(name_of(isa));
        const int bytes = cpu::with_kernels(
            isa, [](auto kernels) { return int(sizeof(float)) * int(decltype(kernels)::template lanes<float>); });
        if (isa == Isa::compiled) CHECK(bytes == cpu::vector_bytes);
        if (isa == Isa::avx2) CHECK(bytes == 32);
        if (isa >= Isa::avx512) CHECK(bytes == 64);
    }
}
