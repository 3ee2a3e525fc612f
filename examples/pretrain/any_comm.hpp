// The ranks of a run behind virtual calls: a model is compiled once, whatever its ranks talk by.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <span>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/concept.hpp"

namespace pretrain {

/// One rank's handle on a group of any backend; copies share it.
class AnyComm {
    using Status = steelyard::Status;
    using Words = std::span<std::int64_t>;

public:
    template <class Comm>
        requires(!std::same_as<Comm, AnyComm> && steelyard::CollectiveComm<Comm>)
    AnyComm(const Comm& comm) : of_(std::make_shared<const Of<Comm>>(comm)) {}

    [[nodiscard]] int rank() const { return of_->rank(); }
    [[nodiscard]] int size() const { return of_->size(); }
    template <steelyard::CommElement Word>
    Status begin_sum(std::span<Word> words) const {
        return of_->begin_sum(words);
    }
    template <steelyard::CommElement Word>
    Status end_sum(std::span<Word> words) const {
        return of_->end_sum(words);
    }
    Status all_gather(std::span<const std::int64_t> mine, Words all) const { return of_->all_gather(mine, all); }
    Status barrier() const { return of_->barrier(); }

private:
    struct Backend {
        virtual ~Backend() = default;
        [[nodiscard]] virtual int rank() const = 0;
        [[nodiscard]] virtual int size() const = 0;
        virtual Status begin_sum(Words words) const = 0;
        virtual Status begin_sum(std::span<float> words) const = 0;
        virtual Status begin_sum(std::span<double> words) const = 0;
        virtual Status end_sum(Words words) const = 0;
        virtual Status end_sum(std::span<float> words) const = 0;
        virtual Status end_sum(std::span<double> words) const = 0;
        virtual Status all_gather(std::span<const std::int64_t> mine, Words all) const = 0;
        virtual Status barrier() const = 0;
    };

    template <class Comm>
    struct Of final : Backend {
        explicit Of(const Comm& of) : comm(of) {}
        [[nodiscard]] int rank() const override { return comm.rank(); }
        [[nodiscard]] int size() const override { return comm.size(); }
        Status begin_sum(Words words) const override { return comm.begin_sum(words); }
        Status begin_sum(std::span<float> words) const override { return comm.begin_sum(words); }
        Status begin_sum(std::span<double> words) const override { return comm.begin_sum(words); }
        Status end_sum(Words words) const override { return comm.end_sum(words); }
        Status end_sum(std::span<float> words) const override { return comm.end_sum(words); }
        Status end_sum(std::span<double> words) const override { return comm.end_sum(words); }
        Status all_gather(std::span<const std::int64_t> mine, Words all) const override {
            return comm.all_gather(mine, all);
        }
        Status barrier() const override { return comm.barrier(); }

        Comm comm;
    };

    std::shared_ptr<const Backend> of_;
};
static_assert(steelyard::CommBackend<AnyComm>);

}  // namespace pretrain
