// A layer of the library on the GPU behind the transformer's MoeBlock.
//
// The transformer is of float. A layer of bf16 reads copies in bf16, of its tokens and of the parameters, whose float
// originals are the optimizer's; and what it writes is widened: outputs, and gradients, which are added in float.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "gpu_ops.hpp"
#include "pretrain/moe_block_of.hpp"
#include "pretrain/strategies_table.hpp"
#include "steelyard/cuda.hpp"
#include "strategies.hpp"

namespace pretrain {

template <class Element, class Main>
class CudaBlockOf final : public CudaBlock {
    using Cuda = steelyard::Cuda;
    using Space = steelyard::CudaSpace;
    using Layer = steelyard::MoE<Element, steelyard::TopK, steelyard::SwiGlu, BalanceWith<Main>, AnyComm,
                                 steelyard::Dropless, steelyard::KeepActivations, Cuda>;
    /// How parameters lie in float: as on the CPU, so that a checkpoint is of both.
    using Master = steelyard::MoE<float, steelyard::TopK, steelyard::SwiGlu>;
    static constexpr bool casts = !std::is_same_v<Element, float>;

public:
    /// `unit` is what the main part's reported loss is divided by: its coefficient.
    CudaBlockOf(const Gpu& gpu, const Settings& s, int layer, const AnyComm& comm, const Main& main, double unit)
        : gpu_(gpu),
          layer_({.shape = layer_shape(s),
                  .router = std::get<steelyard::TopK>(make_router(s).held),
                  .expert = {.hidden = s.hidden},
                  .balance = balance_with(main, s),
                  .device = gpu.cuda(),
                  .layer = static_cast<std::uint32_t>(layer)}),
          master_({.shape = layer_shape(s), .router = layer_.config().router, .expert = {.hidden = s.hidden}}),
          comm_(comm),
          unit_(unit),
          context_host_(layer_.context_bytes().host),
          context_device_(layer_.context_bytes().device),
          workspace_host_(layer_.workspace_bytes().host),
          state_(layer_.state_bytes()),
          chosen_(layer_.shape().tokens * layer_.config().router.k * index_t{sizeof(steelyard::expert_t)}),
          load_(static_cast<std::size_t>(s.experts)) {
        steelyard::throw_if_refused(layer_.check());
        steelyard::throw_if_refused(layer_.init_state(state_.span()));
        if constexpr (casts) {
            const index_t rows = layer_.shape().tokens * layer_.shape().width * index_t{sizeof(Element)};
            for (GpuBytes* of : {&x_, &in_, &out_}) *of = GpuBytes(rows);
            for (GpuBytes* of : {&params_, &grads_}) *of = GpuBytes(layer_.param_bytes());
            find_twins();
        }
    }

    index_t param_bytes() const override { return master_.param_bytes(); }
    index_t workspace_bytes() const override { return layer_.workspace_bytes().device; }

    std::vector<Tensor<float>> tensors(std::byte* block) const override {
        std::vector<Tensor<float>> all;
        auto params = master_.place_params(block);
        master_.each_param(params, [&]<int Rank>(const std::string& name, const view<float, Rank>& v) {
            all.push_back({name, v.data, std::vector<index_t>(v.extents, v.extents + Rank)});
        });
        return all;
    }

    void take_params(const std::byte* params) override {
        if constexpr (casts) narrow(gpu_, twins(const_cast<std::byte*>(params), params_));
    }

    Status forward(view<const float, 2, Space> x, std::byte* params, view<float, 2, Space> y,
                   std::span<std::byte> workspace, const BlockCall<Space>& call,
                   const HandedOn<float, Space>& = {}) override {
        step_ = call.step;
        // No mask: there is no padding.
        const steelyard::TokenInfo<Space> tokens{{}, call.sequences, call.step, call.mode, {}};
        const index_t count = x.extents[0];
        view<const Element, 2, Space> x_of_layer;
        view<Element, 2, Space> y_of_layer;
        if constexpr (casts) {
            narrow(gpu_, twin(x, rows(x_, count)));
            x_of_layer = rows(x_, count), y_of_layer = rows(out_, count);
        } else {
            x_of_layer = x, y_of_layer = y;
        }
        Status status = layer_.forward(comm_, {.x = x_of_layer,
                                               .params = layer_.read_only_params(layer_.place_params(own(params))),
                                               .y = y_of_layer,
                                               .context = context(),
                                               .workspace = {workspace_host_.span(), workspace},
                                               .state = state_.span(),
                                               .tokens = tokens});
        if (!status) return status;
        if constexpr (casts) widen(gpu_, twin(y, y_of_layer));
        count_ = count;
        steelyard::memory_ops<Cuda>::copy(gpu_.cuda(), layer_.routing(context()).expert, chosen());
        return {};
    }

