// Router kernels of the CUDA device: which are launched for what.
#pragma once

#include <algorithm>
#include <type_traits>

#include "steelyard/core/layout.hpp"
#include "steelyard/cuda/kernels/router_rows.cuh"
#include "steelyard/cuda/kernels/select.cuh"
#include "steelyard/cuda/product.cuh"
#include "steelyard/cuda/router.hpp"

namespace steelyard {

namespace cuda {

constexpr int row_threads = 256, warps_of_block = 4;

/// What the router's products need beside their operands. A gradient of the logits is float, and x and the weights may
/// be bf16: it is split in two bf16, high and low, whose products with them are summed in float.
template <class T>
struct RouterScratch {
    static constexpr bool splits = !std::is_same_v<T, float>;
    static constexpr index_t block = 4096;  // tokens that are copied at once

    view<T, 2, CudaSpace> x;            // [block, d]  with its jitter or without masked rows; or its gradient
    view<T, 2, CudaSpace> parts;        // [T, 2 E]    high and low, side by side
    view<T, 2, CudaSpace> weight;       // [2 E, d]    the weights for each
    view<float, 2, CudaSpace> dweight;  // [2 E, d]   their gradients from each
    template <class Field>
    void fields(Field&& field, index_t tokens, index_t width, index_t experts) {
        field("x", x, std::min(tokens, block), width);
        field("parts", parts, splits ? tokens : 0, 2 * experts);
        field("weight", weight, splits ? 2 * experts : 0, width);
        field("dweight", dweight, splits ? 2 * experts : 0, width);
    }
};

/// body(first token, rows, noise of these) for the tokens that are copied at once.
template <class T, class Body>
void each_block(index_t tokens, const RouterNoise& noise, Body&& body) {
    for (index_t begin = 0; begin < tokens; begin += RouterScratch<T>::block) {
        RouterNoise own = noise;
        own.step.token_offset += begin;
        body(begin, std::min(RouterScratch<T>::block, tokens - begin), own);
    }
}

template <class T>
void copy_rows(const Cuda& device, view<const T, 2, CudaSpace> from, const std::uint8_t* mask, const RouterNoise& noise,
               view<T, 2, CudaSpace> to) {
    const index_t tokens = from.extents[0], width = from.extents[1];
    copy_input<T><<<blocks_for(tokens * ((width + 3) / 4), row_threads), row_threads, 0, device.stream>>>(
        matrix_of(from), mask, noise, tokens, width, matrix_of(to));
    check_call(cudaGetLastError(), "copy_input");
}

inline SelectCall select_call(const Cuda& device, const SelectionRule& rule, view<const float, 1, CudaSpace> bias,
                              view<const std::uint8_t, 1, CudaSpace> mask, const Routing<float, CudaSpace>& routing) {
    SelectCall call{RuleOf(rule),
                    routing.logits.extents[0],
                    static_cast<int>(routing.logits.extents[1]),
                    bias.data,
                    mask.data,
                    matrix_of(routing.logits),
                    matrix_of(routing.probs),
                    matrix_of(routing.weight),
                    matrix_of(routing.expert),
                    reinterpret_cast<unsigned long long*>(device.faults + CudaFaults::bad_logits)};
    call.rule.top_k = static_cast<int>(routing.expert.extents[1]);
    return call;
}

template <bool choose>
void launch_select(const Cuda& device, const SelectCall& call) {
    if (call.tokens == 0) return;
    if (choose && call.rule.kept_groups < call.rule.groups && call.rule.groups > 32)
        throw Error(Status::refuse(Code::invalid_argument, "router", "groups", "at most 32 on the CUDA device",
                                   std::to_string(call.rule.groups)));
    const bool grouped = choose && call.rule.kept_groups < call.rule.groups;
    const auto shared = grouped ? warps_of_block * static_cast<std::size_t>(call.experts) * sizeof(float) : 0;
    const auto launch = [&](auto slots) {
        select_tokens<slots.value, choose>
            <<<blocks_for(call.tokens, warps_of_block), 32 * warps_of_block, shared, device.stream>>>(call);
        check_call(cudaGetLastError(), "select_tokens");
    };
    const int slots = (call.experts + 31) / 32;
    if (slots <= 1)
        launch(std::integral_constant<int, 1>{});
    else if (slots <= 2)
        launch(std::integral_constant<int, 2>{});
    else if (slots <= 4)
        launch(std::integral_constant<int, 4>{});
    else if (slots <= 8)
        launch(std::integral_constant<int, 8>{});
    else if (slots <= 16)
        launch(std::integral_constant<int, 16>{});
    else if (slots <= 32)
        launch(std::integral_constant<int, 32>{});
    else
        throw Error(Status::refuse(Code::invalid_argument, "router", "experts", "at most 1024 on the CUDA device",
                                   std::to_string(call.experts)));
}

}  // namespace cuda

template <class T>
index_t router_ops<Cuda>::scratch_bytes(const Cuda&, const LayerShape& shape) {
    return bytes_of<cuda::RouterScratch<T>>(shape.tokens, shape.width, shape.experts);
}

template <class T>
void router_ops<Cuda>::logits(const Cuda& device, view<const T, 2, CudaSpace> x, view<const T, 2, CudaSpace> weight,
                              const RouterNoise& noise, view<gate_t<T>, 2, CudaSpace> logits, std::byte* scratch) {
    const index_t tokens = x.extents[0], width = x.extents[1], experts = weight.extents[0];
    if (tokens == 0) return;
    const auto product = [&](view<const T, 2, CudaSpace> rows, index_t begin) {
        using cuda::Turn;
        constexpr index_t few = 16;
        if (tokens <= few && cuda::takes_packs<T>(width, rows, weight)) {
            constexpr int pack = cuda::whole_pack<T>;
            cuda::multiply_few<T, pack><<<cuda::blocks_for(tokens * experts, 8), 256, 0, device.stream>>>(
                cuda::matrix_of(rows), cuda::matrix_of(weight), tokens, static_cast<int>(experts),
                static_cast<int>(width), cuda::matrix_of(logits));
            return cuda::check_call(cudaGetLastError(), "multiply_few");
        }
        cuda::multiply<Turn::no, Turn::yes, T, float>(
            device, rows.extents[0], experts, width, cuda::matrix_of(rows), cuda::matrix_of(weight),
            cuda::matrix_of(logits.slice(begin, begin + rows.extents[0])), Write::assign);
    };
    if (noise.jitter == 0.0) {
        product(x, 0);
    } else {
        const auto own = place<cuda::RouterScratch<T>>(scratch, tokens, width, experts);
        cuda::each_block<T>(tokens, noise, [&](index_t begin, index_t rows, const RouterNoise& of_rows) {
            const auto copy = own.x.slice(0, rows);
            cuda::copy_rows<T>(device, x.slice(begin, begin + rows), nullptr, of_rows, copy);
            product(copy, begin);
        });
    }
    if (noise.noise == 0.0) return;
    cuda::add_logit_noise<<<cuda::blocks_for(tokens * ((experts + 3) / 4), cuda::row_threads), cuda::row_threads, 0,
                            device.stream>>>(noise, tokens, experts, cuda::matrix_of(logits));
    cuda::check_call(cudaGetLastError(), "add_logit_noise");
}

template <class T>
void router_ops<Cuda>::add_bias(const Cuda& device, view<const T, 1, CudaSpace> bias,
                                view<gate_t<T>, 2, CudaSpace> logits) {
    const index_t tokens = logits.extents[0], experts = logits.extents[1];
    if (tokens == 0) return;
    cuda::add_expert_bias<T>
        <<<cuda::blocks_for(tokens * experts, cuda::row_threads), cuda::row_threads, 0, device.stream>>>(
            bias.data, bias.strides[0], tokens, experts, cuda::matrix_of(logits));
    cuda::check_call(cudaGetLastError(), "add_expert_bias");
}

template <class T>
void router_ops<Cuda>::bias_backward(const Cuda& device, view<const gate_t<T>, 2, CudaSpace> dlogits,
                                     view<T, 1, CudaSpace> dbias) {
    if (dlogits.extents[0] == 0) return;
    cuda::add_sum_over_tokens<T><<<static_cast<unsigned>(dlogits.extents[1]), 256, 0, device.stream>>>(
        cuda::matrix_of(dlogits), dlogits.extents[0], dbias.data, dbias.strides[0]);
    cuda::check_call(cudaGetLastError(), "add_sum_over_tokens");
}

template <class T>
void router_ops<Cuda>::logits_backward(const Cuda& device, view<const T, 2, CudaSpace> x,
                                       view<const std::uint8_t, 1, CudaSpace> mask, view<const T, 2, CudaSpace> weight,
                                       const RouterNoise& noise, view<const gate_t<T>, 2, CudaSpace> dlogits,
                                       view<T, 2, CudaSpace> dx, view<T, 2, CudaSpace> dweight, std::byte* scratch) {
    const index_t tokens = x.extents[0], width = x.extents[1], experts = dlogits.extents[1];
    if (tokens == 0) return;
    using cuda::Turn;
    const auto own = place<cuda::RouterScratch<T>>(scratch, tokens, width, experts);
    view<const T, 2, CudaSpace> slopes, factors = weight;  // of dx = slopes factors
    if constexpr (cuda::RouterScratch<T>::splits) {
        cuda::split_gradient<<<cuda::blocks_for(tokens * experts, cuda::row_threads), cuda::row_threads, 0,
                               device.stream>>>(cuda::matrix_of(dlogits), tokens, experts, cuda::matrix_of(own.parts));
        cuda::check_call(cudaGetLastError(), "split_gradient");
        slopes = own.parts;
        if (dx.present()) {
            for (const index_t half : {index_t{0}, experts})
                cuda::copy_rows<T>(device, weight, nullptr, {}, own.weight.slice(half, half + experts));
            factors = own.weight;
        }
    } else {
        slopes = dlogits;
    }
    const index_t terms = slopes.extents[1];
    if (dx.present() && noise.jitter == 0.0) {
        cuda::multiply<Turn::no, Turn::no, T, T>(device, tokens, width, terms, cuda::matrix_of(slopes),
                                                 cuda::matrix_of(factors), cuda::matrix_of(dx), Write::add);
    } else if (dx.present()) {
        cuda::each_block<T>(tokens, noise, [&](index_t begin, index_t rows, const RouterNoise& of_rows) {
            cuda::multiply<Turn::no, Turn::no, T, T>(device, rows, width, terms,
                                                     cuda::matrix_of(slopes.slice(begin, begin + rows)),
                                                     cuda::matrix_of(factors), cuda::matrix_of(own.x), Write::assign);
            cuda::add_input_gradient<T>
                <<<cuda::blocks_for(rows * ((width + 3) / 4), cuda::row_threads), cuda::row_threads, 0,
                   device.stream>>>(cuda::matrix_of(view<const T, 2, CudaSpace>(own.x)), of_rows, rows, width,
                                    cuda::matrix_of(dx.slice(begin, begin + rows)));
            cuda::check_call(cudaGetLastError(), "add_input_gradient");
        });
    }
    if (!dweight.present()) return;
    const auto add_product = [&](index_t begin, view<const T, 2, CudaSpace> rows) {
        const index_t count = rows.extents[0];
        const auto given = cuda::matrix_of(slopes.slice(begin, begin + count));
        if constexpr (cuda::RouterScratch<T>::splits)
            cuda::multiply<Turn::yes, Turn::no, T, float>(device, terms, width, count, given, cuda::matrix_of(rows),
                                                          cuda::matrix_of(own.dweight),
                                                          begin == 0 ? Write::assign : Write::add);
        else
            cuda::multiply<Turn::yes, Turn::no, T, T>(device, terms, width, count, given, cuda::matrix_of(rows),
                                                      cuda::matrix_of(dweight), Write::add);
    };
    if (mask.present() || noise.jitter != 0.0) {  // padding may hold anything: 0 times it is not 0
        cuda::each_block<T>(tokens, noise, [&](index_t begin, index_t rows, const RouterNoise& of_rows) {
            const auto copy = own.x.slice(0, rows);
            cuda::copy_rows<T>(device, x.slice(begin, begin + rows), mask.present() ? mask.data + begin : nullptr,
                               of_rows, copy);
            add_product(begin, copy);
        });
    } else {
        add_product(0, x);
    }
    if constexpr (cuda::RouterScratch<T>::splits) {
        cuda::add_halves<T>
            <<<cuda::blocks_for(experts * width, cuda::row_threads), cuda::row_threads, 0, device.stream>>>(
                cuda::matrix_of(view<const float, 2, CudaSpace>(own.dweight)), experts, width,
                cuda::matrix_of(dweight));
        cuda::check_call(cudaGetLastError(), "add_halves");
    }
}

template <class G>
index_t router_ops<Cuda>::select(const Cuda& device, const SelectionRule& rule, view<const float, 1, CudaSpace> bias,
                                 view<const std::uint8_t, 1, CudaSpace> mask, const RoutingOf<G>& routing, std::byte*) {
    cuda::launch_select<true>(device, cuda::select_call(device, rule, bias, mask, routing));
    return -1;
}

template <class G>
index_t router_ops<Cuda>::weigh(const Cuda& device, const SelectionRule& rule,
                                view<const std::uint8_t, 1, CudaSpace> mask, const RoutingOf<G>& routing, std::byte*) {
    cuda::launch_select<false>(device, cuda::select_call(device, rule, {}, mask, routing));
    return -1;
}

template <class G>
void router_ops<Cuda>::take_all(const Cuda& device, view<const std::uint8_t, 1, CudaSpace> mask,
                                const RoutingOf<G>& routing) {
    const index_t tokens = routing.logits.extents[0], experts = routing.logits.extents[1];
    if (tokens == 0) return;
    cuda::take_all_experts<<<cuda::blocks_for(tokens * experts, cuda::row_threads), cuda::row_threads, 0,
                             device.stream>>>(mask.data, tokens, experts, cuda::matrix_of(routing.logits),
                                              cuda::matrix_of(routing.probs), cuda::matrix_of(routing.expert),
                                              cuda::matrix_of(routing.weight));
    cuda::check_call(cudaGetLastError(), "take_all_experts");
}

template <class G>
void router_ops<Cuda>::select_backward(const Cuda& device, const SelectionRule& rule,
                                       view<const std::uint8_t, 1, CudaSpace> mask, const RoutingOf<G>& routing,
                                       const RoutingGrad<G, CudaSpace>& grad) {
    const cuda::SelectCall call = cuda::select_call(device, rule, {}, mask, routing);
    if (call.tokens == 0) return;
    cuda::select_gradient<<<cuda::blocks_for(call.tokens, cuda::warps_of_block), 32 * cuda::warps_of_block, 0,
                            device.stream>>>(
        call, {cuda::matrix_of(grad.weight), cuda::matrix_of(grad.probs), cuda::matrix_of(grad.logits)});
    cuda::check_call(cudaGetLastError(), "select_gradient");
}

}  // namespace steelyard
