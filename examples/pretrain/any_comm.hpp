// The ranks of a run behind virtual calls: a model is compiled once, whatever its ranks talk by.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <span>

#include "steelyard/comm/call.hpp"
#include "steelyard/comm/concept.hpp"

namespace pretrain {

/// A handle on a group of ranks of any backend: a copy has a handle of its own.
class AnyComm {
    using Status = steelyard::Status;
    using Words = std::span<std::int64_t>;

public:
    template <class Comm>
        requires(!std::same_as<Comm, AnyComm> && steelyard::CollectiveComm<Comm>)
    AnyComm(const Comm& comm) : of_(std::make_unique<Of<Comm>>(comm)) {}
    AnyComm(const AnyComm& other) : of_(other.of_->copy()) {}
    AnyComm& operator=(const AnyComm& other) {
        of_ = other.of_->copy();
        return *this;
    }

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
    template <steelyard::CommElement Word>
    Status broadcast(std::span<Word> words, int root) const {
        return of_->broadcast(words, root);
    }
    Status all_gather(std::span<const std::int64_t> mine, Words all) const { return of_->all_gather(mine, all); }
    Status barrier() const { return of_->barrier(); }

private:
    struct Backend {
        virtual ~Backend() = default;
        [[nodiscard]] virtual std::unique_ptr<Backend> copy() const = 0;
        [[nodiscard]] virtual int rank() const = 0;
        [[nodiscard]] virtual int size() const = 0;
        virtual Status begin_sum(Words words) const = 0;
        virtual Status begin_sum(std::span<float> words) const = 0;
        virtual Status begin_sum(std::span<double> words) const = 0;
        virtual Status end_sum(Words words) const = 0;
        virtual Status end_sum(std::span<float> words) const = 0;
        virtual Status end_sum(std::span<double> words) const = 0;
        virtual Status broadcast(Words words, int root) const = 0;
        virtual Status broadcast(std::span<float> words, int root) const = 0;
        virtual Status broadcast(std::span<double> words, int root) const = 0;
        virtual Status all_gather(std::span<const std::int64_t> mine, Words all) const = 0;
        virtual Status barrier() const = 0;
    };

    template <class Comm>
    struct Of final : Backend {
        explicit Of(const Comm& of) : comm(of) {}
        [[nodiscard]] std::unique_ptr<Backend> copy() const override { return std::make_unique<Of>(comm); }
        [[nodiscard]] int rank() const override { return comm.rank(); }
        [[nodiscard]] int size() const override { return comm.size(); }
        Status begin_sum(Words words) const override { return comm.begin_sum(words); }
        Status begin_sum(std::span<float> words) const override { return comm.begin_sum(words); }
        Status begin_sum(std::span<double> words) const override { return comm.begin_sum(words); }
        Status end_sum(Words words) const override { return comm.end_sum(words); }
        Status end_sum(std::span<float> words) const override { return comm.end_sum(words); }
        Status end_sum(std::span<double> words) const override { return comm.end_sum(words); }
        Status broadcast(Words words, int root) const override { return comm.broadcast(words, root); }
        Status broadcast(std::span<float> words, int root) const override { return comm.broadcast(words, root); }
        Status broadcast(std::span<double> words, int root) const override { return comm.broadcast(words, root); }
        Status all_gather(std::span<const std::int64_t> mine, Words all) const override {
            return comm.all_gather(mine, all);
        }
        Status barrier() const override { return comm.barrier(); }

        Comm comm;
    };

    std::unique_ptr<Backend> of_;
};
static_assert(steelyard::CollectiveComm<AnyComm>);

}  // namespace pretrain
