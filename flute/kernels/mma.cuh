// mma kernel: many tokens against a table-quantised weight, on the tensor cores of any GPU from
// sm_80 on (batch.cuh needs Hopper's).
//
//   out[m, n] = sum_k x[m, k] * table[codes[n, k]] * scales[n, k / GROUP] (+ bias[n])
//
// x (M, K) row-major; packed and scales in kernel order (flute/kernel_order.py); out (M, N)
// row-major; sums in fp32.
//
// Work. A unit is WARPS_N * TILES tiles of 16 output features for one tile of TOKENS tokens. A step
// is a stage of CHUNKS chunks (64 k) of a unit. All steps, unit after unit, are cut into as many
// pieces as blocks run at once, of equal length:
//
//   units    |     0     |     1     |     2     |     3     |     4     |
//   pieces   |    0    |    1    |    2    |    3    |    4    |    5    |
//
// so that no multiprocessor waits for others, whatever N and M are. A unit that one piece covers is
// stored; parts of units go to `workspace` in fp32, and a second launch of the same kernel sums
// them, in the order of K. With GRAIN a unit's steps, pieces are whole units and there is no second
// launch.
//
// In a block, WARPS_N warps lie side by side along N, TILES tiles each; WARPS_K of them split the
// chunks of a stage. Weights are the mma's A operand, looked up once for all TOKENS tokens; tokens
// are its B, 8 columns at a time:
//
//   x        cp.async -> stages, swizzled -> ldmatrix (16 tokens x 16 k) -> B, for TILES tiles
//   words    cp.async -> stages -> lookup -> A                           -> for TOKENS / 8 columns
//
//   stage    0        1             2
//          [ in use ][ looked up  ][ flying ]  one barrier of the block per step, after which the
//                     [ or flying ]            stage used before is filled again
//
// With AHEAD, the next chunk is looked up while one is multiplied.
//
// Scales. SCALE_SUMS: each chunk (group of 32: half of it) is summed alone and scaled in fp32.
// Otherwise the looked-up weights are scaled and rounded to the activations' dtype, which is the
// weight `dequantize` gives: cheaper from 64 tokens on, where sums outnumber weights.
//
// Lanes. lane = g * 4 + q. A: rows g, g + 8 (lookup.cuh). B: token g, k = 2q, +1, 2q + 8, +9. C:
// rows g, g + 8, tokens 2q, 2q + 1.
//
// Swizzle. Granule i (16 bytes, 8 k) of a token's 128 bytes lies at i ^ (token % 8): the eight rows
// that ldmatrix reads at a time lie in different banks.
//
// Shared memory (bytes):
//   table      Lookup<NUM_BITS>::kTableBytes, or WARPS_N * TILES * (128 << NUM_BITS) with row tables
//   stages     STAGES * (CHUNKS * (TOKENS * 128 + WARPS_N * TILES * chunk bytes) + scales)
//   partials   WARPS_K * 8 * (rows of a unit + 4) * 4: sums on their way to `out`
//
// Reproducible: each sum has one fixed order, which depends on the number of pieces; no atomics.
// Minimum: sm_80. Ideas: one line of steps cut into equal pieces, Stream-K (arXiv 2301.03598) and
// Marlin (arXiv 2408.11743); weights as A and swapped operands, Marlin; swizzled rows for ldmatrix,
// NVIDIA's CUTLASS documentation; pair table, FLUTE (arXiv 2407.10960). Code is our own.
#pragma once
#include "mma_multiply.cuh"
#include "mma_store.cuh"

namespace flute {

template <class Config>
__global__ void __launch_bounds__(Mma<Config>::kThreads, Config::min_blocks)
    mma(const __grid_constant__ MmaParams p) {
  using D = Mma<Config>;
  extern __shared__ __align__(1024) u8 smem_base[];
  if (p.sums) {
    // Why without launch_dependents: the next product's blocks would be placed while these and the
    // last product's hold places, two on some multiprocessors and none on others. 57344 x 8192, 3
    // bits, M = 16, 8 x 1 warps: 133 us, and 97 in whole units (H200, 2026-11-22).
    ptx::griddepcontrol_wait();
    sum_parts<D>(p);
    return;
  }
  const u32 smem = ptx::smem_address(smem_base), stages = smem + D::kStageOffset;
  // Why shuffles: they tell the compiler that `warp` is uniform, and keep it from computing `lane`
  // anew wherever it is used.
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int lane = __shfl_sync(0xFFFFFFFFu, threadIdx.x % 32, threadIdx.x % 32);
  const MmaPieces<D> pieces(p);
  const int begin = pieces.begin(blockIdx.x), end = pieces.begin(blockIdx.x + 1);
  const float* tables = static_cast<const float*>(p.table);

  // Weights and tables need nothing from the previous kernel.
  MmaFeed<D> feed(p, pieces, begin, end, warp, lane), x_feed = feed;
#pragma unroll 1
  for (int i = 0; i < D::kStages - 1; i++) {
    feed.copy_weights(stages + i * D::kStageBytes, lane);
    feed.advance(warp, lane);
  }
  if (p.early_dependents) ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
#pragma unroll 1
  for (int i = 0; i < D::kStages - 1; i++) {
    x_feed.copy_x(stages + i * D::kStageBytes);
    x_feed.advance(warp, lane);
    ptx::cp_async_commit();  // the first holds all weights
  }

  MmaWarp<D> consumer(smem, warp, lane);
  int range = -1;
  u32 stage = 0, free = (D::kStages - 1) * D::kStageBytes;
  const auto after = [](u32 stage) {
    return stage + D::kStageBytes == D::kStages * D::kStageBytes ? 0 : stage + D::kStageBytes;
  };
#pragma unroll 1
  for (int at = begin; at < end;) {
    const int index = at / pieces.steps, first = at - index * pieces.steps;
    const int count = min(pieces.steps - first, end - at);
    const MmaUnit unit = unit_at<D>(p, index);
    if constexpr (D::kRowTables) {
      build_row_tables<D>(smem, tables, unit.tile, p.shape_n, warp, lane);
    } else if (unit.range != range) {
      range = unit.range;
      const Entries<D::kBits, typename D::Act> entries(tables + (range << D::kBits), lane);
      D::Table::build(smem, entries, threadIdx.x, D::kThreads);
    }
    if constexpr (D::kAhead) {
      ptx::cp_async_wait<D::kStages - 2>();
      __syncthreads();  // the first stage and the tables are there
      consumer.begin(stages + stage);
    }
    float acc[D::kTiles][D::kColumns][4] = {};
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      ptx::cp_async_wait<D::kStages - 2 - D::kAhead>();
      // All copies of this stage (and the next) have landed; all reads of the last are done.
      __syncthreads();
      feed.copy_x(stages + free);
      feed.copy_weights(stages + free, lane);
      feed.advance(warp, lane);
      ptx::cp_async_commit();
      consumer.run(acc, stages + stage, stages + after(stage));
      free = stage;
      stage = after(stage);
    }
    const int slot = count == pieces.steps ? -1 : pieces.slot(blockIdx.x, index);
    store_unit<D>(p, acc, unit, slot, smem + D::kPartialOffset, warp, lane);
    at += count;
  }
}

}  // namespace flute
