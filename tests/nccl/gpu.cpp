// NcclComm on the GPUs of this machine, one rank and one thread for each. One GPU is a group of one rank.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "steelyard/comm/laws.hpp"
#include "steelyard/comm/nccl.hpp"

namespace {

using steelyard::Code;
using steelyard::Error;
using steelyard::NcclComm;
using steelyard::NcclCommOptions;
using steelyard::Status;
using Clock = std::chrono::steady_clock;
using Span = std::span<std::int64_t>;

int gpus = 0;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Ranks are threads, and doctest's REQUIRE throws what only its own thread may catch.
void must(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}
void must_be(const std::string& came, const std::string& expected) {
    must(came == expected, "expected \"" + expected + "\", came \"" + came + "\"");
}
void must_be(const Status& came, const std::string& expected) { must_be(came.message(), expected); }
void must_be_ok(const Status& came) { must_be(came, "ok"); }
void must_be_ok(cudaError_t came) { must_be(cudaGetErrorString(came), "no error"); }
void must_be_ok(ncclResult_t came) {
    must(came == ncclSuccess, std::string(ncclGetErrorString(came)) + ": " + ncclGetLastError(nullptr));
}

struct FreePinned {
    void operator()(std::int64_t* words) const { (void)cudaFreeHost(words); }
};

/// Words in pinned memory, as a layer on a GPU has them.
struct Pinned {
    explicit Pinned(std::size_t count, std::int64_t value = 0) : size(count) {
        void* words = nullptr;
        must_be_ok(cudaMallocHost(&words, std::max<std::size_t>(count, 1) * sizeof(std::int64_t)));
        memory.reset(static_cast<std::int64_t*>(words));
        fill(value);
    }
    void fill(std::int64_t value) const { std::fill(memory.get(), memory.get() + size, value); }
    [[nodiscard]] Span span() const { return {memory.get(), size}; }
    void must_hold(std::int64_t value) const {
        for (std::size_t i = 0; i < size; ++i)
            must_be("word " + std::to_string(i) + ": " + std::to_string(memory[i]),
                    "word " + std::to_string(i) + ": " + std::to_string(value));
    }

