// Forward of feed-forward experts on the CPU, and the packing of their weights.
#pragma once

#include "steelyard/cpu/ffn_pass.hpp"
#include "steelyard/cpu/pack_formats.hpp"

namespace steelyard::cpu::detail::expert {

/// Forward with weights of the format F: T itself, bf16 or int8.
template <class Kernels, class T, class F = T>
class FfnForwardPass : FfnPass<Kernels, T> {
    using Base = FfnPass<Kernels, T>;
    using typename Base::Right;
    using Forward = typename Kernels::template ForwardOf<T, F>;
    using Base::device_, Base::function_, Base::weights_, Base::plan_, Base::packed_, Base::gated_, Base::hidden_,
        Base::width_, Base::scratch_, Base::part, Base::height, Base::matrix, Base::hidden_matrix, Base::fetch;

public:
    FfnForwardPass(const Cpu& device, const FfnFunction& function, const FfnWeights<const T>& weights,
                   const Plan<>& plan, std::byte* scratch)
        : Base(device, function, weights, plan, scratch) {}

    void run(view<const T, 2> x, const FfnKept<T>& kept, view<T, 2> rows) const {
        const Tiling tiling(device_, plan_.offsets, height());
        const index_t first = plan_.offsets[0], n = plan_.offsets[plan_.experts()] - first;
        if (rows.present() && n <= split_rows && !keep_busy(tiling.tiles()))
            return run_by_columns(tiling, x, kept, rows);
        parallel_for(device_, tiling.tiles(), [&](index_t task, int thread) {
            const RowTile tile = tiling.tile(task);
            const auto own = part(thread);
            const index_t block = block_columns(own, tile.end - tile.begin);
            auto call = call_of(tile, x, kept, rows, own, block);
            if (rows.present() && !Forward::hidden_in_format) call.inner = own.hidden.data;
            const index_t columns = call.hidden.panel_columns();
            call.inner_row = std::min(block, whole_panels(hidden_)) + row_gap<T>;
            const index_t step = block / columns;
            for (index_t q = 0; q < call.hidden.panels(); q += step) {
                const index_t end = std::min(q + step, call.hidden.panels());
                Kernels::hidden(call, q, end);
                if (rows.present())
                    Kernels::output(call, 0, call.down.panels(), q * columns, std::min(hidden_, end * columns));
            }
        });
    }

    /// The panels of all experts, from their matrices.
    static void pack(const Cpu& device, const FfnWeights<const T>& weights, const PackedFfn& packed) {
        parallel_for(device, packed.header[0].experts, [&](index_t e, int) {
            write(Base::hidden_matrix(weights, e), packed.header[0], packed.hidden[e].data);
            write(Base::matrix(weights.down, e, true), packed.header[0], packed.down[e].data);
            if (!packed.down_back.present()) return;
            write(Base::matrix(weights.down, e, false), packed.header[0], packed.down_back[e].data);
            write(Base::matrix(weights.up, e, false), packed.header[0], packed.up_back[e].data);
            if (packed.gate_back.present())
                write(Base::matrix(weights.gate, e, false), packed.header[0], packed.gate_back[e].data);
        });
    }

private:
    static void write(const Right& right, const PackedHeader& header, std::byte* to) {
        if constexpr (std::is_same_v<T, F>) {
            right.pack(0, right.panels(), 0, right.depth, reinterpret_cast<T*>(to));
        } else {
            const PackedSource source{
                {right.from[0], right.from[1]}, right.stride, right.depth, right.columns, right.paired};
            if constexpr (std::is_same_v<F, bf16>)
                pack_bf16(source, header, to);
            else
                pack_int8(source, header, to);
        }
    }

    /// Columns of the hidden layer that a tile computes at once: few rows have room for more of them, and `down` is
    /// then read in longer runs.
    [[nodiscard]] index_t block_columns(const FfnScratch<T>& own, index_t rows) const {
        constexpr index_t bytes = Forward::hidden_in_format ? Kernels::template element_bytes<F> : index_t{sizeof(T)};
        constexpr index_t block = hidden_block * index_t{sizeof(T)} / bytes;
        const index_t room =
            (Forward::hidden_in_format ? own.room.size() : own.hidden.size()) * index_t{sizeof(T)} / rows;
        const index_t most = (room - row_gap<T> * index_t{sizeof(T)}) / bytes;
        return std::clamp<index_t>(most / block, 1, (hidden_ + block - 1) / block) * block;
    }

