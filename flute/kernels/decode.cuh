// Decode kernel: a few tokens against a table-quantised weight, at the speed of memory.
//
//   out[m, n] = sum_k x[m, k] * table[codes[n, k]] * scales[n, k / GROUP] (+ bias[n])
//
// summed in fp32, for M <= BLOCK_TOKENS.
//
// x (M, K) row-major; packed and scales in kernel order (flute/kernel_order.py); out (M, N)
// row-major.
//
// Work. A tile is 16 output features; a panel is PANEL chunks of 64 k; a round is one panel for
// each of NUM_WARPS warps. A cluster of CLUSTER blocks owns a contiguous run of tiles and splits K
// by panels; in a block, warp w takes panel w of each round. Tiles are taken TILES at a time (a
// tile block), so that a panel of x, once in registers, serves TILES tiles:
//
//             K ->   round 0              round 1
//   tile 0        | w0 | w1 | .. | w7 | w0 | w1 | .. | w7 |  for tile block:
//   tile 1        | w0 | w1 | .. | w7 | w0 | w1 | .. | w7 |    for round: x -> registers
//   ...                                                       for tile: slot -> lookup -> mma
//   tile T-1      | w0 | w1 | .. | w7 | w0 | w1 | .. | w7 |    sum the warps' accumulators, store
//
// Phases. When x is too large to keep (M > 8, long K), a block goes over its tiles once per phase,
// each with its part of K and of x; sums so far wait in `workspace` (fp32, read back by the same
// block, from L2). No block waits for another. A block with a single tile block needs no phases: x
// is streamed, each round's rows in registers a round ahead.
//
// Weights are the mma's A operand (16 features), tokens its B (8 columns): at M = 1 the tensor core
// still costs fewer instructions per weight than multiply-add. Columns past M compute garbage that
// is never stored; mma columns are independent, so an Inf or NaN there cannot spread. Scales
// multiply the fp32 accumulator once per group.
//
// Lanes. lane = g * 4 + q. A: rows g, g + 8 (lookup.cuh). B: token g, k = 2q, +1, 2q + 8, +9. C:
// rows g, g + 8, tokens 2q, 2q + 1. K-order is natural, so x is read by ldmatrix from plain rows
// (and swapped within a step for those looked up in registers).
//
// Shared memory (bytes):
//   table      Lookup<NUM_BITS>::kTableBytes or kWideTableBytes, none if all lookups are in
//              registers; with one table per row ROW_BUFFERS * TILES * (kRowTableBytes + 16 tables
//              as they are if 2)
//   rings      NUM_WARPS * NUM_STAGES * PANEL * (chunk + its scales)
//   barriers   (rings: NUM_WARPS * NUM_STAGES, x: NUM_WARPS * rounds) * 8
//   partials   2 * (NUM_WARPS + 1 in a cluster) * min(M, 8) * (16 * TILES + 4) * 4
//   x          shared: M * (K of this block * 2 + 16)  + 16: rows 4 banks apart, for ldmatrix
//              streamed: NUM_WARPS * min(M, 8) * (64 * 2 + 16), to transpose a chunk at a time
//              registers: `x_stage` times that, where partials come later
//
// Time line with programmatic dependent launch (sm_90). Everything left of `wait` overlaps the
// previous kernel, if there is room for two blocks per SM (MIN_BLOCKS = 2: half the shared memory,
// half the registers); else a block starts when the last one on its SM has left.
//
//   fill rings | build table | wait for previous kernel | x -> smem | tile blocks ... | sum, store
//
// Before the first product each instruction counts, since all warps execute it and it is in no
// instruction cache: hence no divisions, tiles split by the host, and phases in kernels of their
// own.
//
// Reproducible: each sum has one fixed order; no atomics. Minimum: sm_80 (AsyncRing, CLUSTER = 1),
// sm_90 (BulkRing). Ideas: pair table, FLUTE (arXiv 2407.10960); bulk copies and mbarriers,
// NVIDIA's Hopper documentation; offline fragment order, Marlin (arXiv 2408.11743). Code is our
// own.
#pragma once
#include "activations.cuh"
#include "reduction.cuh"
#include "schedule.cuh"

