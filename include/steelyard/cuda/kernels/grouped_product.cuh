// One kernel for the products of all experts: tiles are dealt out from the plan's counts, on the device.
#pragma once

#include <cstdint>

#include "steelyard/cuda/kernels/grouped_loader.cuh"

namespace steelyard::cuda {

namespace detail {

/// Rows behind the expert's last, which a copy of b brought along, become 0.
template <class Block>
__device__ void clear_tail(const ProductShared<Block>& shared, int stage, int valid, int thread) {
    constexpr int blocks = Block::columns / 64;
    char* const at = shared.base + stage * Block::stage_bytes + Block::a_bytes;
    const int chunks = (Block::depth - valid) * 8;
    for (int i = thread; i < blocks * chunks; i += 128 * Block::multipliers)
        *reinterpret_cast<uint4*>(at + i / chunks * Block::turned_block + valid * 128 + i % chunks * 16) = uint4{};
    hopper::publish_shared();
    hopper::sync_threads_of(1, 128 * Block::multipliers);
}

/// `warps` multiplying warps are done with a stage, which both blocks of a pair write to.
template <class Block>
__device__ void release(const ProductShared<Block>& shared, int step, int lane, int warps = 1) {
    const std::uint32_t empty = shared.empty(step % Block::stages);
    if constexpr (Block::pairs) {
        if (lane < Block::cluster) hopper::arrive_at(empty, lane, warps);
    } else {
        if (lane == 0) hopper::arrive(empty, warps);
    }
}

}  // namespace detail

/// What a multiplying warp finishes its tile with: steps behind those of k that bring what the finish reads, or are
/// room for what it writes, and room of its own on the way out. `together` warps store together, the first for all.
template <class BlockT, int together>
struct FinishSteps {
    using Block = BlockT;
    detail::ProductShared<Block> shared;
    const ProductMaps& maps;
    int& step;
    int& held;            // the step that stores still read from, or none: -1
    std::uint32_t chunk;  // ProductBlock::chunk_bytes of shared memory
    int row;              // of the tile, the warp's first of 16
    int lane;

