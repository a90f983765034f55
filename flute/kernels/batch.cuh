// Batch kernel: many tokens against a table-quantised weight, on Hopper's warpgroup tensor cores.
//
//   out[m, n] = sum_k x[m, k] * table[codes[n, k]] * scales[n, k / GROUP] (+ bias[n])
//
// x (M, K) row-major, read through a tensor map; packed and scales in kernel order
// (flute/kernel_order.py); out (M, N) row-major; sums in fp32.
//
// Work. A block of rows is 64 output features (4 tiles of 16), a unit is a block of rows for one
// tile of TOKENS tokens. A cluster of CLUSTER blocks takes a contiguous run of units and splits K
// by panels of PANEL chunks (64 k). A pass is up to WARPGROUPS units of one token tile, a unit per
// warpgroup, so that the warpgroups share each panel of x:
//
//   producer warp     x: tensor map -> swizzled shared memory, X_STAGES panels ahead
//   consumer warp w   its tile's words -> lookup -> A fragments in registers  (its own ring, as in
//                     decode.cuh)      | wgmma m64 n TOKENS k16, B = x in shared memory
//   end of a pass     sums -> shared memory -> (cluster: all ranks' sums) -> bias -> out
//
// With SPLIT_K the warpgroups split K instead: each takes every WARPGROUPS-th panel, with x of its
// own, of all UNITS units of a pass, and their sums are added when they are stored. Then a block
// with fewer units than warpgroups, or a last pass with fewer, keeps all of them busy; but UNITS
// sums are in registers, and a panel of x stays for all of them.
//
// A batch is 2 or 4 steps of 16 k. While one batch's wgmma run, the next is looked up: 4 buffers of
// fragments, or 2 where registers are short.
// REGISTER_STEPS of 8 steps are looked up in registers (register_lookup.cuh), the others in shared
// memory.
//
// Scales. SCALE_SUMS: wgmma sums one group, which is then scaled into the total in fp32, as in
// decode.cuh. Otherwise the looked-up weights are scaled and rounded to the activations' dtype,
// which is the weight `dequantize` gives: cheaper from 64 tokens on, where sums outnumber weights.
//
// Lanes. Warp w of a warpgroup holds rows 16 w + g, + 8 of the fragment: the layout of
// mma.m16n8k16, hence of kernel order. Accumulator 4 j + i: row g + 8 (i / 2), token 8 j + 2 q + i
// % 2.
//
// Shared memory (bytes):
//   x          X_STAGES * X_PANEL * TOKENS * 128          (1024-byte aligned for the swizzle), that
//              WARPGROUPS times with SPLIT_K
//   table      StepLookup<NUM_BITS>::kTableBytes, or, with row tables, 128 << NUM_BITS for each tile
//              of a pass
//   rings      4 * WARPGROUPS * STAGES * (PANEL chunks + their scales)
//   partials   WARPGROUPS * SLAB * (64 + 4) * 4, SLAB = tokens stored at a time: 32, or 16, or all
//   barriers   8 each
//
// Reproducible: each sum has one fixed order; no atomics. Minimum: sm_90a. Ideas: weights as A from
// registers and swapped operands, Marlin and Machete (vLLM); the rest as in decode.cuh.
#pragma once
#include "batch_multiply.cuh"
#include "batch_store.cuh"

