// A device whose memory the host cannot read and whose operations run later, on the CPU: for layers that must do with
// it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <span>
#include <stdexcept>
#include <vector>

#include "steelyard/steelyard.hpp"

namespace steelyard::testing {

/// Memory of `FarMachine`.
struct FarSpace {};

/// Two lines of work that run when somebody waits, and memory that faults while no operation of theirs runs.
class FarMachine {
public:
    enum Line : int { main_line, side_line };
    /// When the side line runs: as soon as it may, or when it is waited for.
    enum class Side { early, late };

    explicit FarMachine(Side side = Side::late) : side_(side) {}
    FarMachine(const FarMachine&) = delete;
    ~FarMachine() {
        for (const auto& block : blocks_) munmap(block.data(), block.size());
    }

    /// Zeroed memory, readable within operations alone.
    std::span<std::byte> allocate(index_t bytes) {
        const auto size = (static_cast<std::size_t>(bytes) + 4096) / 4096 * 4096;
        void* const data = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) throw std::runtime_error("no memory");
        blocks_.emplace_back(static_cast<std::byte*>(data), size);
        return blocks_.back().first(static_cast<std::size_t>(bytes));
    }

    void enqueue(int line, std::function<void()> operation) {
        lines_[line].items.push_back({std::move(operation), true, 0});
    }
    /// Work that finds the memory closed.
    void enqueue_on_host(int line, std::function<void()> body) {
        lines_[line].items.push_back({std::move(body), false, 0});
    }
    /// What `line` is given next comes after all that `other` has been given.
    void order(int line, int other) {
        lines_[line].items.push_back({[] {}, false, lines_[other].issued()});
    }

    void wait(int line) { run(line, lines_[line].issued()); }
    /// How much work a line has been given.
    [[nodiscard]] std::size_t issued(int line) const { return lines_[line].issued(); }
    [[nodiscard]] bool idle() const {
        return lines_[0].items.empty() && lines_[1].items.empty() && !lines_[0].busy && !lines_[1].busy;
    }

    /// Host access for tests: nothing may be under way.
    template <class Body>
    void open(Body&& body) {
        if (!idle()) throw std::logic_error("read while work is under way");
        protect(PROT_READ | PROT_WRITE);
        body();
        protect(PROT_NONE);
    }

    long waits = 0;                            ///< calls of memory_ops::wait
    index_t bad_token = -1;                    ///< of the last selection
    std::set<const std::byte*> scratch_of[2];  ///< what operations of each line were given

private:
    struct Item {
        std::function<void()> work;
        bool opens;
        std::size_t after;  // items of the other line that come before
    };
    struct Queue {
        std::deque<Item> items;
        std::size_t done = 0;
        bool busy = false;  // with an item that is no longer among these, and not yet done
        [[nodiscard]] std::size_t issued() const { return done + (busy ? 1 : 0) + items.size(); }
    };

    void run(int line, std::size_t until) {
        while (lines_[line].done < until) {
            if (lines_[line].busy) throw std::logic_error("lines of work that wait for each other");
            const Item item = std::move(lines_[line].items.front());
            lines_[line].items.pop_front();
            lines_[line].busy = true;
            if (item.after > 0) run(1 - line, item.after);
            if (item.opens) protect(PROT_READ | PROT_WRITE);
            item.work();
            if (item.opens) protect(PROT_NONE);
            lines_[line].busy = false;
            ++lines_[line].done;
            Queue& beside = lines_[side_line];
            while (line == main_line && side_ == Side::early && !beside.busy && !beside.items.empty() &&
                   beside.items.front().after <= lines_[main_line].done)
                run(side_line, beside.done + 1);
        }
    }
    void protect(int access) {
        for (const auto& block : blocks_) mprotect(block.data(), block.size(), access);
    }

    Side side_;
    Queue lines_[2];
    std::vector<std::span<std::byte>> blocks_;
};

struct Far {
    using space = FarSpace;
    FarMachine* machine = nullptr;
    int line = FarMachine::main_line;
    Cpu cpu = {};

    [[nodiscard]] Status check() const { return cpu.check(); }
    friend bool operator==(const Far&, const Far&) = default;

    template <class Operation>
    void enqueue(Operation operation, const std::byte* scratch = nullptr) const {
        if (scratch != nullptr) machine->scratch_of[line].insert(scratch);
        machine->enqueue(line, std::move(operation));
    }
};

