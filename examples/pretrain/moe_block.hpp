// What the transformer asks of a mixture-of-experts block: one virtual call around a layer of the library, so
// that the balance strategy, a compile-time choice there, is a run-time choice here.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "steelyard/core/routing.hpp"
#include "steelyard/core/status.hpp"
#include "steelyard/core/step.hpp"
#include "steelyard/core/view.hpp"

namespace pretrain {

using steelyard::index_t;
using steelyard::Status;
using steelyard::view;

/// One named tensor inside a block of parameters (or of gradients, or of moments: all have one layout).
template <class T>
struct Tensor {
    std::string name;
    T* data = nullptr;
    std::vector<index_t> shape;

    [[nodiscard]] index_t size() const {
        index_t n = 1;
        for (const index_t extent : shape) n *= extent;
        return n;
    }
};

/// Where a call stands in training, and how its tokens fall into sequences.
template <class Space = steelyard::HostSpace>
struct BlockCall {
    view<const index_t, 1, Space> sequences;  // [S + 1] offsets, 0 .. T
    view<const std::int32_t, 1> ids;          // [T] bytes or domains, for routers that ask: on the CPU
    steelyard::StepInfo step;
    steelyard::Mode mode = steelyard::Mode::train;
};

/// What the routers of two layers hand on, where they do: the logits of the layer before, and gradients by logits.
template <class T, class Space = steelyard::HostSpace>
struct HandedOn {
    view<const T, 2, Space> prior = {};    // [T, E]  logits of the layer before
    view<T, 2, Space> dprior = {};         // [T, E]  gradient by them: written (=)
    view<const T, 2, Space> dlogits = {};  // [T, E]  gradient by this layer's logits, from the layer after
};

/// A layer y = moe(x). It owns its context and its balance state; parameters, their gradients and the
/// workspace are the transformer's, in its device's memory.
///
/// On a device that works in its own time, calls enqueue: what is asked of the last forward is there once the device has
/// come so far.
template <class T, class Space = steelyard::HostSpace>
class MoeBlock {
public:
    virtual ~MoeBlock() = default;

    [[nodiscard]] virtual index_t param_bytes() const = 0;
    [[nodiscard]] virtual index_t workspace_bytes() const = 0;
    /// The tensors in a block of `param_bytes()` bytes.
    [[nodiscard]] virtual std::vector<Tensor<T>> tensors(std::byte* params) const = 0;

    /// Before a forward with other values in `params`: a block that computes in other elements makes its copy.
    virtual void take_params(const std::byte* /*params*/) {}
    /// Writes y (=).
    virtual Status forward(view<const T, 2, Space> x,               // [T, d]
                           std::byte* params, view<T, 2, Space> y,  // [T, d]
                           std::span<std::byte> workspace, const BlockCall<Space>& call,
                           const HandedOn<T, Space>& handed = {}) = 0;
    /// Writes dx (=) and adds to the gradients (+=), the balance loss's part included.
    virtual Status backward(view<const T, 2, Space> x,                      // [T, d]
                            std::byte* params, view<const T, 2, Space> dy,  // [T, d]
                            view<T, 2, Space> dx,                           // [T, d]
                            std::byte* grads, std::span<std::byte> workspace, const BlockCall<Space>& call,
                            const HandedOn<T, Space>& handed = {}) = 0;
    /// Of the last forward: what the next layer's router hears; absent where it hears nothing.
    [[nodiscard]] virtual view<const T, 2, Space> logits_to_hand_on() const = 0;  // [T, E]
    /// Once after every optimizer step.
    virtual Status end_step(const steelyard::StepInfo& step, std::span<std::byte> workspace) = 0;

    // Of the last forward. Both losses are shares of the global batch's: they add up over ranks and micro-steps.
    /// All that is minimised beside the cross entropy: balance loss and z-loss with their coefficients.
    [[nodiscard]] virtual double total_balance_loss() const = 0;
    /// The strategy's balance loss alone, without its coefficient: 1 at perfect balance.
    [[nodiscard]] virtual double balance_loss() const = 0;
    /// Choices of the router, dropped ones included: what balance sees.
    [[nodiscard]] virtual std::span<const std::int64_t> tokens_per_expert() = 0;   // [E]
    [[nodiscard]] virtual view<const steelyard::expert_t, 2> choices() const = 0;  // [T, K]
    /// The same, with -1 for what found no place.
    [[nodiscard]] virtual view<const std::int32_t, 2> taken() const = 0;           // [T, K]

    /// What balance remembers between steps: part of a checkpoint.
    [[nodiscard]] virtual std::span<std::byte> state() = 0;
};

}  // namespace pretrain
