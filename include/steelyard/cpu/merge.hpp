// Kernels of the merged mixture on the CPU device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "steelyard/core/layout.hpp"
#include "steelyard/cpu/gemm.hpp"
#include "steelyard/cpu/parallel.hpp"
#include "steelyard/ops/merge_ops.hpp"

namespace steelyard {

template <>
struct merge_ops<Cpu> {
    template <class T>
    static index_t scratch_bytes(const Cpu& device) {
        return std::max(1, device.threads) * thread_bytes<T>();
    }

    template <class T>
    static void pool(const Cpu& device, view<const std::uint8_t, 1> mask, view<const T, 2> x,
                     view<const index_t, 2> ranges, view<T, 2> pooled, view<T, 1> inverse) {
        const index_t width = x.extents[1];
        cpu::parallel_for(device, ranges.extents[0], [&](index_t g, int) {
            T* const row = &pooled(g, 0);
            std::fill_n(row, width, T(0));
            index_t valid = 0;
            for (index_t t = ranges(g, 0); t < ranges(g, 1); ++t) {
                if (mask.present() && mask[t] == 0) continue;
                ++valid;
                for (index_t j = 0; j < width; ++j) row[j] += x(t, j);
            }
            inverse[g] = T(0);
            if (valid == 0) return;
            double mean = 0.0, variance = 0.0;
            for (index_t j = 0; j < width; ++j) mean += static_cast<double>(row[j] /= static_cast<T>(valid));
            mean /= static_cast<double>(width);
            for (index_t j = 0; j < width; ++j) {
                const double off = static_cast<double>(row[j]) - mean;
                variance += off * off;
            }
            const double scale = 1.0 / std::sqrt(variance / static_cast<double>(width) + epsilon);
            inverse[g] = static_cast<T>(scale);
            for (index_t j = 0; j < width; ++j) row[j] = static_cast<T>((static_cast<double>(row[j]) - mean) * scale);
        });
    }

    template <class T>
    static void pool_backward(const Cpu& device, view<const std::uint8_t, 1> mask, view<const index_t, 2> ranges,
                              view<const T, 2> pooled, view<const T, 1> inverse, view<const T, 2> dpooled,
                              view<T, 2> dx) {
        const index_t width = dx.extents[1];
        cpu::parallel_for(device, ranges.extents[0], [&](index_t g, int) {
            index_t valid = 0;
            for (index_t t = ranges(g, 0); t < ranges(g, 1); ++t) valid += !mask.present() || mask[t] != 0;
            if (valid == 0) return;
            double mean = 0.0, along = 0.0;
            for (index_t j = 0; j < width; ++j) {
                mean += static_cast<double>(dpooled(g, j));
                along += static_cast<double>(dpooled(g, j)) * static_cast<double>(pooled(g, j));
            }
            mean /= static_cast<double>(width);
            along /= static_cast<double>(width);
            const double scale = static_cast<double>(inverse[g]) / static_cast<double>(valid);
            for (index_t t = ranges(g, 0); t < ranges(g, 1); ++t) {
                if (mask.present() && mask[t] == 0) continue;
                for (index_t j = 0; j < width; ++j)
                    dx(t, j) += static_cast<T>(scale * (static_cast<double>(dpooled(g, j)) - mean -
                                                        along * static_cast<double>(pooled(g, j))));
            }
        });
    }

    template <class T>
    static void merge(const Cpu& device, view<const T, 2> probs, view<const T, 3> weights, view<T, 3> merged,
                      std::byte* scratch) {
        cpu::parallel_for(device, blocks_of(weights), [&](index_t task, int thread) {
            for (index_t r = task * row_block; r < std::min(weights.extents[1], (task + 1) * row_block); ++r)
                cpu::gemm_nn<T>(probs, row<const T>(weights, r), row<T>(merged, r), cpu::Write::assign,
                                scratch + thread * thread_bytes<T>(), device.isa);
        });
    }

    template <class T>
    static void merge_backward(const Cpu& device, view<const T, 2> probs, view<const T, 3> weights,
                               view<const T, 3> dmerged, view<T, 2> dprobs, view<T, 3> dweights, std::byte* scratch) {
        const index_t experts = weights.extents[0], rows = weights.extents[1], columns = weights.extents[2];
        cpu::parallel_for(device, probs.extents[0] * experts, [&](index_t task, int) {
            const index_t g = task / experts, e = task % experts;
            T sum = 0;
            for (index_t r = 0; r < rows; ++r) {
                const T* const left = &dmerged(g, r, 0);
                const T* const right = &weights(e, r, 0);
                T part = 0;
                for (index_t j = 0; j < columns; ++j) part += left[j] * right[j];
                sum += part;
            }
            dprobs(g, e) += sum;
        });
        if (!dweights.present()) return;
        cpu::parallel_for(device, blocks_of(weights), [&](index_t task, int thread) {
            for (index_t r = task * row_block; r < std::min(rows, (task + 1) * row_block); ++r)
                cpu::gemm_tn<T>(probs, row<const T>(dmerged, r), row<T>(dweights, r), cpu::Write::add,
                                scratch + thread * thread_bytes<T>(), device.isa);
        });
    }

private:
    static constexpr index_t row_block = 16;
    static constexpr double epsilon = 1e-5;

    template <class T>
    static constexpr index_t thread_bytes() {
        return (cpu::gemm_scratch_bytes<T>() + layout_alignment - 1) / layout_alignment * layout_alignment;
    }
    template <class T>
    static index_t blocks_of(const view<T, 3>& weights) {
        return (weights.extents[1] + row_block - 1) / row_block;
    }
    /// Row r of every expert, as a matrix.
    template <class T>
    static view<T, 2> row(const view<T, 3>& tensor, index_t r) {
        view<T, 2> of(tensor.data + r * tensor.strides[1], tensor.extents[0], tensor.extents[2]);
        of.strides[0] = tensor.strides[0];
        return of;
    }
};

}  // namespace steelyard