/// The same tensors and bundles as the CPU's kernels see them.
template <class T, int Rank>
view<T, Rank> near(const view<T, Rank, FarSpace>& tensor) {
    return std::bit_cast<view<T, Rank>>(tensor);
}
template <class T, template <class, class> class Bundle>
Bundle<T, HostSpace> near(const Bundle<T, FarSpace>& bundle) {
    return std::bit_cast<Bundle<T, HostSpace>>(bundle);
}
inline Plan<> near(const Plan<FarSpace>& plan) { return std::bit_cast<Plan<>>(plan); }

/// A backend whose sums are work of the side line.
template <class Comm>
struct QueuedComm {
    static constexpr bool stream_ordered = true;
    const Comm* comm = nullptr;
    FarMachine* machine = nullptr;

    [[nodiscard]] int rank() const { return comm->rank(); }
    [[nodiscard]] int size() const { return comm->size(); }
    Status begin_sum(std::span<std::int64_t> words) const {
        machine->enqueue_on_host(FarMachine::side_line, [sum = *comm, words] {
            if (!sum.begin_sum(words) || !sum.end_sum(words)) throw std::runtime_error("a sum failed");
        });
        return {};
    }
    Status end_sum(std::span<std::int64_t>) const { return {}; }
};

}  // namespace steelyard::testing

namespace steelyard {

template <>
struct memory_ops<testing::Far> {
    using Far = testing::Far;
    using Space = testing::FarSpace;
    static constexpr bool asynchronous = true;

    template <class T, int Rank>
    static void fill(const Far& device, const view<T, Rank, Space>& to, std::type_identity_t<T> value) {
        device.enqueue([cpu = device.cpu, to = near(to), value] { memory_ops<Cpu>::fill(cpu, to, value); });
    }
    template <class T, int Rank>
    static void copy(const Far& device, const std::type_identity_t<view<const T, Rank, Space>>& from,
                     const view<T, Rank, Space>& to) {
        device.enqueue([cpu = device.cpu, from = near(from), to = near(to)] { memory_ops<Cpu>::copy(cpu, from, to); });
    }
    template <class T, int Rank>
    static void upload(const Far& device, const std::type_identity_t<view<const T, Rank>>& from,
                       const view<T, Rank, Space>& to) {
        device.enqueue([cpu = device.cpu, from, to = near(to)] { memory_ops<Cpu>::copy(cpu, from, to); });
    }
    static Far beside(const Far& device) { return {device.machine, testing::FarMachine::side_line, device.cpu}; }
    static Far fork(const Far& device) {
        device.machine->order(testing::FarMachine::side_line, testing::FarMachine::main_line);
        return beside(device);
    }
    static void join(const Far& device) {
        device.machine->order(testing::FarMachine::main_line, testing::FarMachine::side_line);
    }
    static void run_on_host(const Far& device, void (*body)(void*), void* argument) {
        device.machine->enqueue_on_host(device.line, [body, argument] { body(argument); });
    }
    static void wait(const Far& device) {
        ++device.machine->waits;
        device.machine->wait(device.line);
    }
};

template <>
struct router_ops<testing::Far> {
    using Far = testing::Far;
    using Space = testing::FarSpace;
    using Near = router_ops<Cpu>;