    /// The address of the next step's memory, which has come.
    __device__ std::uint32_t take() const {
        const int stage = step % Block::stages;
        hopper::wait(shared.full(stage), step / Block::stages % 2);
        return shared.a(stage);
    }
    /// The warp has read it.
    __device__ void give() const {
        settle();
        __syncwarp();
        detail::release(shared, step, lane);
        ++step;
    }
    /// The warp stores from it, and has closed the group of these stores: it goes back once they are done with it, and
    /// the warp goes on.
    __device__ void give_when_stored() const {
        settle<1>();
        held = step++;
    }
    /// Gives back the step that is held. At the latest with a tile's first step: a later one may need its stage.
    template <int left = 0>
    __device__ void settle() const {
        if (held < 0) return;
        if (together == 1 || row % (16 * together) == 0) {
            if (lane == 0) hopper::wait_stores_read<left>();
            __syncwarp();
            detail::release(shared, held, lane, together);
        }
        held = -1;
    }
};

/// For every tile of every expert: d = sum over k of a b, then finish(tile, d, steps). Persistent blocks, one for each
/// multiprocessor, of Block; in clusters of two where Block works in pairs. `finish` is told which 16 rows of the tile
/// its warp holds (see hopper::multiply). Sums run in ascending k; every tile is one block's, so that results have the
/// same bits from run to run.
///
/// A Finish may read a part of some tensor for each tile: `extra_steps` times, `bring` copies `extra_bytes` into the
/// memory of a step, long before the warps `take()` it. Every warp must take and give each of these steps. It may write
/// its results there, and store them from there: those of the last step leave beside the products of the next tile.
template <Bring a, Bring b, class Block, class Finish>
__global__ void __launch_bounds__(Block::threads, 1)
    grouped_product(const __grid_constant__ ProductMaps maps, const __grid_constant__ GroupedProduct of,
                    const __grid_constant__ Finish finish) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Loader = detail::ProductLoader<a, b, Block, Finish>;
    // Of 504 for one thread of each warpgroup.
    constexpr int loader_registers = Loader::over_rows ? 88 : 56;
    extern __shared__ __align__(1024) char raw[];
    const detail::ProductShared<Block> shared{raw};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Block::stages; ++stage) {
            hopper::init_barrier(shared.full(stage), Loader::gathers ? 129 : 1);
            hopper::init_barrier(shared.empty(stage), 4 * Block::multipliers * Block::cluster);
        }
        hopper::publish_barriers();
    }
    detail::count_tiles<Block::pairs>(of, shared.first());
    int rank = 0;
    if constexpr (Block::pairs) {
        rank = hopper::rank_in_cluster();
        hopper::sync_cluster();  // the other block's barriers are there
    }
    const int total = shared.first()[of.experts];

    if (warp < 4) {
        if constexpr (Block::multipliers == 2) hopper::give_registers<loader_registers>();
        if (Loader::gathers || threadIdx.x == 0) {
            Loader loader{maps, of, shared, static_cast<int>(threadIdx.x), rank};
            loader.run(total);
        }
    } else {
        if constexpr (Block::multipliers == 2) hopper::take_registers<(504 - loader_registers) / 2>();
        const int own = warp / 4 - 1;  // which 64 rows
        constexpr bool a_by_k = !is_turned(a), b_by_k = !is_turned(b);
        float d[Block::sums];
        TileWalk walk(shared.first(), of.experts);
        int step_of_all = 0, held = -1;
        const FinishSteps<Block, Finish::warps_of_store> steps{
            shared, maps, step_of_all, held, hopper::shared_address(shared.chunk(warp - 4)), 64 * own + 16 * (warp % 4),
            lane};
        for (int index = blockIdx.x / Block::cluster; index < total; index += gridDim.x / Block::cluster) {
            walk.seek(index);
            const typename Loader::Tile tile(of, walk, index, rank);
            for (int step = 0; step < tile.steps; ++step, ++step_of_all) {
                const int stage = step_of_all % Block::stages;
                hopper::wait(shared.full(stage), step_of_all / Block::stages % 2);
                if constexpr (Loader::gathers) hopper::publish_shared();  // what threads copied, to the tensor cores
                if constexpr (Loader::over_rows)
                    if (tile.rows < (step + 1) * Block::depth)
                        detail::clear_tail(shared, stage, tile.rows - step * Block::depth, threadIdx.x - 128);
                const std::uint64_t at_a = hopper::matrix_at(shared.a(stage) + own * 64 * 128, Block::turned_block);
                const std::uint64_t at_b = hopper::matrix_at(shared.b(stage), Block::turned_block);
                hopper::begin_products();
#pragma unroll
                for (int j = 0; j < Block::depth / 16; ++j)
                    hopper::multiply<a_by_k, b_by_k>(d, at_a + j * (a_by_k ? 2 : 128), at_b + j * (b_by_k ? 2 : 128),
                                                     step > 0 || j > 0);
                hopper::close_products();
                if (step == 0) steps.settle();
                hopper::wait_products<1>();
                if (step > 0) detail::release(shared, step_of_all - 1, lane);
            }
            hopper::wait_products<0>();
            detail::release(shared, step_of_all - 1, lane);
            steps.settle();
            hopper::settle(d);
            const int m = tile.m * Block::rows + steps.row;
            finish(FinishedTile{tile.expert, tile.first_row + m, Loader::over_rows ? 16 : min(16, tile.rows - m), m,
                                tile.n, tile.matrix},
                   d, steps);
        }
        hopper::wait_stores_read<0>();
    }
    if constexpr (Block::pairs) {
        __syncwarp();
        hopper::sync_cluster();  // the other block still copies to here
    }
#else
    __trap();  // compiled for another target: Gpu::runs_sm_90a does not let it come to that
#endif
}

}  // namespace steelyard::cuda