namespace flute {

template <class D>
FLUTE_DEVICE void produce_x(const BatchParams& p, Passes<D> passes, const Panels& panels, int share,
                            u32 smem, u32 x_full, u32 x_empty) {
  u32 stage = 0, parity = 0;
  for (; !passes.done(); passes.next(p))
#pragma unroll 1
    for (int i = share * D::kXParts; i < panels.count * D::kXParts; i++) {
      ptx::mbarrier_wait_long(x_empty + stage * 8, parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(x_full + stage * 8, D::kXStageBytes);
#pragma unroll
      for (int j = 0; j < D::kXPanel; j++)
        ptx::cp_async_bulk_tensor(smem + stage * D::kXStageBytes + j * D::kXChunkBytes, p.x_map,
                                  (panels.begin * D::kPanel + i * D::kXPanel + j) * 64,
                                  first_token<D>(p, passes.token_tile), x_full + stage * 8);
      if (++stage == D::kXStages) {
        stage = 0;
        parity ^= 1;
      }
      if ((i + 1) % D::kXParts == 0) i += (D::kShares - 1) * D::kXParts;  // of other shares
    }
}

template <class Config>
FLUTE_DEVICE void consume(const BatchParams& p, typename Batch<Config>::Ring& ring,
                          Feed<Batch<Config>>& feed, Passes<Batch<Config>> passes,
                          const Panels& panels, float entry, u32 smem, u32 rank, int warp,
                          int lane) {
  using D = Batch<Config>;
  const int warpgroup = warp / 4;
  const u32 barriers = smem + D::kBarrierOffset, smem_table = smem + D::kTableOffset;
  u32 offset = D::kRowTables ? lane * 4 : D::Steps::lane_offset(lane);
  offset = __shfl_sync(0xFFFFFFFFu, offset, lane);  // opaque: see decode.cuh
  const u32 table =
      smem_table + (D::kRowTables ? (D::kSplitK ? warp % 4 : warp) * D::kRowTableBytes : 0);
  const int group = D::kSplitK ? 0 : warpgroup, share = D::kSplitK ? warpgroup : 0;
  Consumer<Config> consumer{p,
                            ring,
                            feed,
                            panels,
                            smem + share * D::kXStages * D::kXStageBytes,
                            barriers + (D::kXFull + share * D::kXStages) * 8,
                            barriers + (D::kXEmpty + share * D::kXStages) * 8,
                            table,
                            offset,
                            share,
                            lane,
                            {}};
  if constexpr (D::kRegisterSteps > 0) consumer.registers.load(TableEntries<D>(entry));
  Epilogue<D> epilogue{p,
                       smem + D::kPartialOffset + group * D::kPartialBytes,
                       barriers + (D::kReady + group) * 8,
                       barriers + (D::kRead + group) * 8,
                       rank,
                       warpgroup,
                       lane,
                       static_cast<int>(threadIdx.x % D::kGroupThreads)};
  constexpr int kAll = 1 + D::kWarpgroups;  // barrier of all consumers
  int range = -1;
#pragma unroll 1
  for (; !passes.done(); passes.next(p)) {
    if (!D::kRowTables && (range < 0 || p.num_ranges > 1) && range != passes.range(p)) {
      const bool first = range < 0;
      range = passes.range(p);
      if (!first) {
        const TableEntries<D> entries(load_entry<D>(p, range));
        ptx::named_barrier(kAll, D::kWarps * 32);
        D::Steps::build(smem_table, entries, threadIdx.x, D::kWarps * 32);
        if constexpr (D::kRegisterSteps > 0) consumer.registers.load(entries);
        ptx::named_barrier(kAll, D::kWarps * 32);
      }
    }
    if (!D::kSplitK && warpgroup >= passes.count) {
      consumer.idle();
      continue;
    }
    const int block = passes.block + group;
    if constexpr (D::kRowTables && D::kSplitK) {
      for (int u = warpgroup; u < passes.count; u += D::kWarpgroups)
        build_row_table<D>(table + u * 4 * D::kRowTableBytes, static_cast<const float*>(p.table),
                           (block + u) * 64 + warp % 4 * 16, p.shape_n, lane);
      ptx::named_barrier(kAll, D::kWarps * 32);
    } else if constexpr (D::kRowTables) {
      __syncwarp();
      build_row_table<D>(table, static_cast<const float*>(p.table), block * 64 + warp % 4 * 16,
                         p.shape_n, lane);
      __syncwarp();
    }
    float acc[D::kAccs][D::kTokens / 2];
    consumer.run(acc, passes.count);
#pragma unroll
    for (int u = 0; u < D::kAccs; u++)
      if (!D::kSplitK || u < passes.count) epilogue.run(acc[u], block + u, passes.token_tile);
  }
  // A block must not leave while another of its cluster reads its sums.
  if constexpr (D::kCluster > 1) ptx::cluster_sync();
}

template <class Config>
__global__ void __launch_bounds__(Batch<Config>::kThreads, 1)
    batch(const __grid_constant__ BatchParams p) {
  using D = Batch<Config>;
  extern __shared__ __align__(1024) u8 smem_base[];
  const u32 smem = ptx::smem_address(smem_base), barriers = smem + D::kBarrierOffset;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const u32 rank = D::kCluster > 1 ? ptx::cluster_rank() : 0;
  const u32 x_full = barriers + D::kXFull * 8, x_empty = barriers + D::kXEmpty * 8;
  const Panels panels = Panels::of<D>(p, rank);
  const Passes<D> passes(p);

  // The weights' flight needs nothing from the previous kernel, nor from the other warps.
  typename D::Ring ring(smem + D::kRingOffset + warp * Config::stages * D::Ring::kSlotBytes,
                        barriers + warp * D::Ring::kNumBarriers * 8);
  Feed<D> feed(p, passes, panels, min(warp, D::kWarps - 1));
  float entry = 0.f;  // of the table; after the fences, which would wait for it
  if (warp < D::kWarps) {
    if (lane == 0) ring.init();
    ptx::fence_mbarrier_init();
    __syncwarp();
    if constexpr (!D::kRowTables) entry = load_entry<D>(p, passes.range(p));
#pragma unroll 1
    for (int i = 0; i < Config::stages; i++) feed.fill(ring, i, p, lane);
  } else if (warp < D::kWarps + D::kShares && lane == 0) {
    const int share = warp - D::kWarps;
    if (share == 0) {
      ptx::prefetch_tensor_map(p.x_map);
      for (int i = 0; i < D::kGroups; i++) {
        ptx::mbarrier_init(barriers + (D::kReady + i) * 8, D::kArrivals);
        ptx::mbarrier_init(barriers + (D::kRead + i) * 8, D::kArrivals);
      }
    }
    for (int i = share * D::kXStages; i < (share + 1) * D::kXStages; i++) {
      ptx::mbarrier_init(x_full + i * 8, 1);
      ptx::mbarrier_init(x_empty + i * 8, D::kWarps / D::kShares);
    }
    ptx::fence_mbarrier_init();
  }
  if (p.early_dependents) ptx::griddepcontrol_launch_dependents();
  if constexpr (!D::kRowTables)
    if (warp < D::kWarps)
      D::Steps::build(smem + D::kTableOffset, TableEntries<D>(entry), threadIdx.x, D::kWarps * 32);
  __syncwarp();
  // The producers go on at once: x flies while tables are built.
  constexpr int kStart = 2 + D::kWarpgroups;  // barrier of all threads
  if (D::kCluster > 1 || warp < D::kWarps)
    ptx::named_barrier(kStart, D::kThreads);
  else
    ptx::named_barrier_arrive(kStart, D::kThreads);
  if constexpr (D::kCluster > 1) ptx::cluster_sync();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  if (warp >= D::kWarps) {
    ptx::setmaxnreg_dec<24>();
    const int share = warp - D::kWarps;
    if (share < D::kShares && ptx::elect_one())
      produce_x<D>(p, passes, panels, share, smem + share * D::kXStages * D::kXStageBytes,
                   x_full + share * D::kXStages * 8, x_empty + share * D::kXStages * 8);
  } else {
    ptx::setmaxnreg_inc<D::kRegisters>();
    consume<Config>(p, ring, feed, passes, panels, entry, smem, rank, warp, lane);
  }
}

}  // namespace flute