    template <class T>
    static index_t scratch_bytes(const Far& device, const LayerShape& shape) {
        return Near::scratch_bytes<T>(device.cpu, shape);
    }
    template <class T>
    static void logits(const Far& device, view<const T, 2, Space> x, view<const T, 2, Space> weight,
                       const RouterNoise& noise, view<T, 2, Space> logits, std::byte* scratch) {
        device.enqueue(
            [=, cpu = device.cpu] { Near::logits<T>(cpu, near(x), near(weight), noise, near(logits), scratch); },
            scratch);
    }
    template <class T>
    static void add_bias(const Far& device, view<const T, 1, Space> bias, view<T, 2, Space> logits) {
        device.enqueue([=, cpu = device.cpu] { Near::add_bias<T>(cpu, near(bias), near(logits)); });
    }
    template <class T>
    static index_t select(const Far& device, const SelectionRule& rule, view<const float, 1, Space> bias,
                          view<const std::uint8_t, 1, Space> mask, const Routing<T, Space>& routing,
                          std::byte* scratch) {
        device.enqueue(
            [=, cpu = device.cpu, machine = device.machine] {
                machine->bad_token = Near::select<T>(cpu, rule, near(bias), near(mask), near(routing), scratch);
            },
            scratch);
        return -1;
    }
    template <class T>
    static void take_all(const Far& device, view<const std::uint8_t, 1, Space> mask, const Routing<T, Space>& routing) {
        device.enqueue([=, cpu = device.cpu] { Near::take_all<T>(cpu, near(mask), near(routing)); });
    }
    template <class T>
    static void select_backward(const Far& device, const SelectionRule& rule, view<const std::uint8_t, 1, Space> mask,
                                const Routing<T, Space>& routing, const RoutingGrad<T, Space>& grad) {
        device.enqueue(
            [=, cpu = device.cpu] { Near::select_backward<T>(cpu, rule, near(mask), near(routing), near(grad)); });
    }
    template <class T>
    static void logits_backward(const Far& device, view<const T, 2, Space> x, view<const std::uint8_t, 1, Space> mask,
                                view<const T, 2, Space> weight, const RouterNoise& noise,
                                view<const T, 2, Space> dlogits, view<T, 2, Space> dx, view<T, 2, Space> dweight,
                                std::byte* scratch) {
        device.enqueue(
            [=, cpu = device.cpu] {
                Near::logits_backward<T>(cpu, near(x), near(mask), near(weight), noise, near(dlogits), near(dx),
                                         near(dweight), scratch);
            },
            scratch);
    }
    template <class T>
    static void bias_backward(const Far& device, view<const T, 2, Space> dlogits, view<T, 1, Space> dbias) {
        device.enqueue([=, cpu = device.cpu] { Near::bias_backward<T>(cpu, near(dlogits), near(dbias)); });
    }
};

template <>
struct plan_ops<testing::Far> {
    using Far = testing::Far;
    using Space = testing::FarSpace;
    using Near = plan_ops<Cpu>;

    static index_t scratch_bytes(const Far& device, const LayerShape& shape, int top_k) {
        return Near::scratch_bytes(device.cpu, shape, top_k);
    }
    static void make_plan(const Far& device, view<const expert_t, 2, Space> choices, const Plan<Space>& plan,
                          std::byte* scratch) {
        device.enqueue([=, cpu = device.cpu] { Near::make_plan(cpu, near(choices), near(plan), scratch); }, scratch);
    }
    template <class T>
    static void combine(const Far& device, const Plan<Space>& plan, view<const T, 2, Space> rows,
                        view<const T, 2, Space> weight, view<T, 2, Space> y, Write write = Write::assign) {
        device.enqueue(
            [=, cpu = device.cpu] { Near::combine<T>(cpu, near(plan), near(rows), near(weight), near(y), write); });
    }
};

template <>
struct expert_ops<testing::Far> {
    using Far = testing::Far;
    using Space = testing::FarSpace;
    using Near = expert_ops<Cpu>;

    /// The CPU's, and behind it a tensor [rows, hidden] that other devices keep between their products.
    template <class T>
    static index_t scratch_bytes(const Far& device, index_t rows, index_t width, index_t hidden) {
        return near_bytes<T>(device, width, hidden) + rows * hidden * static_cast<index_t>(sizeof(T));
    }
    template <class T>
    static void ffn_forward(const Far& device, const FfnFunction& function, const FfnWeights<const T, Space>& weights,
                            view<const T, 2, Space> x, const Plan<Space>& plan, const FfnKept<T, Space>& kept,
                            view<T, 2, Space> rows, std::byte* scratch) {
        device.enqueue(
            [=] {
                use_inner<T>(device, near(weights.up), near(plan), scratch);
                Near::ffn_forward<T>(device.cpu, function, near(weights), near(x), near(plan), near(kept), near(rows),
                                     scratch);
            },
            scratch);
    }
    template <class T>
    static void ffn_backward(const Far& device, const FfnFunction& function, const FfnWeights<const T, Space>& weights,
                             view<const T, 2, Space> x, const Plan<Space>& plan, const FfnKept<const T, Space>& kept,
                             view<const T, 2, Space> weight, view<const T, 2, Space> dy,
                             const FfnGradRows<T, Space>& grad_rows, view<T, 2, Space> drows, view<T, 2, Space> dweight,
                             const FfnWeights<T, Space>& grads, std::byte* scratch) {
        device.enqueue(
            [=] {
                use_inner<T>(device, near(weights.up), near(plan), scratch);
                Near::ffn_backward<T>(device.cpu, function, near(weights), near(x), near(plan), near(kept),
                                      near(weight), near(dy), near(grad_rows), near(drows), near(dweight), near(grads),
                                      scratch);
            },
            scratch);
    }