    /// What the products of a tile are told; `block` columns of the hidden layer come in the format of the second.
    [[nodiscard]] Forward call_of(const RowTile& tile, view<const T, 2> x, const FfnKept<T>& kept, view<T, 2> rows,
                                  const FfnScratch<T>& own, index_t block) const {
        const index_t e = tile.expert;
        const auto bias = [e](view<const T, 2> of) { return of.present() ? of[e].data : nullptr; };
        Forward call;
        call.function = function_;
        call.rows = tile.end - tile.begin;
        if constexpr (std::is_same_v<T, F>) {
            const auto input = fetch(x, tile.begin, tile.end, own.width);
            call.x = {const_cast<T*>(input.data), input.strides[0]};  // only read
        } else {
            call.x = Kernels::template operand<F>(reinterpret_cast<std::byte*>(own.width.data), call.rows, width_);
            for_gathered(plan_, x, tile.begin, tile.end,
                         [&](index_t r, const T* row) { Kernels::write_row(row, width_, call.x, r - tile.begin); });
            if (rows.present())
                call.inner_operand = Kernels::template operand<F>(reinterpret_cast<std::byte*>(own.room.data),
                                                                  call.rows, std::min(hidden_, block));
        }
        if (packed_.header.present()) {
            call.hidden = this->template stored<F>(packed_.hidden, e, width_, hidden_, gated_);
            call.down = this->template stored<F>(packed_.down, e, hidden_, width_, false);
        } else if constexpr (std::is_same_v<T, F>) {
            call.hidden = hidden_matrix(weights_, e);
            call.down = matrix(weights_.down, e, true);
        }
        call.gate_bias = bias(weights_.gate_bias);
        call.up_bias = bias(weights_.up_bias);
        call.down_bias = bias(weights_.down_bias);
        if (kept.up.present())
            call.kept = {gated_ ? &kept.gate(tile.begin, 0) : nullptr, &kept.up(tile.begin, 0), kept.up.strides[0]};
        call.kept_past_caches = kept.up.present() && this->past_caches(hidden_);
        if (rows.present()) {
            call.out = &rows(tile.begin, 0);
            call.out_row = rows.strides[0];
            call.out_past_caches = this->past_caches(width_);
        }
        call.block = own.block.data;
        if constexpr (std::is_same_v<T, F>) call.room = own.room.data;
        return call;
    }

    /// Whether so many tiles keep the threads busy: there are many, or enough of them and no thread is left without one
    /// for long. Whole tiles read their weights in one run, which brings int8 a tenth with one token on two threads.
    [[nodiscard]] bool keep_busy(index_t tiles) const {
        const index_t threads = device_.threads, turns = (tiles + threads - 1) / threads;
        return threads == 1 || tiles >= 4 * threads || (tiles >= 3 * threads && 8 * turns * threads <= 9 * tiles);
    }

    /// The hidden layer of all rows, a few columns a task, then their outputs.
    void run_by_columns(const Tiling& tiling, view<const T, 2> x, const FfnKept<T>& kept, view<T, 2> rows) const {
        const index_t first = plan_.offsets[0], tiles = tiling.tiles();
        // Calls body(call, first panel, last panel) on every tile, cut to a dozen tasks for each thread.
        const auto each = [&](auto Forward::*operand, auto&& body) {
            const index_t parts = std::max<index_t>(1, 12 * device_.threads / std::max<index_t>(1, tiles));
            parallel_for(device_, tiles * parts, [&](index_t task, int thread) {
                const RowTile tile = tiling.tile(task / parts);
                Forward call = call_of(tile, x, kept, rows, part(thread), hidden_block);
                call.inner = &scratch_.inner(tile.begin - first, 0);
                call.inner_row = scratch_.inner.strides[0];
                const index_t panels = (call.*operand).panels(), at = task % parts;
                const index_t q0 = panels * at / parts, q1 = panels * (at + 1) / parts;
                if (q0 < q1) body(call, q0, q1);
            });
        };
        each(&Forward::hidden, [](Forward& call, index_t q0, index_t q1) {
            call.inner += q0 * call.hidden.panel_columns();
            Kernels::hidden(call, q0, q1);
        });
        each(&Forward::down, [&](Forward& call, index_t q0, index_t q1) {
            for (index_t begin = 0; begin < hidden_; begin += hidden_block, call.inner += hidden_block)
                Kernels::output(call, q0, q1, begin, std::min(hidden_, begin + hidden_block));
        });
    }
};

}  // namespace steelyard::cpu::detail::expert
