// The operations of gpu_ops.hpp, compiled: which kernels are launched for what.
#include <algorithm>
#include <cmath>

#include "attention.cuh"
#include "gpu_ops.hpp"
#include "kernels.cuh"
#include "steelyard/cuda/product.cuh"

namespace pretrain {

using steelyard::bf16;
using steelyard::Write;
using steelyard::cuda::check_call;
using steelyard::cuda::matrix_of;
using steelyard::cuda::multiply;
using steelyard::cuda::Turn;

namespace {

using Bytes = far<const std::uint8_t, 1>;

template <class... Params>
void launch(const Gpu& gpu, const char* name, dim3 grid, int threads, void (*kernel)(Params...),
            std::type_identity_t<Params>... arguments) {
    if (grid.x == 0 || grid.y == 0) return;
    kernel<<<grid, static_cast<unsigned>(threads), 0, gpu.cuda().stream>>>(arguments...);
    check_call(cudaGetLastError(), name);
}

/// Blocks of 256 threads, one thread for each number.
dim3 each(index_t count) { return {steelyard::cuda::blocks_for(count, 256)}; }
/// Blocks of eight warps, one warp for each row.
dim3 each_row(index_t rows) { return each(32 * rows); }

std::shared_ptr<CUevent_st> make_event() {
    cudaEvent_t event = nullptr;
    check_call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    return {event, [](cudaEvent_t done) { cudaEventDestroy(done); }};
}

}  // namespace

Gpu::Gpu()
    : resources_(std::make_shared<steelyard::CudaResources>()), cuda_(resources_->device()), mark_(make_event()) {}

// ---- host.hpp -------------------------------------------------------------------------------------------

Bytes brought(const Gpu& gpu, view<const std::uint8_t, 1> given, far<std::uint8_t, 1> room) {
    const auto here = room.slice(0, given.extents[0]);
    if (given.size() > 0)
        check_call(cudaMemcpyAsync(here.data, given.data, static_cast<std::size_t>(given.size()), cudaMemcpyDefault,
                                   gpu.cuda().stream),
                   "cudaMemcpyAsync");
    return here;
}
template <class T, int Rank>
void upload(const Gpu&, view<const T, Rank> from, far<T, Rank> to) {
    if (to.size() > 0)
        check_call(cudaMemcpy(to.data, from.data, static_cast<std::size_t>(to.size()) * sizeof(T), cudaMemcpyDefault),
                   "cudaMemcpy");
    check_call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // a copy may return before it has arrived
}

template <class T>
void add(const Gpu& gpu, far<const T, 2> a, far<const T, 2> b, far<T, 2> sum) {
    launch(gpu, "add", each(sum.size()), 256, kernels::add<T>, a.data, b.data, sum.size(), sum.data);
}

namespace {

void clear_bytes(const Gpu& gpu, void* data, std::size_t bytes) {
    if (bytes > 0) check_call(cudaMemsetAsync(data, 0, bytes, gpu.cuda().stream), "cudaMemsetAsync");
}

}  // namespace

template <class T>
void clear(const Gpu& gpu, far<T, 2> all) {
    clear_bytes(gpu, all.data, static_cast<std::size_t>(all.size()) * sizeof(T));
}
void clear(const Gpu& gpu, const GpuBytes& memory) {
    clear_bytes(gpu, memory.data(), static_cast<std::size_t>(memory.size()));
}

template <class T>
void sum_parts(const Gpu& gpu, std::span<const GpuBytes* const> parts, index_t begin, far<T, 1> sum) {
    for (std::size_t first = 0; first < parts.size(); first += kernels::Parts<T>::most) {
        kernels::Parts<T> some{};
        for (; first + static_cast<std::size_t>(some.count) < parts.size() && some.count < some.most; ++some.count)
            some.of[some.count] =
                reinterpret_cast<const T*>(parts[first + static_cast<std::size_t>(some.count)]->data()) + begin;
        launch(gpu, "add_parts", each(sum.size()), 256, kernels::add_parts<T>, some, first > 0, sum.size(), sum.data);
    }
}
template <class T>
void sum_squares(const Gpu& gpu, far<const T, 1> numbers, index_t block, double* squares) {
    const dim3 blocks(static_cast<unsigned>((numbers.size() + block - 1) / block));
    launch(gpu, "square_blocks", blocks, 256, kernels::square_blocks<T>, numbers.data, numbers.size(), block, squares);
}
template <class T>
void adamw(const Gpu& gpu, const AdamWFactors<T>& by, far<T, 1> params, const T* gradient, T* first_moment,
           T* second_moment) {
    launch(gpu, "adamw", each(params.size()), 256, kernels::adamw<T>, by, params.size(), params.data, gradient,
           first_moment, second_moment);
}

void mark(const Gpu& gpu) { check_call(cudaEventRecord(gpu.mark(), gpu.cuda().stream), "cudaEventRecord"); }
Status await_mark(const Gpu& gpu) {
    check_call(cudaEventSynchronize(gpu.mark()), "cudaEventSynchronize");
    return gpu.cuda().faults[steelyard::CudaFaults::bad_logits] < 0 ? Status{} : gpu.finish();
}

// ---- embedding.hpp, linear.hpp, rms_norm.hpp, rotary.hpp ------------------------------------------------

template <class T>
void embedding_forward(const Gpu& gpu, Bytes tokens, far<const T, 2> table, far<T, 2> y) {
    launch(gpu, "embed", each(y.size()), 256, kernels::embed<T>, tokens.data, table.data, table.extents[1], y.size(),
           y.data);
}
template <class T>
void embedding_backward(const Gpu& gpu, Bytes tokens, far<const T, 2> dy, far<T, 2> dtable) {
    const index_t width = dtable.extents[1];
    const dim3 grid(static_cast<unsigned>(dtable.extents[0]), steelyard::cuda::blocks_for(width, 128));
    launch(gpu, "embed_gradient", grid, 128, kernels::embed_gradient<T>, tokens.data, tokens.extents[0], dy.data, width,
           dtable.data);
}

template <class T>
void linear_forward(const Gpu& gpu, far<const T, 2> x, far<const T, 2> weight, far<T, 2> y) {
    multiply<Turn::no, Turn::yes>(gpu.cuda(), x.extents[0], weight.extents[0], weight.extents[1], matrix_of(x),
                                  matrix_of(weight), matrix_of(y), Write::assign);
}
template <class T>
void linear_backward_input(const Gpu& gpu, far<const T, 2> dy, far<const T, 2> weight, far<T, 2> dx) {
    multiply<Turn::no, Turn::no>(gpu.cuda(), dy.extents[0], weight.extents[1], weight.extents[0], matrix_of(dy),
                                 matrix_of(weight), matrix_of(dx), Write::assign);
}
template <class T>
void linear_backward_weight(const Gpu& gpu, far<const T, 2> dy, far<const T, 2> x, far<T, 2> dweight) {
    multiply<Turn::yes, Turn::no>(gpu.cuda(), dweight.extents[0], dweight.extents[1], x.extents[0], matrix_of(dy),
                                  matrix_of(x), matrix_of(dweight), Write::add);
}

template <class T>
void rms_norm_forward(const Gpu& gpu, far<const T, 2> x, far<const T, 1> gain, far<T, 2> y, far<T, 1> inverse) {
    launch(gpu, "norm_rows", each_row(x.extents[0]), 256, kernels::norm_rows<T>, x.data, gain.data, x.extents[0],
           x.extents[1], y.data, inverse.data);
}
template <class T>
void rms_norm_backward(const Gpu& gpu, far<const T, 2> x, far<const T, 1> gain, far<const T, 1> inverse,
                       far<const T, 2> dy, far<T, 2> dx, far<T, 1> dgain) {
    const index_t rows = x.extents[0], width = x.extents[1];
    launch(gpu, "norm_rows_gradient", each_row(rows), 256, kernels::norm_rows_gradient<T>, x.data, gain.data,
           inverse.data, dy.data, rows, width, dx.data);
    launch(gpu, "norm_gain_gradient", dim3(steelyard::cuda::blocks_for(width, 32)), 1024,
           kernels::norm_gain_gradient<T>, x.data, inverse.data, dy.data, rows, width, dgain.data);
}

template <class T>
void rotary(const Gpu& gpu, far<T, 2> qkv, far<const T, 3> table, T direction) {
    const index_t width = qkv.extents[1] / 3, pairs = qkv.extents[0] * width;
    launch(gpu, "turn_pairs", each(pairs), 256, kernels::turn_pairs<T>, qkv.data, table.data, table.extents[0],
           table.extents[2], width, pairs, direction);
}

// ---- attention.hpp, cross_entropy.hpp -------------------------------------------------------------------

namespace {

struct AttentionShape {
    index_t length, heads, head;
    dim3 grid;

