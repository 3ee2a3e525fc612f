// Memory of a layer on a device that works in its own time: what is the host's, what is the device's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include "steelyard/layer/memory.hpp"
#include "steelyard/layer/sum_head.hpp"

namespace steelyard {

/// The bundles of such a layer. `Types` is a LayerTypes; its own bundles hold what is the device's.
template <class Types>
struct QueuedTypes {
    using Space = typename Types::Space;
    using BalanceT = typename Types::Balance;
    using DeviceT = typename Types::Device;
    using State = typename Types::State;
    using Workspace = typename Types::Workspace;
    using Seen = Observation<typename Types::Gate, Space>;
    using Record = typename BalanceT::template Record<>;

    /// What the host does between the counts and the slopes. It lies in the context until it has run.
    struct Conclusion {
        BalanceT balance;
        Seen seen;
        State state;
        Record record;
        view<std::int64_t, 1> wire;  // where the counts go
        view<std::int64_t, 1> sum;   // where their sum will be: there too, unless a stack's caller says otherwise
        std::int64_t key = 0;
        std::int64_t* pending = nullptr;
        std::int64_t* refused = nullptr;
        bool summing = false;
        LayerShape shape;

        static void post(void* self) {
            const auto& of = *static_cast<Conclusion*>(self);
            std::fill_n(of.wire.data, of.wire.size(), std::int64_t{0});
            SumHead::write(of.wire, of.key, false);
            Wire<> words = behind_head(of.wire);
            of.balance.post(of.seen, of.state.balance, of.record, words);
        }
        static void conclude(void* self) {
            const auto& of = *static_cast<Conclusion*>(self);
            const Code code = of.verdict();
            *of.refused = static_cast<std::int64_t>(code);
            Wire<> words = of.summing ? behind_head(of.sum) : Wire<>();
            if (code == Code::ok)
                of.balance.conclude(of.seen, of.state.balance, of.record, words);
            else
                of.spoil();
            std::atomic_ref<std::int64_t>(*of.pending).store(0, std::memory_order_release);
        }
        /// Of the sum; or, where the call counts on one that was enqueued before, whether that one has come.
        [[nodiscard]] Code verdict() const {
            if constexpr (BalanceT::communicates) {
                const StepInfo& at = seen.tokens.step;
                if (!summing) return balance.exchanges(state.balance, at) ? Code::rank_refused : Code::ok;
                const Status summed = SumHead::check("layer.forward", sum);
                if (!summed) state.enqueued.withdraw(at);
                return summed.code();
            }
            return Code::ok;
        }
        /// Without a sum there are no slopes: a backward that is enqueued already shall not pass for one with them.
        void spoil() const {
            Record all = record;
            const auto fill = [](const auto&, const auto& tensor) {
                using Number = typename std::decay_t<decltype(tensor)>::value_type;
                if constexpr (std::is_same_v<Number, double>)
                    std::fill_n(tensor.data, tensor.size(), std::numeric_limits<double>::quiet_NaN());
            };
            for_each_tensor(all, fill, balance, shape);
        }
        static Wire<> behind_head(view<std::int64_t, 1> wire) {
            return Wire<>(wire.slice(SumHead::words, wire.extents[0]));
        }
    };
    static_assert(std::is_trivially_destructible_v<Conclusion>,
                  "steelyard: a balance policy on such a device is a value without a destructor of its own");

    /// The host's part of a context.
    struct HostContext {
        view<CallInfo, 1> call;          // [1]
        view<std::int64_t, 1> pending;   // [1]  1 from the call until its conclusion has run
        view<std::int64_t, 1> refused;   // [1]  a Code: what the sum answered
        view<Conclusion, 1> conclusion;  // [1]
        Record balance;
        template <class Field>
        void fields(Field&& field, const typename Types::Dims& dims) {
            field("call", call, index_t{1});
            field("pending", pending, index_t{1});
            field("refused", refused, index_t{1});
            field("conclusion", conclusion, index_t{1});
            field.group("balance", balance, dims.balance, dims.shape);
        }
    };
    struct HostWorkspace {
        view<std::int64_t, 1> wire;            // [words]
        view<std::int64_t, 1> tokens_of_rank;  // [R]  for scopes that draw over ranks
        template <class Field>
        void fields(Field&& field, const typename Types::Dims& dims) {
            field("wire", wire, std::max(dims.wire_words(), dims.step_words()));
            if constexpr (BalanceT::needs_rank_tokens) field("tokens_of_rank", tokens_of_rank, dims.shape.ranks);
        }
    };
    /// The device's part of a workspace: what is used beside the experts has memory of its own.
    struct DeviceWorkspace {
        Workspace main;
        view<std::byte, 1, Space> beside;  // of the statistics
        view<float, 1, Space> bias;        // [E]
        template <class Field>
        void fields(Field&& field, const typename Types::Dims& dims, const DeviceT& device) {
            field.group("", main, dims);
            field("beside", beside, balance_ops<DeviceT>::scratch_bytes(device, dims.shape));
            if constexpr (BalanceT::has_bias) field("bias", bias, dims.shape.experts);
        }
    };
};

}  // namespace steelyard