    Status backward(view<const float, 2, Space> x, std::byte* params, view<const float, 2, Space> dy,
                    view<float, 2, Space> dx, std::byte* grads, std::span<std::byte> workspace, const BlockCall<Space>&,
                    const HandedOn<float, Space>& = {}) override {
        const index_t count = x.extents[0];
        typename Layer::BackwardArgs args;
        args.params = layer_.read_only_params(layer_.place_params(own(params)));
        args.context = context();
        args.workspace = {workspace_host_.span(), workspace};
        if constexpr (casts) {
            narrow(gpu_, twin(dy, rows(in_, count)));
            args.x = rows(x_, count), args.dy = rows(in_, count), args.dx = rows(out_, count);
            args.grads = layer_.place_params(grads_.data());
        } else {
            args.x = x, args.dy = dy, args.dx = dx;
            args.grads = layer_.place_params(grads);
        }
        if (Status status = layer_.backward(args); !status) return status;
        if constexpr (casts) {
            widen(gpu_, twin(dx, args.dx));
            drain(gpu_, twins(grads, grads_));
        }
        return {};
    }

    Status end_step(const steelyard::StepInfo& step, std::span<std::byte> workspace) override {
        return layer_.end_step(comm_, step.step, state_.span(), {workspace_host_.span(), workspace});
    }

    double total_balance_loss() const override { return layer_.balance_loss(context()); }
    double balance_loss() const override {
        steelyard::throw_if_refused(layer_.summed(context()));
        return main_loss(layer_.config().balance, layer_.balance_record(context()), step_) / unit_;
    }

    std::span<const std::int64_t> tokens_per_expert() override {
        count_choices(choices(), load_);
        return load_;
    }
    view<const steelyard::expert_t, 2> choices() const override { return chosen(); }
    view<const std::int32_t, 2> taken() const override { return chosen(); }  // nothing is dropped
    view<const float, 2, Space> logits_to_hand_on() const override { return {}; }

    std::span<std::byte> state() override { return state_.span(); }

private:
    [[nodiscard]] steelyard::QueuedBlock context() const { return {context_host_.span(), context_device_.span()}; }
    [[nodiscard]] view<steelyard::expert_t, 2> chosen() const {
        return {reinterpret_cast<steelyard::expert_t*>(chosen_.data()), count_, layer_.config().router.k};
    }
    [[nodiscard]] view<Element, 2, Space> rows(const GpuBytes& of, index_t count) const {
        return {reinterpret_cast<Element*>(of.data()), count, layer_.shape().width};
    }
    /// Where the layer's own parameters lie.
    [[nodiscard]] std::byte* own(std::byte* params) const { return casts ? params_.data() : params; }

    template <class Wide>
    static Twins twin(view<Wide, 2, Space> wide, view<Element, 2, Space> narrow_one) {
        Twins one{.count = 1};
        one.of[0] = {const_cast<float*>(wide.data), narrow_one.data, wide.size()};
        return one;
    }
    /// The tensors of a block in float and of one in bf16.
    [[nodiscard]] Twins twins(std::byte* wide, const GpuBytes& narrow_block) const {
        Twins all{.count = static_cast<int>(places_.size())};
        for (std::size_t i = 0; i < places_.size(); ++i)
            all.of[i] = {reinterpret_cast<float*>(wide + places_[i].wide),
                         reinterpret_cast<Element*>(narrow_block.data() + places_[i].narrow), places_[i].size};
        return all;
    }
    void find_twins() {
        std::byte* const base = params_.data();  // of either: only distances from it are kept
        auto wide = master_.place_params(base);
        master_.each_param(wide, [&]<int Rank>(const std::string&, const view<float, Rank>& v) {
            places_.push_back({reinterpret_cast<std::byte*>(v.data) - base, 0, v.size()});
        });
        auto narrow_one = layer_.place_params(base);
        std::size_t at = 0;
        layer_.each_param(narrow_one, [&]<int Rank>(const std::string&, const view<Element, Rank, Space>& v) {
            places_.at(at++).narrow = reinterpret_cast<std::byte*>(v.data) - base;
        });
        if (at != places_.size() || at > std::size_t{Twins::most})
            throw std::logic_error("a layer of bf16 has other tensors than one of float");
    }

    struct Place {
        std::ptrdiff_t wide, narrow;  // bytes from the begin of a block
        index_t size;
    };

    Gpu gpu_;
    Layer layer_;
    Master master_;
    AnyComm comm_;
    double unit_;
    PinnedBytes context_host_;
    GpuBytes context_device_;
    PinnedBytes workspace_host_, state_;
    PinnedBytes chosen_;       // [T, K]
    GpuBytes x_, in_, out_;    // [T, d]  in bf16: tokens, dy, y or dx
    GpuBytes params_, grads_;  // in bf16
    std::vector<Place> places_;
    std::vector<std::int64_t> load_;  // [E]
    steelyard::StepInfo step_;
    index_t count_ = 0;
};

template <class Element>
std::unique_ptr<CudaBlock> make_cuda_block(const Gpu& gpu, const Settings& s, Strategy strategy, int layer,
                                           const AnyComm& comm) {
    return with_strategy(
        s, strategy,
        [&]<class Main>(const Main& main,
                        double unit) -> std::unique_ptr<CudaBlock> requires(!Main::needs_rank_tokens) {
            return std::make_unique<CudaBlockOf<Element, Main>>(gpu, s, layer, comm, main, unit);
        });
}

}  // namespace pretrain