    template <class T>
    static Status ffn_check_packed(const Far&, std::string_view stage, std::string_view name,
                                   view<const std::byte, 1, Space>, index_t, index_t, index_t, bool) {
        return Status::refuse(Code::invalid_argument, stage, name, "no packed copy", "one");
    }
    static bool ffn_packed_serves(view<const std::byte, 1, Space>, PackedFor) { return false; }

private:
    template <class T>
    static index_t near_bytes(const Far& device, index_t width, index_t hidden) {
        return Near::scratch_bytes<T>(device.cpu, 0, width, hidden);
    }
    template <class T>
    static void use_inner(const Far& device, view<const T, 3> up, const Plan<>& plan, std::byte* scratch) {
        const index_t hidden = up.extents[1], width = up.extents[2];
        T* const inner = reinterpret_cast<T*>(scratch + near_bytes<T>(device, width, hidden));
        std::fill_n(inner, plan.offsets(plan.experts()) * hidden, T(-1));
    }
};

template <>
struct balance_ops<testing::Far> {
    using Far = testing::Far;
    using Space = testing::FarSpace;
    using Near = balance_ops<Cpu>;

    static index_t scratch_bytes(const Far& device, const LayerShape& shape) {
        return Near::scratch_bytes(device.cpu, shape);
    }
    template <class T, class Tally = Choices>
    static void count(const Far& device, const Observation<T, Space>& seen, view<std::int64_t, 2> load,
                      const Tally& tally, std::byte* scratch) {
        device.enqueue([=, cpu = device.cpu] { Near::count<T>(cpu, counted(seen), load, tally, scratch); }, scratch);
    }
    template <class T, class Tally = Choices>
    static void count_drawn(const Far& device, const Observation<T, Space>& seen, const TokenDraw& draw,
                            view<std::int64_t, 2> load, const Tally& tally, std::byte* scratch) {
        device.enqueue([=, cpu = device.cpu] { Near::count_drawn<T>(cpu, counted(seen), draw, load, tally, scratch); },
                       scratch);
    }
    template <class T, Quantity Q>
    static void sum_quantity(const Far& device, const Observation<T, Space>& seen, view<double, 2> sums,
                             view<std::int64_t, 1> own_tokens, std::byte* scratch) {
        device.enqueue(
            [=, cpu = device.cpu] { Near::sum_quantity<T, Q>(cpu, counted(seen), sums, own_tokens, scratch); },
            scratch);
    }
    template <class T, Quantity Q>
    static void add_quantity_gradient(const Far& device, const Observation<T, Space>& seen,
                                      view<const double, 2> coefficients, double factor,
                                      const RoutingGrad<T, Space>& grad, std::byte* scratch) {
        device.enqueue(
            [=, cpu = device.cpu] {
                Near::add_quantity_gradient<T, Q>(cpu, counted(seen), coefficients, factor, near(grad), scratch);
            },
            scratch);
    }
    template <class T, class Objective>
    static void sum_tokens(const Far& device, const Observation<T, Space>& seen, const Objective& objective,
                           view<double, 1> sum, std::byte* scratch) {
        device.enqueue([=, cpu = device.cpu] { Near::sum_tokens<T>(cpu, counted(seen), objective, sum, scratch); },
                       scratch);
    }
    template <class T, class Objective>
    static void add_token_gradient(const Far& device, const Observation<T, Space>& seen, const Objective& objective,
                                   double factor, view<T, 2, Space> dlogits, std::byte* scratch) {
        device.enqueue(
            [=, cpu = device.cpu] {
                Near::add_token_gradient<T>(cpu, counted(seen), objective, factor, near(dlogits), scratch);
            },
            scratch);
    }

private:
    /// With the number of valid tokens that the host did not know.
    template <class T>
    static Observation<T> counted(const Observation<T, Space>& seen) {
        auto known = std::bit_cast<Observation<T>>(seen);
        if (known.valid_tokens < 0) {
            known.valid_tokens = 0;
            for (index_t t = 0; t < known.count(); ++t) known.valid_tokens += known.valid(t);
        }
        return known;
    }
};

}  // namespace steelyard