    std::unique_ptr<std::int64_t[], FreePinned> memory;
    std::size_t size;
};

/// Work that stands in a stream until it is let go, or for 20 s.
class Gate {
public:
    explicit Gate(cudaStream_t stream) { must_be_ok(cudaLaunchHostFunc(stream, &hold, &open_)); }
    ~Gate() { open(); }
    void open() { open_ = true; }

private:
    static void hold(void* open) {
        const auto start = Clock::now();
        while (!static_cast<std::atomic<bool>*>(open)->load() && seconds_since(start) < 20.0)
            std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    std::atomic<bool>& open_ =
        *new std::atomic<bool>(false);  // for ever: the stream may look later than the gate lives
};

void sum(const NcclComm& comm, Span words) {
    must_be_ok(comm.begin_sum(words));
    must_be_ok(comm.end_sum(words));
}

/// What a rank makes its handle of.
struct Seat {
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    int rank = 0;
};

/// Runs `body(seat)` on a thread for each GPU. A communicator that the body does not report as gone is destroyed after.
/// The first exception is thrown again.
template <class Body>
void on_seats(Body body, bool blocking = true) {
    std::vector<ncclComm_t> comms(static_cast<std::size_t>(gpus), nullptr);
    std::vector<char> gone(comms.size(), 0);
    if (blocking) must_be_ok(ncclCommInitAll(comms.data(), gpus, nullptr));
    ncclUniqueId id{};
    if (!blocking) must_be_ok(ncclGetUniqueId(&id));
    std::mutex mutex;
    std::exception_ptr first;
    {
        std::vector<std::jthread> threads;
        for (int r = 0; r < gpus; ++r)
            threads.emplace_back([&, r] {
                const auto at = static_cast<std::size_t>(r);
                try {
                    must_be_ok(cudaSetDevice(r));
                    if (!blocking) {
                        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
                        config.blocking = 0;
                        const ncclResult_t made = ncclCommInitRankConfig(&comms[at], gpus, id, r, &config);
                        must(made == ncclSuccess || made == ncclInProgress, ncclGetErrorString(made));
                    }
                    Seat seat{comms[at], nullptr, r};
                    must_be_ok(cudaStreamCreateWithFlags(&seat.stream, cudaStreamNonBlocking));
                    gone[at] = body(seat) ? 1 : 0;
                    must_be_ok(cudaStreamSynchronize(seat.stream));
                    must_be_ok(cudaStreamDestroy(seat.stream));
                } catch (...) {
                    gone[at] = 1;  // who knows; a leak in a test that failed
                    const std::lock_guard lock(mutex);
                    if (!first) first = std::current_exception();
                }
            });
    }
    for (std::size_t r = 0; r < comms.size(); ++r)
        if (!gone[r]) {
            (void)cudaSetDevice(static_cast<int>(r));
            const ncclResult_t ended = ncclCommDestroy(comms[r]);
            must(ended == ncclSuccess || ended == ncclInProgress, ncclGetErrorString(ended));
        }
    if (first) std::rethrow_exception(first);
}

/// Runs `body(handle)` on each rank of a fresh group.
template <class Body>
void on_ranks(NcclCommOptions options, Body body, bool blocking = true) {
    on_seats(
        [&](const Seat& seat) {
            const NcclComm comm(seat.comm, seat.stream, options);
            body(comm);
            return comm.aborted();
        },
        blocking);
}

/// The stream's capture, made of what `body` enqueues.
class Graph {
public:
    template <class Body>
    Graph(cudaStream_t stream, Body body) {
        // What other threads call meanwhile would break a global capture.
        must_be_ok(
            cudaStreamBeginCapture(stream, gpus == 1 ? cudaStreamCaptureModeGlobal : cudaStreamCaptureModeThreadLocal));
        body();
        cudaGraph_t graph = nullptr;
        must_be_ok(cudaStreamEndCapture(stream, &graph));
        must_be_ok(cudaGraphInstantiate(&run_, graph, 0));
        must_be_ok(cudaGraphDestroy(graph));
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() { (void)cudaGraphExecDestroy(run_); }
    void launch(cudaStream_t stream) const { must_be_ok(cudaGraphLaunch(run_, stream)); }

private:
    cudaGraphExec_t run_ = nullptr;
};

void copy(const NcclComm& comm, const Pinned& to, const Pinned& from) {
    must_be_ok(cudaMemcpyAsync(to.memory.get(), from.memory.get(), from.size * sizeof(std::int64_t), cudaMemcpyDefault,
                               comm.stream()));
}

/// How every call is answered once `comm` is refused.
void must_stay_refused(const NcclComm& comm, Span words, Code code) {
    must(comm.aborted(), "a refused handle says that its communicator is gone");
    must(comm.begin_sum(words).code() == code, "begin_sum stays refused: " + comm.begin_sum(words).message());
    must(comm.end_sum(words).code() == code, "end_sum stays refused: " + comm.end_sum(words).message());
    must(comm.synchronize().code() == code, "synchronize stays refused: " + comm.synchronize().message());
}

std::string name(const NcclComm& comm) { return " on rank " + std::to_string(comm.rank()) + ": expected "; }

}  // namespace

TEST_CASE("NcclComm obeys the comm laws with words that the host writes") {
    const auto with_group = [](auto body) -> Status {
        std::vector<Status> found(static_cast<std::size_t>(gpus));
        on_ranks({.timeout = 2.0, .reserve = 20011, .wait = true},
                 [&](const NcclComm& comm) { found[static_cast<std::size_t>(comm.rank())] = body(comm); });
        for (Status& status : found)
            if (!status) return std::move(status);
        return {};
    };
    CHECK(steelyard::check_comm_laws(with_group, {.refused_within = 6.0}).message() == "ok");
}

TEST_CASE("a sum takes its words from the stream and leaves them there") {
    on_ranks({}, [](const NcclComm& comm) {
        const Pinned words(300), source(300, comm.rank() + 1);
        must(comm.rank() >= 0 && comm.rank() < comm.size() && comm.size() == gpus, "rank and size");
        for (int n = 0; n < 3; ++n) {
            copy(comm, words, source);
            sum(comm, words.span());
            must_be_ok(comm.synchronize());
            words.must_hold(gpus * (gpus + 1) / 2);
        }
        sum(comm, words.span().first(0));
        sum(comm, {});
        must_be_ok(comm.synchronize());
    });
}

TEST_CASE("neither call waits for the stream") {
    on_ranks({}, [](const NcclComm& comm) {
        const Pinned words(8, 1);
        Gate gate(comm.stream());
        const auto start = Clock::now();
        sum(comm, words.span());
        must(seconds_since(start) < 2.0, "begin_sum and end_sum return at once");
        words.must_hold(1);
        gate.open();
        must_be_ok(comm.synchronize());
        words.must_hold(gpus);
    });
}

TEST_CASE("more sums than verdicts are kept, of all lengths, wrap around as integers do") {
    on_ranks({.reserve = 600}, [](const NcclComm& comm) {
        const Pinned words(600);
        for (int n = 0; n < 1000; ++n) sum(comm, words.span().first(static_cast<std::size_t>(n % 601)));
        must_be_ok(comm.synchronize());
        words.must_hold(0);
        words.fill(std::int64_t{1} << 62);
        for (int n = 0; n < 5; ++n) sum(comm, words.span());
        must_be_ok(comm.synchronize());
        std::uint64_t expected = std::uint64_t{1} << 62;
        for (int n = 0; n < 5; ++n) expected *= static_cast<std::uint64_t>(gpus);
        words.must_hold(static_cast<std::int64_t>(expected));
    });
}

TEST_CASE("words in the GPU's memory") {
    on_ranks({}, [](const NcclComm& comm) {
        void* memory = nullptr;
        must_be_ok(cudaMalloc(&memory, 50 * sizeof(std::int64_t)));
        const Pinned words(50, 7);
        const auto bytes = words.span().size_bytes();
        must_be_ok(cudaMemcpyAsync(memory, words.memory.get(), bytes, cudaMemcpyDefault, comm.stream()));
        sum(comm, {static_cast<std::int64_t*>(memory), 50});
        must_be_ok(cudaMemcpyAsync(words.memory.get(), memory, bytes, cudaMemcpyDefault, comm.stream()));
        must_be_ok(comm.synchronize());
        words.must_hold(7 * gpus);
        must_be_ok(cudaFree(memory));
    });
}

TEST_CASE("sums in a graph, replayed between sums outside of it") {
    on_ranks({}, [](const NcclComm& comm) {
        const Pinned some(100), more(9), source(100), outside(5, 1);
        const Graph graph(comm.stream(), [&] {
            copy(comm, some, source);
            sum(comm, some.span());
            sum(comm, more.span());
        });
        some.must_hold(0);
        for (int n = 0; n < 4; ++n) {
            source.fill(n + comm.rank());
            more.fill(n);
            outside.fill(comm.rank());
            graph.launch(comm.stream());
            sum(comm, outside.span());
            must_be_ok(comm.synchronize());
            some.must_hold(gpus * n + gpus * (gpus - 1) / 2);
            more.must_hold(gpus * n);
            outside.must_hold(gpus * (gpus - 1) / 2);
        }
        cudaStream_t other = nullptr;
        must_be_ok(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
        source.fill(3);
        graph.launch(other);
        must_be_ok(comm.synchronize(other, 10.0));
        some.must_hold(3 * gpus);
        must_be_ok(cudaStreamDestroy(other));
    });
}

TEST_CASE("slips of the caller are refused, and the group goes on") {
    on_ranks({.reserve = 10}, [](const NcclComm& comm) {
        const Pinned words(11, 1);
        std::vector<std::int64_t> pageable(4, 1);
        must_be(comm.begin_sum(words.span()), "steelyard: NcclComm: the words of collective 0" + name(comm) +
                                                  "at most NcclCommOptions::reserve, 10, came 11");
        must_be(comm.begin_sum(pageable),
                "steelyard: NcclComm: the words of collective 0" + name(comm) +
                    "pinned memory, or memory of the GPU, without NcclCommOptions::wait, came pageable memory");
        must_be(comm.end_sum(words.span()),
                "steelyard: NcclComm: end_sum" + name(comm) + "a begin_sum before it, came end_sum alone");
        must_be(comm.synchronize(0.0), "steelyard: NcclComm: timeout: expected more than 0 s, came 0.000000 s");
        {
            const Graph graph(comm.stream(), [&] {
                must_be(comm.synchronize(),
                        "steelyard: NcclComm: stream: expected a stream that is not being captured, "
                        "came one that is: the host cannot wait for it");
            });
        }
        must_be_ok(comm.begin_sum(words.span().first(10)));
        must_be(comm.begin_sum(words.span().first(10)),
                "steelyard: NcclComm: the next call" + name(comm) +
                    "end_sum first, came another call while a sum of 10 int64 is under way");
        must_be_ok(comm.end_sum(words.span().first(10)));
        must_be_ok(comm.synchronize());
        must(words.memory[9] == gpus && words.memory[10] == 1, "a sum after all the slips");
        must(!comm.aborted(), "slips leave the communicator");
    });
}

TEST_CASE("a handle that waits takes no part in a capture") {
    on_ranks({.wait = true}, [](const NcclComm& comm) {
        std::vector<std::int64_t> words(4, 1);
        {
            const Graph graph(comm.stream(), [&] {
                must_be(comm.begin_sum(words),
                        "steelyard: NcclComm: stream: expected a stream that is not being captured, came one that is: "
                        "the host cannot wait for it");
            });
        }
        sum(comm, words);
        must(words == std::vector<std::int64_t>(4, gpus), "a sum after the slip");
    });
}

TEST_CASE("a handle that waits sums what the stream writes, too") {
    on_ranks({.wait = true}, [](const NcclComm& comm) {
        const Pinned words(20), source(20, 3);
        copy(comm, words, source);
        sum(comm, words.span());
        words.must_hold(3 * gpus);
    });
}

TEST_CASE("the constructor refuses streams that cannot work, and leaves the communicator") {
    on_seats([](const Seat& seat) {
        std::string came;
        {
            const Graph graph(seat.stream, [&] {
                try {
                    const NcclComm comm(seat.comm, seat.stream);
                } catch (const Error& error) {
                    came = error.what();
                }
            });
        }
        must_be(came,
                "steelyard: NcclComm: stream: expected a stream that is not being captured, came one that is: the "
                "host cannot wait for it");
        if (gpus > 1) {
            must_be_ok(cudaSetDevice((seat.rank + 1) % gpus));
            cudaStream_t other = nullptr;
            must_be_ok(cudaStreamCreate(&other));
            try {
                const NcclComm comm(seat.comm, other);
                must(false, "a stream of another device is refused");
            } catch (const Error& error) {
                must(error.status().code() == Code::invalid_argument, error.what());
            }
            must_be_ok(cudaStreamDestroy(other));
            must_be_ok(cudaSetDevice(seat.rank));
        }
        const NcclComm comm(seat.comm, seat.stream);
        const Pinned words(3, 1);
        sum(comm, words.span());
        must_be_ok(comm.synchronize());
        words.must_hold(gpus);
        return comm.aborted();
    });
}

TEST_CASE("the default stream will do") {
    on_seats([](const Seat& seat) {
        const NcclComm comm(seat.comm, nullptr);
        const Pinned words(3, 1);
        sum(comm, words.span());
        must_be_ok(comm.synchronize());
        words.must_hold(gpus);
        return comm.aborted();
    });
}

TEST_CASE("a stream that stands still ends in a refusal") {
    on_ranks({}, [](const NcclComm& comm) {
        const Pinned words(8, 1);
        sum(comm, words.span());
        must_be_ok(comm.synchronize());
        Gate gate(comm.stream());
        sum(comm, words.span());
        const auto start = Clock::now();
        const Status late = comm.synchronize(0.2);
        must(seconds_since(start) < 5.0, "a refusal in time");
        must_be(late, "steelyard: NcclComm: collective 1" + name(comm) + "all " + std::to_string(gpus) +
                          " ranks within 0.2 s, came a stream still busy: a rank did not come, or work before the sum "
                          "does not end");
        must(late.code() == Code::comm_timeout, "the code of a refusal");
        must_stay_refused(comm, words.span(), Code::comm_timeout);
        gate.open();
        must_be_ok(cudaStreamSynchronize(comm.stream()));
    });
}

TEST_CASE("an abort refuses the rank for ever, also while a graph still holds its sums") {
    on_ranks({}, [](const NcclComm& comm) {
        const Pinned words(8, 1);
        const Graph graph(comm.stream(), [&] { sum(comm, words.span()); });
        graph.launch(comm.stream());
        must_be_ok(comm.synchronize());
        const auto start = Clock::now();
        comm.abort("the test");
        must(seconds_since(start) < 5.0, "an abort in time");
        must_be(comm.synchronize(), "steelyard: NcclComm: collective 0" + name(comm) +
                                        "every rank to take part, came an abort: rank " + std::to_string(comm.rank()) +
                                        ": the test");
        must_be(comm.begin_sum(words.span()),
                "steelyard: NcclComm: collective 1" + name(comm) + "every rank to take part, came an abort: rank " +
                    std::to_string(comm.rank()) + ": the test (in collective 0; the group stays refused)");
        must_stay_refused(comm, words.span(), Code::comm_failure);
    });
}

TEST_CASE("a handle whose sum is still under way goes without waiting") {
    on_seats([](const Seat& seat) {
        const Pinned words(8, 1);
        auto comm = std::make_unique<NcclComm>(seat.comm, seat.stream);
        Gate gate(seat.stream);
        sum(*comm, words.span());
        const auto start = Clock::now();
        comm.reset();
        must(seconds_since(start) < 2.0, "a destructor that does not wait");
        gate.open();
        must_be_ok(cudaStreamSynchronize(seat.stream));
        words.must_hold(gpus);
        return false;
    });
}

TEST_CASE("a communicator that does not block") {
    for (const bool wait : {false, true})
        on_ranks(
            {.wait = wait},
            [](const NcclComm& comm) {
                const Pinned words(64, 1);
                for (int n = 0; n < 10; ++n) {
                    words.fill(n);
                    sum(comm, words.span());
                    must_be_ok(comm.synchronize());
                    words.must_hold(n * gpus);
                }
            },
            false);
}

TEST_CASE("a data group and an expert group, each with a handle of its own") {
    on_seats([](const Seat& seat) {
        ncclComm_t split = nullptr;
        must_be_ok(ncclCommSplit(seat.comm, seat.rank % 2, seat.rank, &split, nullptr));
        {
            const NcclComm data(seat.comm, seat.stream), experts(split, seat.stream, {.reserve = 64});
            const Pinned all(10, 1), some(20, 1);
            must_be_ok(data.begin_sum(all.span()));
            must_be_ok(experts.begin_sum(some.span()));
            must_be_ok(experts.end_sum(some.span()));
            must_be_ok(data.end_sum(all.span()));
            must_be_ok(data.synchronize());
            must_be_ok(experts.synchronize());
            all.must_hold(gpus);
            some.must_hold((gpus + 1 - seat.rank % 2) / 2);
        }
        must_be_ok(ncclCommDestroy(split));
        return false;
    });
}

TEST_CASE("ranks whose sums differ in size learn of it when they wait") {
    if (gpus < 2) return;
    on_ranks({.timeout = 10.0}, [](const NcclComm& comm) {
        const Pinned words(9, 1);
        sum(comm, words.span());
        const bool odd = comm.rank() == gpus - 1;
        sum(comm, words.span().first(odd ? 9 : 4));
        must_be(comm.synchronize(),
                "steelyard: NcclComm: collective 1" + name(comm) + "the same call on every rank, came a sum of " +
                    std::to_string(odd ? 9 : 4) + " int64 here, and of other sizes elsewhere (" +
                    std::to_string(4 * (gpus - 1) + 9) + " words on all " + std::to_string(gpus) + " ranks)");
        must_stay_refused(comm, words.span(), Code::comm_mismatch);
    });
}

TEST_CASE("ranks whose reserves differ are refused by the constructor") {
    if (gpus < 2) return;
    on_seats([](const Seat& seat) {
        try {
            const NcclComm comm(seat.comm, seat.stream, {.reserve = seat.rank == 0 ? 100u : 101u});
        } catch (const Error& error) {
            must_be(error.what(), "steelyard: NcclComm: reserve: expected the same on every rank, came " +
                                      std::to_string(seat.rank == 0 ? 100 : 101) + " on rank " +
                                      std::to_string(seat.rank));
            return false;
        }
        throw std::runtime_error("reserves that differ are refused");
    });
}

int main(int argc, char** argv) {
    const cudaError_t found = cudaGetDeviceCount(&gpus);
    if (found != cudaSuccess || gpus < 1) {
        std::printf("skipped: no GPU here (%s)\n", cudaGetErrorString(found));
        return 77;
    }
    gpus = std::min(gpus, 8);
    int version = 0;
    (void)ncclGetVersion(&version);
    std::printf("NCCL %d, %d rank(s)\n", version, gpus);
    return doctest::Context(argc, argv).run();
}
