#include <doctest/doctest.h>

#include <string>

#include "steelyard/core/status.hpp"

using namespace steelyard;

namespace {

Status refused() { return Status::refuse(Code::invalid_argument, "router", "logits", "[4, 8]", "[4, 7]"); }

}  // namespace

TEST_CASE("a status is ok until something is refused") {
    const Status status;
    CHECK(status.ok());
    CHECK(static_cast<bool>(status));
    CHECK(status.code() == Code::ok);
    CHECK(status.message() == "ok");
}

TEST_CASE("a refusal names the stage, the tensor, what was expected and what came") {
    const Status status = refused();
    CHECK_FALSE(status.ok());
    CHECK_FALSE(static_cast<bool>(status));
    CHECK(status.code() == Code::invalid_argument);
    CHECK(status.stage() == "router");
    CHECK(status.tensor() == "logits");
    CHECK(status.expected() == "[4, 8]");
    CHECK(status.came() == "[4, 7]");
    CHECK(status.message() == "steelyard: router: logits: expected [4, 8], came [4, 7]");
}

TEST_CASE("an error carries the status and the same text") {
    try {
        throw_if_refused(refused());
        FAIL("nothing was thrown");
    } catch (const Error& error) {
        CHECK(std::string(error.what()) == refused().message());
        CHECK(error.status().code() == Code::invalid_argument);
        CHECK(error.status().tensor() == "logits");
    }
}

TEST_CASE("nothing is thrown where nothing was refused") { CHECK_NOTHROW(throw_if_refused(Status{})); }
