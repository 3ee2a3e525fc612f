#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "steelyard/cuda/resources.hpp"

int main(int argc, char** argv) {
    if (const steelyard::Status status = steelyard::CudaResources::available(); !status) {
        std::printf("skipped: no GPU here (%s)\n", status.came().c_str());
        return 77;
    }
    return doctest::Context(argc, argv).run();
}
