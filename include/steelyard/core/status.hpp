// The answer of every checked call: ok, or which stage refused which tensor and why.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace steelyard {

enum class Code {
    ok,
    invalid_argument,  ///< a size, stride, pointer or option that the call cannot work with
    not_finite,        ///< a NaN or infinity where a number is needed
    bad_state,         ///< bytes that are not the state this layer expects
    comm_mismatch,     ///< ranks disagree on a collective
    comm_timeout,      ///< a rank did not reach a collective in time
    rank_refused,      ///< another rank refused its call, so this one cannot go on either
    comm_failure,      ///< the communication library reported an error
    device_failure,    ///< the GPU or its library reported an error
};

/// `ok`, or a refusal that names the stage, the tensor, what was expected and what came.
///
/// A refused call has written nothing of the caller's but its context and workspace. Successful
/// statuses allocate nothing.
class [[nodiscard]] Status {
public:
    Status() = default;

    static Status refuse(Code code, std::string_view stage, std::string_view tensor, std::string expected,
                         std::string came) {
        Status s;
        s.code_ = code;
        s.stage_ = stage;
        s.tensor_ = tensor;
        s.expected_ = std::move(expected);
        s.came_ = std::move(came);
        return s;
    }

    [[nodiscard]] bool ok() const { return code_ == Code::ok; }
    explicit operator bool() const { return ok(); }

    [[nodiscard]] Code code() const { return code_; }
    [[nodiscard]] const std::string& stage() const { return stage_; }
    [[nodiscard]] const std::string& tensor() const { return tensor_; }
    [[nodiscard]] const std::string& expected() const { return expected_; }
    [[nodiscard]] const std::string& came() const { return came_; }

    /// "steelyard: <stage>: <tensor>: expected <expected>, came <came>"
    [[nodiscard]] std::string message() const {
        if (ok()) return "ok";
        return "steelyard: " + stage_ + ": " + tensor_ + ": expected " + expected_ + ", came " + came_;
    }

private:
    Code code_ = Code::ok;
    std::string stage_, tensor_, expected_, came_;
};

/// What the owning conveniences throw: the same text as the status, which it carries.
class Error : public std::runtime_error {
public:
    explicit Error(Status status) : std::runtime_error(status.message()), status_(std::move(status)) {}
    [[nodiscard]] const Status& status() const { return status_; }

private:
    Status status_;
};

inline void throw_if_refused(Status status) {
    if (!status) throw Error(std::move(status));
}

}  // namespace steelyard