namespace flute {

// The fragments of chunk `chunk` of a panel.
template <class D>
FLUTE_DEVICE void look_up(u32 (&a)[4][4], const u32 (&words)[D::Table::kWords],
                          const RegisterTable<D::kBits>& registers, u32 smem_table, u32 offset,
                          int chunk) {
  if constexpr (D::kBits == 4) {
#pragma unroll
    for (int st = 0; st < 4; st++) {
      if (D::in_registers(chunk, st))
        registers.step_of_pairs(a[st], words[st]);
      else if constexpr (D::kRowTables)
        D::Table::read_step_rows(a[st], words[st], smem_table, offset);
      else if constexpr (D::kWideTable)
        D::Table::read_step_wide(a[st], words[st], smem_table, offset);
      else
        D::Table::read_step(a[st], words[st], smem_table, offset);
    }
  } else if constexpr (D::kBits == 3) {
#pragma unroll
    for (int st = 0; st < 4; st++) {
      const u32 word = D::Table::step_word(words, st);
      if (D::in_registers(chunk, st))
        registers.step(a[st], word);
      else
        D::Table::read_step(a[st], D::kWideTable ? word : word & D::Table::kCodes, smem_table,
                            offset, D::kRowTables ? 128 : 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32(&a0)[4] = a[2 * i], (&a1)[4] = a[2 * i + 1];
      if (D::in_registers(chunk, 2 * i))
        registers.word(a0, a1, words[i]);
      else if constexpr (D::kRowTables)
        D::Table::read_word_rows(a0, a1, words[i], smem_table, offset);
      else if constexpr (D::kWideTable)
        D::Table::read_word_wide(a0, a1, words[i], smem_table, offset);
      else
        D::Table::read_word(a0, a1, words[i], smem_table, offset);
    }
  }
}

// One slot: look the weights up, multiply, scale into acc.
template <class D, int ROUND>
FLUTE_DEVICE void multiply_slot(float (&acc)[D::kColumns][4], const XFragments<D>& x,
                                typename D::Ring& ring, Cursor<D>& next, const DecodeParams& p,
                                const RegisterTable<D::kBits>& registers, u32 smem_table,
                                u32 offset, int lane) {
  using Table = typename D::Table;
  // Why in parts: more words at once cost registers, which spill (M > 8, or groups of 32).
  constexpr int kPart = D::kPanel < D::kPartChunks ? D::kPanel : D::kPartChunks;
  constexpr int kPartUnits =
      D::kUnitSteps < kPart * 4 ? kPart * 4 / D::kUnitSteps : 1;  // scales a part begins
  constexpr int kRefill = kPart > 1 ? 1 : 0;  // chunk of the last part before which to refill
  const u32 slot = ring.wait();
  const u32 scales = slot + D::kWeightBytes + (lane >> 2) * 2 * D::Scale::kBytes;
  float sum[D::kColumns][4];
  float scale[kPartUnits][2];
#pragma unroll
  for (int part = 0; part < D::kPanel / kPart; part++) {
    u32 words[kPart][Table::kWords];
#pragma unroll
    for (int j = 0; j < kPart; j++)
      Table::load(words[j], slot + (part * kPart + j) * Table::kChunkBytes, lane);
    if (D::kUnits > 0 && part * kPart * 4 % D::kUnitSteps == 0) {
#pragma unroll
      for (int u = 0; u < kPartUnits; u++)
        D::Scale::load_pair(
            scale[u][0], scale[u][1],
            scales + (part * kPart * 4 / D::kUnitSteps + u) * 16 * D::Scale::kBytes);
    }
#pragma unroll
    for (int j = 0; j < kPart; j++) {
      if (part == D::kPanel / kPart - 1 && j == kRefill) {
        // Refill once all of the slot is in registers: a copy may overtake a read that is still in
        // the queue of shared memory, which no barrier of the warp waits for (without this, 11 of
        // 300 runs differed on 8192 x 28672, 3 bits, M = 8). So the refill depends on what was read
        // last; reads return in order. `offset` is a multiple of 4, unknown to ptxas.
        u32 seen = 0;
#pragma unroll
        for (int i = 0; i < kPart * Table::kWords; i++)
          seen |= words[i / Table::kWords][i % Table::kWords];
        if (D::kUnits > 0) {
#pragma unroll
          for (int i = 0; i < kPartUnits * 2; i++) seen |= __float_as_uint(scale[i / 2][i % 2]);
        }
        __syncwarp();
        refill<D>(ring, ring.stage, next, p, lane, seen & offset & 3);
        ring.advance();
      }
      u32 a[4][4];
      look_up<D>(a, words[j], registers, smem_table, offset, part * kPart + j);
#pragma unroll
      for (int st = 0; st < 4; st++) {
        constexpr int kUnit = D::kUnitSteps;
        const int chunk = part * kPart + j, step = chunk * 4 + st;
#pragma unroll
        for (int c = 0; c < D::kColumns; c++) {
          const u32 b0 = x.v[ROUND * D::kPanel + chunk][c][st][0],
                    b1 = x.v[ROUND * D::kPanel + chunk][c][st][1];
          if (D::kUnits == 0)
            D::Act::mma(acc[c], a[st], b0, b1, acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
          else if (step % kUnit == 0)
            D::Act::mma(sum[c], a[st], b0, b1, 0.f, 0.f, 0.f, 0.f);
          else
            D::Act::mma(sum[c], a[st], b0, b1, sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
          if (D::kUnits > 0 && step % kUnit == kUnit - 1) {
            const int u = step / kUnit % kPartUnits;
#pragma unroll
            for (int i = 0; i < 4; i++) acc[c][i] += scale[u][i / 2] * sum[c][i];
          }
        }
      }
    }
  }
}

template <class D>
using TableEntries = Entries<D::kBits, typename D::Act>;

// A table to shared memory, by the whole block, and to registers.
template <class D>
FLUTE_DEVICE void spread_table(RegisterTable<D::kBits>& registers, u32 smem,
                               const TableEntries<D>& entries) {
  if constexpr (D::kRegisterSteps > 0) registers.load(entries);
  if constexpr (D::kWideTable && !D::kAllInRegisters)
    D::Table::build_wide(smem, entries, threadIdx.x, D::kThreads);
  else if constexpr (!D::kAllInRegisters)
    D::Table::build(smem, entries, threadIdx.x, D::kThreads);
}

template <int VALUE>
struct Constant {
  static constexpr int kValue = VALUE;
};

// One warp: all its tile blocks.
template <class Config>
FLUTE_DEVICE void run_warp(typename Decode<Config>::Ring& ring, Cursor<Decode<Config>>& next,
                           const DecodeParams& p, Share<Decode<Config>>& share, float entry,
                           int range, u32 smem, u32 rank, int warp, int lane) {
  using D = Decode<Config>;
  const u32 barriers = smem + D::kBarrierOffset;
  const u32 smem_partials = barriers + (D::kXBarriers + D::kWarps * share.most_rounds + 1) / 2 * 16;
  const u32 smem_x = smem_partials + 2 * (D::kWarps + (D::kCluster > 1)) * min(p.shape_m, 8) *
                                         D::kPartialStride * 4;
  const u32 x_barriers = barriers + (D::kXBarriers + warp * share.most_rounds) * 8;

  using Rows = typename D::Rows;
  const int num_blocks = (share.tile_end - share.tile_begin + D::kTiles - 1) / D::kTiles;
  const float* tables = static_cast<const float*>(p.table);
  RegisterTable<D::kBits> registers;
  const auto build_tables = [&] {
    if constexpr (!D::kRowTables) {
      spread_table<D>(registers, smem, TableEntries<D>(entry));
    } else if constexpr (D::kRowBuffers == 2) {
      Rows first, second;
      first.load(tables, share.tile_begin * 16, p.shape_n, threadIdx.x);
      second.load(tables, (share.tile_begin + (num_blocks > 1 ? D::kTiles : 0)) * 16, p.shape_n,
                  threadIdx.x);
      first.store(smem + D::kRawOffset, threadIdx.x);
      second.store(smem + D::kRawOffset + Rows::kRawBytes, threadIdx.x);
      __syncthreads();
      Rows::template build<typename D::Table>(smem, smem + D::kRawOffset, threadIdx.x);
    }
  };
  build_tables();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  XFragments<D> x;
  XRows<D> rows[D::kColumns];  // on their way; streamed: of the next round
  u32 x_row[D::kColumns];
  const int stage_bytes = min(p.shape_m, 8) * XRows<D>::kStride * (D::kXStays ? p.x_stage : 1);
  const u32 stage = (D::kXStays ? smem_partials : smem_x) + warp * stage_bytes;
  if constexpr (Config::x_source == kXShared) {
    fetch_x<D>(smem_x, x_barriers, p, share, warp, lane);
#pragma unroll
    for (int c = 0; c < D::kColumns; c++)
      x_row[c] = smem_x + min(c * 8 + (lane & 7), p.shape_m - 1) * p.x_stride + (lane >> 3) * 16;
  }
  if constexpr (Config::x_source == kXStreamed) {
#pragma unroll
    for (int c = 0; c < D::kColumns; c++) rows[c].load(p, share, c, warp, lane);
  }
  u32 turn = 0;  // which buffer has the tables of this tile block's rows
  __syncthreads();

  u32 offset = D::kRowTables ? lane * 4 : D::Table::lane_offset(lane);
  // Why: a shuffle is opaque to ptxas, which otherwise masks the thread index anew for every
  // lookup: 8 instructions per chunk at 2 bits (an empty asm does not stop it).
  offset = __shfl_sync(0xFFFFFFFFu, offset, lane);
  Reduction<D> reduction(smem_partials, rank, p.shape_m);
#pragma unroll 1
  for (int phase = 0; phase < (D::kPhased ? p.num_phases : 1); phase++) {
    if constexpr (D::kXStays) {
      if (D::kPhased && phase > 0) {
        __syncthreads();  // sums in the workspace, written by other threads of the block
        share.set_phase(p, phase);
        reduction.phase = phase;
      }
      constexpr int kMost = D::kPanel < 8 ? D::kPanel : 8, kHalf = kMost < 2 ? 1 : kMost / 2;
      if (p.x_stage >= kMost)
        x.template load_once<kMost>(rows, p, share, stage, warp, lane);
      else if (p.x_stage >= kHalf)
        x.template load_once<kHalf>(rows, p, share, stage, warp, lane);
      else
        x.template load_once<1>(rows, p, share, stage, warp, lane);
      __syncthreads();  // the stages lie where sums will
    }
    int count;
    for (int tile = share.tile_begin; tile < share.tile_end; tile += count) {
      count = share.block_tiles(p, tile);
      Rows rows_after;
      if constexpr (D::kRowTables && D::kRowBuffers == 2) {
        const int block = (tile - share.tile_begin) / D::kTiles;
        const int after = (block + 2) % num_blocks * D::kTiles;
        rows_after.load(tables, (share.tile_begin + after) * 16, p.shape_n, threadIdx.x);
      } else if constexpr (D::kRowTables) {
        __syncthreads();
        for (int t = 0; t < count; t++)
          D::Table::template build_rows<typename D::Act>(smem + t * D::Table::kRowTableBytes,
                                                         tables, (tile + t) * 16, p.shape_n,
                                                         threadIdx.x, D::kThreads);
        __syncthreads();
      } else if (p.num_ranges > 1 &&
                 (tile >= p.range_end[range] || (range > 0 && tile < p.range_end[range - 1]))) {
        range = 0;
        while (tile >= p.range_end[range]) range++;
        __syncthreads();
        spread_table<D>(registers, smem, TableEntries<D>(tables + (range << D::kBits), lane));
        __syncthreads();
      }

      float acc[D::kTiles][D::kColumns][4] = {};
      const auto multiply_round = [&](auto round) {
#pragma unroll
        for (int t = 0; t < D::kTiles; t++) {
          if (t >= count) continue;
          u32 table = smem;
          if constexpr (D::kRowTables)
            table += turn * D::kBufferBytes + t * D::Table::kRowTableBytes;
          multiply_slot<D, decltype(round)::kValue>(acc[t], x, ring, next, p, registers, table,
                                                    offset, lane);
        }
      };
      if constexpr (D::kXStays) {
        if (warp < share.num_panels) multiply_round(Constant<0>());
        if constexpr (D::kXRounds > 1)
          if (D::kWarps + warp < share.num_panels) multiply_round(Constant<1>());
      } else {
#pragma unroll 1
        for (int round = 0; round < share.num_rounds; round++) {
          const int panel = round * D::kWarps + warp;
          if (panel >= share.num_panels) break;  // the last round may have fewer panels than warps
          if constexpr (Config::x_source == kXShared) {
            if (tile == share.tile_begin) ptx::mbarrier_wait(x_barriers + round * 8, 0);
            x.load_shared(x_row, panel * D::kPanel * 64);
          } else if constexpr (Config::x_source == kXStreamed) {
            const int after = panel + D::kWarps < share.num_panels ? panel + D::kWarps : warp;
#pragma unroll
            for (int c = 0; c < D::kColumns; c++) {
              x.template transpose<1>(rows[c], p, c, stage, lane);
              rows[c].load(p, share, c, after, lane);
            }
          } else {
            x.load_global(p, (share.panel_begin + panel) * D::kPanel * 64, lane >> 2, lane & 3);
          }
          multiply_round(Constant<0>());
        }
      }
      // The barrier in the sum parts what this tile block reads from what the next ones write.
      if constexpr (D::kRowTables && D::kRowBuffers == 2) {
        Rows::template build<typename D::Table>(smem + (turn ^ 1) * D::kBufferBytes,
                                                smem + D::kRawOffset + (turn ^ 1) * Rows::kRawBytes,
                                                threadIdx.x);
        rows_after.store(smem + D::kRawOffset + turn * Rows::kRawBytes, threadIdx.x);
        turn ^= 1;
      }
      reduction.run(acc, tile, count, p);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::num_warps * 32, Config::min_blocks)
    decode(const __grid_constant__ DecodeParams p) {
  using D = Decode<Config>;
  extern __shared__ __align__(1024) u8 smem_base[];
  const u32 smem = ptx::smem_address(smem_base), barriers = smem + D::kBarrierOffset;
  // Why the shuffle: it tells the compiler that `warp` is uniform, so addresses of copies and
  // barriers are too.
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const u32 rank = D::kCluster > 1 ? ptx::cluster_rank() : 0;
  Share<D> share(p, rank);
  // The weights and the table's entries take off first: they need nothing from the previous kernel,
  // nor from the other warps.
  typename D::Ring ring(smem + D::kRingOffset + warp * Config::stages * D::Ring::kSlotBytes,
                        barriers + warp * D::Ring::kNumBarriers * 8);
  if (lane == 0) ring.init();
  if constexpr (Config::x_source == kXShared)
#pragma unroll 1
    for (int i = lane; i < share.num_rounds; i += 32)
      ptx::mbarrier_init(barriers + (D::kXBarriers + warp * share.most_rounds + i) * 8, 32);
  if constexpr (Config::bulk) ptx::fence_mbarrier_init();
  __syncwarp();
  // Why not sooner: the fence would wait for it.
  int range = 0;  // whose table is in use
  float entry = 0.f;
  if constexpr (!D::kRowTables) {
    while (range + 1 < p.num_ranges && share.tile_begin >= p.range_end[range]) range++;
    entry = TableEntries<D>::load(static_cast<const float*>(p.table) + (range << D::kBits), lane);
  }
  Cursor<D> next(p, share, warp);
#pragma unroll 1
  for (int i = 0; i < Config::stages; i++) refill<D>(ring, i, next, p, lane, 0);
  if (p.early_dependents) ptx::griddepcontrol_launch_dependents();
  run_warp<Config>(ring, next, p, share, entry, range, smem, rank, warp, lane);
  // A block must not leave while another of its cluster still reads its partial sums.
  if constexpr (D::kCluster > 1) ptx::cluster_sync();
}

}  // namespace flute