    template <class T>
    AttentionShape(const far<T, 4>& probabilities, index_t width)
        : length(probabilities.extents[2]),
          heads(probabilities.extents[1]),
          head(width / heads),
          grid(static_cast<unsigned>(probabilities.extents[0] * heads),
               steelyard::cuda::blocks_for(length, kernels::attention_warps)) {}
    template <class T>
    [[nodiscard]] T scale() const {
        return T(1) / std::sqrt(static_cast<T>(head));
    }
    static constexpr int threads = 32 * kernels::attention_warps;
};

}  // namespace

template <class T>
void attention_forward(const Gpu& gpu, far<const T, 2> qkv, far<T, 4> probabilities, far<T, 2> y) {
    const AttentionShape of(probabilities, y.extents[1]);
    launch(gpu, "attend", of.grid, of.threads, kernels::attend<T>, qkv.data, of.length, of.heads, of.head,
           of.template scale<T>(), probabilities.data, y.data);
}
template <class T>
void attention_backward(const Gpu& gpu, far<const T, 2> qkv, far<const T, 4> probabilities, far<const T, 2> dy,
                        far<T, 3> dscores, far<T, 2> dqkv) {
    const AttentionShape of(probabilities, dy.extents[1]);
    launch(gpu, "attend_gradient_of_queries", of.grid, of.threads, kernels::attend_gradient_of_queries<T>, qkv.data,
           probabilities.data, dy.data, of.length, of.heads, of.head, of.template scale<T>(), dscores.data, dqkv.data);
    launch(gpu, "attend_gradient_of_keys", of.grid, of.threads, kernels::attend_gradient_of_keys<T>, qkv.data,
           probabilities.data, dy.data, dscores.data, of.length, of.heads, of.head, dqkv.data);
}

template <class T>
void cross_entropy_forward(const Gpu& gpu, Bytes targets, far<T, 2> logits, view<T, 1> losses) {
    launch(gpu, "cross_entropy", each_row(logits.extents[0]), 256, kernels::cross_entropy<T>, targets.data,
           logits.extents[0], logits.extents[1], logits.data, losses.data);
}
template <class T>
void cross_entropy_backward(const Gpu& gpu, Bytes targets, T weight, far<T, 2> probabilities) {
    launch(gpu, "cross_entropy_gradient", each(probabilities.size()), 256, kernels::cross_entropy_gradient<T>,
           targets.data, weight, probabilities.extents[1], probabilities.size(), probabilities.data);
}

// ---- Between float and bf16 -----------------------------------------------------------------------------

namespace {

template <kernels::Cast cast>
void cast_twins(const Gpu& gpu, const char* name, const Twins& twins) {
    index_t most = 0;
    for (int i = 0; i < twins.count; ++i) most = std::max(most, twins.of[i].size);
    const unsigned blocks = steelyard::cuda::blocks_for(std::min<index_t>(most, index_t{1} << 20), 256);
    launch(gpu, name, dim3(blocks, static_cast<unsigned>(twins.count)), 256, kernels::cast_twins<cast, Twins>, twins);
}

}  // namespace

void narrow(const Gpu& gpu, const Twins& twins) { cast_twins<kernels::Cast::narrow>(gpu, "narrow", twins); }
void widen(const Gpu& gpu, const Twins& twins) { cast_twins<kernels::Cast::widen>(gpu, "widen", twins); }
void drain(const Gpu& gpu, const Twins& twins) { cast_twins<kernels::Cast::drain>(gpu, "drain", twins); }

// ---- Compiled -------------------------------------------------------------------------------------------

using Number = float;

template void upload<Number, 3>(const Gpu&, view<const Number, 3>, far<Number, 3>);
template void upload<index_t, 1>(const Gpu&, view<const index_t, 1>, far<index_t, 1>);
template void add<Number>(const Gpu&, far<const Number, 2>, far<const Number, 2>, far<Number, 2>);
template void clear<Number>(const Gpu&, far<Number, 2>);
template void sum_parts<Number>(const Gpu&, std::span<const GpuBytes* const>, index_t, far<Number, 1>);
template void sum_squares<Number>(const Gpu&, far<const Number, 1>, index_t, double*);
template void adamw<Number>(const Gpu&, const AdamWFactors<Number>&, far<Number, 1>, const Number*, Number*, Number*);
template void embedding_forward<Number>(const Gpu&, Bytes, far<const Number, 2>, far<Number, 2>);
template void embedding_backward<Number>(const Gpu&, Bytes, far<const Number, 2>, far<Number, 2>);
template void linear_forward<Number>(const Gpu&, far<const Number, 2>, far<const Number, 2>, far<Number, 2>);
template void linear_backward_input<Number>(const Gpu&, far<const Number, 2>, far<const Number, 2>, far<Number, 2>);
template void linear_backward_weight<Number>(const Gpu&, far<const Number, 2>, far<const Number, 2>, far<Number, 2>);
template void rms_norm_forward<Number>(const Gpu&, far<const Number, 2>, far<const Number, 1>, far<Number, 2>,
                                       far<Number, 1>);
template void rms_norm_backward<Number>(const Gpu&, far<const Number, 2>, far<const Number, 1>, far<const Number, 1>,
                                        far<const Number, 2>, far<Number, 2>, far<Number, 1>);
template void rotary<Number>(const Gpu&, far<Number, 2>, far<const Number, 3>, Number);
template void attention_forward<Number>(const Gpu&, far<const Number, 2>, far<Number, 4>, far<Number, 2>);
template void attention_backward<Number>(const Gpu&, far<const Number, 2>, far<const Number, 4>, far<const Number, 2>,
                                         far<Number, 3>, far<Number, 2>);
template void cross_entropy_forward<Number>(const Gpu&, Bytes, far<Number, 2>, view<Number, 1>);
template void cross_entropy_backward<Number>(const Gpu&, Bytes, Number, far<Number, 2>);

}  // namespace pretrain
