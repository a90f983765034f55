// Batch kernel: many tokens against a table-quantised weight, on Hopper's warpgroup tensor cores.
//
//   out[m, n] = sum_k x[m, k] * table[codes[n, k]] * scales[n, k / GROUP] (+ bias[n])
//
// x (M, K) row-major, read through a tensor map; packed and scales in kernel order
// (flute/kernel_order.py); out (M, N) row-major; sums in fp32.
//
// Work. A block of rows is 64 output features (4 tiles of 16), a unit is a block of rows for one
// tile of TOKENS tokens. A cluster of CLUSTER blocks takes a contiguous run of units and splits K by
// panels of PANEL chunks (64 k). A pass is up to WARPGROUPS units of one token tile, a unit per
// warpgroup, so that the warpgroups share each panel of x:
//
//   producer warp     x: tensor map -> swizzled shared memory, X_STAGES panels ahead
//   consumer warp w   its tile's words -> lookup -> A fragments in registers  (its own ring, as in
//                     decode.cuh)      | wgmma m64 n TOKENS k16, B = x in shared memory
//   end of a pass     sums -> shared memory -> (cluster: all ranks' sums) -> bias -> out
//
// A batch is 2 or 4 steps of 16 k. While one batch's wgmma run, the next is looked up: 4 buffers of
// fragments, or 2 where registers are short.
//
// Scales. SCALE_SUMS: wgmma sums one group, which is then scaled into the total in fp32, as in
// decode.cuh. Otherwise the looked-up weights are scaled and rounded to the activations' dtype,
// which is the weight `dequantize` gives: cheaper from 64 tokens on, where sums outnumber weights.
//
// Lanes. Warp w of a warpgroup holds rows 16 w + g, + 8 of the fragment: the layout of mma.m16n8k16,
// hence of kernel order. Accumulator 4 j + i: row g + 8 (i / 2), token 8 j + 2 q + i % 2.
//
// Shared memory (bytes):
//   x          X_STAGES * X_PANEL * TOKENS * 128          (1024-byte aligned for the swizzle)
//   table      StepLookup<NUM_BITS>::kTableBytes, or 4 * WARPGROUPS * (128 << NUM_BITS) with row tables
//   rings      4 * WARPGROUPS * STAGES * (PANEL chunks + their scales)
//   partials   WARPGROUPS * SLAB * (64 + 4) * 4, SLAB = tokens stored at a time: 32, or 16, or all
//   barriers   8 each
//
// Reproducible: each sum has one fixed order; no atomics. Minimum: sm_90a. Ideas: weights as A from
// registers and swapped operands, Marlin and Machete (vLLM); the rest as in decode.cuh.
#pragma once
#include "hopper.cuh"
#include "lookup.cuh"
#include "ring.cuh"

namespace flute {

// Passed by value; flute/batch.py packs the same fields in the same order.
struct BatchParams {
  alignas(64) u8 x_map[128];  // CUtensorMap of x (M, K), box (TOKENS, 64), 128-byte swizzle
  const void* packed;         // (tiles, num_chunks, chunk bytes)
  const void* scales;         // (tiles, num_chunks * 64 / GROUP, 8, 2); whole row: (tiles * 16)
  const void* table;          // (num_ranges or N, 2**NUM_BITS) fp32
  const void* bias;           // (N) in the activations' dtype, or null
  void* out;                  // (M, N)
  int shape_m, shape_n;
  int num_chunks;       // K padded to a multiple of 256, / 64
  int num_token_tiles;  // of TOKENS tokens
  int num_ranges;       // tables in use, at most 8
  int range_end[8];     // in tiles, multiples of 4: tiles before it use table i
};

// Lookups a step at a time. `bytes`: the words of a chunk with a pair (quad) of codes in each byte;
// one PRMT places a byte at its offset in a table of 256-byte entries, `byte << 8 | lane offset`.
// Why not decode.cuh's tables of 128-byte entries: they take a shift and a mask per lookup.
template <int NUM_BITS>
struct StepLookup {
  using Table = Lookup<NUM_BITS>;
  static constexpr int kTableBytes = NUM_BITS == 3 ? 64 * 256 : 256 * 256;
  static constexpr int kWords = NUM_BITS == 2 ? 2 : 4;

  static FLUTE_DEVICE u32 lane_offset(int lane) { return Table::lane_offset(lane); }

  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const float* table, int thread_idx,
                                 int num_threads) {
    if constexpr (NUM_BITS == 3) {
      Table::template build<Act>(smem_table, table, thread_idx, num_threads);
    } else if constexpr (NUM_BITS == 2) {
      Table::template build_wide<Act>(smem_table, table, thread_idx, num_threads);
    } else {
      for (int i = thread_idx; i < 256 * 8; i += num_threads) {
        const u32 v = table_pair<4, Act>(table, i >> 3);
        ptx::st_shared_v4(smem_table + (i >> 3) * 256 + (i & 7) * 16, v, v, v, v);
      }
    }
  }

  static FLUTE_DEVICE void split(u32 (&bytes)[kWords], const u32 (&w)[Table::kWords]) {
    if constexpr (NUM_BITS == 3) {
      Table::pairs(bytes, w);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i++) bytes[i] = __funnelshift_l(w[i], w[i], 25);
    }
  }

  // A fragments of step `st`; `row_table`: this lane's own tables (build_row_table).
  template <bool ROW_TABLES>
  static FLUTE_DEVICE void fragments(u32 (&a)[4], const u32 (&bytes)[kWords], int st, u32 table,
                                     u32 offset) {
    if constexpr (ROW_TABLES) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 v[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int bit = NUM_BITS == 2 ? st % 2 * 16 + (i >> 1) * 8 + e * 4 + (i & 1) * 2
                                        : i * 8 + e * NUM_BITS;
          const u32 word = bytes[NUM_BITS == 2 ? st / 2 : st];
          const u32 at = bit < 7 ? word << (7 - bit) : word >> (bit - 7);
          v[e] = ptx::ld_table(table + ((at & ((1 << NUM_BITS) - 1) << 7) | offset));
        }
        a[i] = __byte_perm(v[0], v[1], i % 2 ? 0x7632 : 0x5410);
      }
    } else if constexpr (NUM_BITS == 2) {
      const u32 v = bytes[st / 2];
      ptx::ld_table_v2(a[0], a[1], table + __byte_perm(v, offset, st % 2 ? 0x7624 : 0x7604));
      ptx::ld_table_v2(a[2], a[3], table + __byte_perm(v, offset, st % 2 ? 0x7634 : 0x7614));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = ptx::ld_table(table + __byte_perm(bytes[st], offset, 0x7604 + i * 16));
    }
  }
};

template <class Config>
struct Batch {
  static constexpr int kBits = Config::num_bits;
  static constexpr int kGroup = Config::group_size;  // 0: the whole row
  static constexpr int kTokens = Config::tokens;
  static constexpr int kWarpgroups = Config::warpgroups;
  static constexpr int kWarps = kWarpgroups * 4;        // consumers
  static constexpr int kThreads = (kWarps + 4) * 32;    // and the producer's warpgroup
  // Registers of a consumer thread; the producer gives them its own (setmaxnreg), of those that the
  // launch bound leaves a block: 96, 128 or 168 a thread.
  static constexpr int kRegisters = kWarpgroups == 7   ? 64
                                    : kWarpgroups == 6 ? 80
                                    : kWarpgroups == 5 ? 88
                                    : kWarpgroups == 4 ? 112
                                    : kWarpgroups == 3 ? 160
                                                       : 240;
  static constexpr int kPanel = Config::panel;
  static constexpr int kXStages = Config::x_stages;
  static constexpr int kXPanel = Config::x_panel;  // chunks of a stage of x
  static constexpr int kCluster = Config::cluster;
  static constexpr bool kRowTables = Config::row_tables;
  static constexpr bool kScaleSums = Config::scale_sums && kGroup != 0;
  static constexpr bool kScaleWeights = !Config::scale_sums && kGroup != 0;

  using Act = Element<Config::dtype>;
  using Scale = Element<Config::scale_dtype>;
  using Table = Lookup<kBits>;
  using Steps = StepLookup<kBits>;
  static constexpr int kBatch = Config::batch;  // steps per group of wgmma
  static constexpr int kBuffers = Config::buffers;  // batches whose fragments are in registers
  // With four, a batch is looked up before the one ahead of it is multiplied.
  static constexpr bool kAhead = kBuffers == 4;
  static constexpr int kRunning = Config::running;  // batches whose wgmma may run on

  static constexpr int kPanelSteps = kPanel * 4;
  static constexpr int kGroupSteps = kGroup == 0 ? kPanelSteps : kGroup / 16;
  static constexpr int kUnitSteps = kGroupSteps < kPanelSteps ? kGroupSteps : kPanelSteps;
  static constexpr int kUnits = kGroup == 0 ? 0 : kPanelSteps / kUnitSteps;
  // Two, so that a group can be scaled while the next is multiplied.
  static constexpr int kSumBuffers = kScaleSums && kUnits % 2 == 0 && Config::sum_buffers == 2 ? 2 : 1;
  static constexpr int kWeightBytes = kPanel * Table::kChunkBytes;
  static constexpr int kScaleBytes = kUnits * 16 * Scale::kBytes;
  using Ring = BulkRing<Config::stages, kWeightBytes, kScaleBytes>;

  static constexpr int kXChunkBytes = kTokens * 128;
  static constexpr int kXStageBytes = kXPanel * kXChunkBytes;
  static constexpr int kRowTableBytes = 128 << kBits;  // of a tile: a column of entries per lane
  static constexpr int kSlab = kTokens % 32 == 0 ? 32 : kTokens > 32 ? 16 : kTokens;
  static constexpr int kPartialStride = 64 + 4;  // floats; + 4: no bank conflicts for lanes q
  static constexpr int kPartialBytes = kSlab * kPartialStride * 4;  // of a warpgroup

  static constexpr int kTableOffset = kXStages * kXStageBytes;
  static constexpr int kRingOffset =
      kTableOffset + (kRowTables ? kWarps * kRowTableBytes : Steps::kTableBytes);
  static constexpr int kPartialOffset = kRingOffset + kWarps * Config::stages * Ring::kSlotBytes;
  static constexpr int kBarrierOffset = kPartialOffset + kWarpgroups * kPartialBytes;
  // Barriers: rings, x full, x empty, sums ready and sums read per warpgroup.
  static constexpr int kXFull = kWarps * Ring::kNumBarriers;
  static constexpr int kXEmpty = kXFull + kXStages;
  static constexpr int kReady = kXEmpty + kXStages;
  static constexpr int kRead = kReady + kWarpgroups;
  static constexpr int kSmemBytes = kBarrierOffset + (kRead + kWarpgroups) * 8;

  static_assert(kBits >= 2 && kBits <= 4, "tables of 2, 3 or 4 bits");
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128 || kGroup == 256,
                "a group is 32, 64, 128 or 256 k, or 0 for the whole row");
  static_assert(kTokens % 8 == 0 && kTokens >= 8 && kTokens <= 256, "n of wgmma");
  static_assert(kBatch == 4 || kBatch == 2, "steps that fragments are held for");
  static_assert(kBuffers == 2 || kBuffers == 4, "of fragments");
  static_assert(kPanelSteps / kBatch % kBuffers == 0, "buffers are fixed at compile time");
  static_assert(kPanel % kXPanel == 0, "stages of x");
  static_assert(!kScaleSums || kUnitSteps % kBatch == 0, "a batch is of one group");
  static_assert(kRunning == 1 || (kRunning == 2 && kAhead && kXPanel * 4 / kBatch >= 2 &&
                                  (!kScaleSums || kUnitSteps >= 2 * kBatch)),
                "two batches run while a third waits and a fourth is looked up");
  static_assert(kPanel == 1 || kPanel == 2 || kPanel == 4, "K is padded to 4 chunks");
};

// The units of a cluster, a pass at a time.
template <class D>
struct Passes {
  int unit, end, num_blocks;
  int block, count, token_tile;  // of the current pass: its first block of rows, how many, tokens

  FLUTE_DEVICE explicit Passes(const BatchParams& p) {
    const int cluster = blockIdx.x / D::kCluster, num_clusters = gridDim.x / D::kCluster;
    num_blocks = (p.shape_n + 63) / 64;
    const long long units = static_cast<long long>(num_blocks) * p.num_token_tiles;
    unit = static_cast<int>(units * cluster / num_clusters);
    end = static_cast<int>(units * (cluster + 1) / num_clusters);
    set(p);
  }

  FLUTE_DEVICE bool done() const { return unit >= end; }

  // The table of the current pass.
  FLUTE_DEVICE int range(const BatchParams& p) const {
    int i = 0;
    while (i + 1 < p.num_ranges && block * 4 >= p.range_end[i]) i++;
    return i;
  }

  // Why evenly: of 5 units, 3 + 2 keep more warpgroups busy than 4 + 1.
  FLUTE_DEVICE void set(const BatchParams& p) {
    token_tile = unit / num_blocks;
    block = unit - token_tile * num_blocks;
    int left = min(end - unit, num_blocks - block);
    if (!D::kRowTables && p.num_ranges > 1)  // a pass is of one table
      left = min(left, (p.range_end[range(p)] + 3) / 4 - block);
    const int num_passes = (left + D::kWarpgroups - 1) / D::kWarpgroups;
    count = num_passes > 0 ? (left + num_passes - 1) / num_passes : 0;
  }

  FLUTE_DEVICE void next(const BatchParams& p) {
    unit += count;
    set(p);
  }
};

// Panels of K of this block: a rank's share of the cluster's.
struct Panels {
  int begin, count;
  template <class D>
  static FLUTE_DEVICE Panels of(const BatchParams& p, u32 rank) {
    const int all = p.num_chunks / D::kPanel, begin = all * static_cast<int>(rank) / D::kCluster;
    return {begin, all * static_cast<int>(rank + 1) / D::kCluster - begin};
  }
};

// Walks a consumer warp's slots in the order of use and fills its ring.
template <class D>
struct Feed {
  Passes<D> passes;
  const Panels panels;
  const int warp;
  u32 chunk = 0;
  int left = 0;  // panels of the current unit

  FLUTE_DEVICE Feed(const BatchParams& p, const Panels& panels, int warp)
      : passes(p), panels(panels), warp(warp) {
    begin_unit(p);
  }

  FLUTE_DEVICE void begin_unit(const BatchParams& p) {
    while (!passes.done() && warp / 4 >= passes.count) passes.next(p);
    if (passes.done()) return;
    // Rows past N: any tile will do, they are not stored.
    const int tile = min((passes.block + warp / 4) * 4 + warp % 4, (p.shape_n - 1) / 16);
    chunk = static_cast<u32>(tile) * p.num_chunks + panels.begin * D::kPanel;
    left = panels.count;
  }

  FLUTE_DEVICE void fill(typename D::Ring& ring, u32 stage, const BatchParams& p, int lane) {
    const bool wanted = left > 0;
    const u8* weights =
        static_cast<const u8*>(p.packed) + static_cast<u64>(chunk) * D::Table::kChunkBytes;
    const u8* scales = static_cast<const u8*>(p.scales) +
                       static_cast<u64>(chunk * 4 / D::kGroupSteps) * (16 * D::Scale::kBytes);
    ring.fill(stage, weights, scales, wanted, lane, 0);
    if (!wanted) return;
    chunk += D::kPanel;
    if (--left == 0) {
      passes.next(p);
      begin_unit(p);
    }
  }
};

// The table of one range of rows, spread by all threads of a group.
template <class D>
FLUTE_DEVICE void build_table(u32 smem_table, const BatchParams& p, int range, int num_threads) {
  const float* tables = static_cast<const float*>(p.table) + (range << D::kBits);
  D::Steps::template build<typename D::Act>(smem_table, tables, threadIdx.x, num_threads);
}

// Table per row: the lane's own rows g and g + 8, an entry the pair of their values, 128 bytes
// apart. Why one code at a time: pair tables of all tiles in flight do not fit shared memory.
template <class D>
FLUTE_DEVICE void build_row_table(u32 smem_table, const float* tables, int row, int num_rows,
                                  int lane) {
  const int lo = min(row + (lane >> 2), num_rows - 1), hi = min(row + 8 + (lane >> 2), num_rows - 1);
#pragma unroll 4
  for (int e = 0; e < 1 << D::kBits; e++) {
    const u32 v0 = D::Act::from_float(
                  ptx::ld_global_nc_f32(tables + (static_cast<long long>(lo) << D::kBits) + e)),
              v1 = D::Act::from_float(
                  ptx::ld_global_nc_f32(tables + (static_cast<long long>(hi) << D::kBits) + e));
    ptx::st_shared_u32(smem_table + e * 128 + lane * 4, v0 | v1 << 16);
  }
}

// A pass of one consumer warpgroup: its unit's sums over the panels of this block.
template <class Config>
struct Consumer {
  using D = Batch<Config>;
  static constexpr int kAcc = D::kTokens / 2, kSums = D::kScaleSums ? kAcc : 1;
  static constexpr int kUnits = D::kUnits ? D::kUnits : 1;
  // Scales that weights are multiplied by: pairs in the activations' dtype, or fp32 where that
  // would round them.
  static constexpr bool kSameDtype = Config::dtype == Config::scale_dtype;

  const BatchParams& p;
  typename D::Ring& ring;
  Feed<D>& feed;
  const Panels panels;
  const u32 smem, x_full, x_empty, table, offset;
  const int lane;
  u32 x_stage = 0, x_parity = 0;

  FLUTE_DEVICE void release(u32 stage) const {
    if (ptx::elect_one()) ptx::mbarrier_arrive(x_empty + stage * 8);
  }

  FLUTE_DEVICE void advance() {
    if (++x_stage == D::kXStages) {
      x_stage = 0;
      x_parity ^= 1;
    }
  }

  // A warpgroup with nothing to do in this pass still hands the stages of x back.
  FLUTE_DEVICE void idle() {
    for (int i = 0; i < panels.count * (D::kPanel / D::kXPanel); i++) {
      ptx::mbarrier_wait_long(x_full + x_stage * 8, x_parity);
      release(x_stage);
      advance();
    }
  }

  static FLUTE_DEVICE u32 scale_pair(u32 a, u32 scale) {
    if constexpr (kSameDtype) return D::Act::multiply2(a, scale);
    const float s = __uint_as_float(scale);
    const u32 lo = D::Act::from_float(D::Act::to_float(static_cast<u16>(a)) * s),
              hi = D::Act::from_float(D::Act::to_float(static_cast<u16>(a >> 16)) * s);
    return lo | hi << 16;
  }

  // Scales of a slot, rows g and g + 8 of each unit: fp32 bits, or pairs (scale_pair).
  FLUTE_DEVICE void load_scales(u32 (&scale)[kUnits][2], u32 slot) const {
#pragma unroll
    for (int u = 0; u < D::kUnits; u++) {
      const u32 address =
          slot + D::kWeightBytes + ((lane >> 2) * 2 + u * 16) * D::Scale::kBytes;
      if constexpr (D::kScaleWeights && kSameDtype) {
        const u32 s = ptx::ld_shared(address);
        scale[u][0] = __byte_perm(s, s, 0x1010);
        scale[u][1] = __byte_perm(s, s, 0x3232);
      } else {
        float lo, hi;
        D::Scale::load_pair(lo, hi, address);
        scale[u][0] = __float_as_uint(lo);
        scale[u][1] = __float_as_uint(hi);
      }
    }
  }

  // All of them are in registers here. Why: lookups are free to move, and one between two wgmma
  // makes ptxas run these one by one.
  static FLUTE_DEVICE void pin(u32 (&a)[D::kBatch][4]) {
#pragma unroll
    for (int st = 0; st < D::kBatch; st++)
      asm volatile("" : "+r"(a[st][0]), "+r"(a[st][1]), "+r"(a[st][2]), "+r"(a[st][3])::"memory");
  }

  // Start the lookups of batch `idx` of a panel.
  FLUTE_DEVICE void look_up(u32 (&frag)[D::kBatch][4], const u32 (&bytes)[D::Steps::kWords],
                            int idx) const {
#pragma unroll
    for (int i = 0; i < D::kBatch; i++)
      D::Steps::template fragments<D::kRowTables>(frag[i], bytes, (idx * D::kBatch + i) % 4, table,
                                                  offset);
  }

  FLUTE_DEVICE void scale_weights(u32 (&frag)[D::kBatch][4], const u32 (&scale)[kUnits][2],
                                  int idx) const {
    if constexpr (D::kScaleWeights)
#pragma unroll
      for (int i = 0; i < D::kBatch; i++)
#pragma unroll
        for (int r = 0; r < 4; r++)
          frag[i][r] =
              scale_pair(frag[i][r], scale[(idx * D::kBatch + i) / D::kUnitSteps][r % 2]);
  }

  FLUTE_DEVICE void run(float (&acc)[kAcc]) {
    constexpr int kPerChunk = 4 / D::kBatch, kPerPanel = D::kPanel * kPerChunk;
    float sum[D::kSumBuffers][kSums];
    float sum_scale[D::kSumBuffers][2];  // of the group in `sum`: rows g and g + 8
#pragma unroll
    for (int b = 0; b < D::kSumBuffers; b++) {
      sum_scale[b][0] = sum_scale[b][1] = 0.f;
#pragma unroll
      for (int i = 0; i < kSums; i++) sum[b][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAcc; i++) acc[i] = 0.f;
    const auto add_sums = [&](int b) {
#pragma unroll
      for (int i = 0; i < kSums; i++) acc[i] += sum_scale[b][i / 2 % 2] * sum[b][i];
    };

    u32 a[D::kBuffers][D::kBatch][4], words[D::Table::kWords], bytes[D::Steps::kWords],
        scale[kUnits][2];
    u32 previous = 0;  // stage of x that the wgmma still running may read
    u32 slot = ring.wait();
    D::Table::load(words, slot, lane);
    load_scales(scale, slot);
    D::Steps::split(bytes, words);
    if constexpr (D::kAhead) look_up(a[0], bytes, 0);
#pragma unroll 1
    for (int panel = 0; panel < panels.count; panel++) {
      const bool more = panel + 1 < panels.count;
      const u32 stage = ring.stage;
      u32 x = 0;
#pragma unroll
      for (int idx = 0; idx < kPerPanel; idx++) {
        const int j = idx / kPerChunk;
        // The next chunk's words are on their way while this one is looked up.
        if (idx % kPerChunk == 0) {
          if (j < D::kPanel - 1) {
            D::Table::load(words, slot + (j + 1) * D::Table::kChunkBytes, lane);
          } else {
            ring.advance();
            if (more) {
              slot = ring.wait();
              D::Table::load(words, slot, lane);
            }
          }
        }
        const bool last = (idx + 1) % kPerChunk == 0;  // of the chunk
        u32(&frag)[D::kBatch][4] = a[idx % D::kBuffers];
        if constexpr (D::kAhead) {
          if (last) D::Steps::split(bytes, words);
          if (idx + 1 < kPerPanel || more)
            look_up(a[(idx + 1) % D::kBuffers], bytes, (idx + 1) % kPerPanel);
        } else {
          look_up(frag, bytes, idx);
          if (last) D::Steps::split(bytes, words);
        }
        if (idx % (D::kXPanel * kPerChunk) == 0) {
          if (idx > 0) advance();
          ptx::mbarrier_wait(x_full + x_stage * 8, x_parity);
          x = ptx::wgmma_descriptor_low(smem + x_stage * D::kXStageBytes);
        }
        scale_weights(frag, scale, idx);
        pin(frag);
        const bool begins = idx * D::kBatch % D::kUnitSteps == 0;  // a group
        const int unit = idx * D::kBatch / D::kUnitSteps, b = unit % D::kSumBuffers;
        if constexpr (D::kScaleSums) {
          if (begins) {
            if (D::kSumBuffers == 1) {
              ptx::wgmma_wait<0>();
              add_sums(0);
            }
            sum_scale[b][0] = __uint_as_float(scale[unit][0]);
            sum_scale[b][1] = __uint_as_float(scale[unit][1]);
          }
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < D::kBatch; i++) {
          const u64 descriptor = ptx::wgmma_descriptor(
              x + ((j % D::kXPanel * D::kXChunkBytes) >> 4) + (idx * D::kBatch + i) % 4 * 2);
          if constexpr (D::kScaleSums)
            Config::wgmma(sum[b], frag[i], descriptor, !(begins && i == 0));
          else
            Config::wgmma(acc, frag[i], descriptor, true);
        }
        ptx::wgmma_commit();
        if (idx + 1 == kPerPanel) {  // the slot is in registers: refill it
          __syncwarp();
          feed.fill(ring, stage, p, lane);
          if (more) load_scales(scale, slot);
        }
        // At most so many batches still run: the others' fragments, sums and x are free. Why one at
        // the end: ptxas does not see across the loop's.
        if (idx + 1 < kPerPanel)
          ptx::wgmma_wait<D::kRunning>();
        else
          ptx::wgmma_wait<1>();
        constexpr int kNewest = D::kRunning - 1;  // batches since which the one before is done
        if constexpr (D::kScaleSums && D::kSumBuffers == 2) {
          if (idx > kNewest && idx * D::kBatch % D::kUnitSteps == kNewest * D::kBatch)
            add_sums(b ^ 1);
          if (idx + 1 == kPerPanel) {
            ptx::wgmma_wait<0>();
            add_sums(b);
          }
        }
        if (idx % (D::kXPanel * kPerChunk) == kNewest) {
          if (idx >= kPerChunk || panel > 0) release(previous);
          previous = x_stage;
        }
      }
      advance();
    }
    ptx::wgmma_wait<0>();
    if constexpr (D::kScaleSums && D::kSumBuffers == 1) add_sums(0);
    release(previous);
  }
};

// Sums of a warpgroup's unit -> out.
template <class D>
struct Epilogue {
  static constexpr int kAcc = D::kTokens / 2;
  const BatchParams& p;
  u32 partials, ready, read, rank;
  int warpgroup, lane, thread;  // of the warpgroup
  u32 parity = 0;

  FLUTE_DEVICE void sync() const { ptx::named_barrier(1 + warpgroup, 128); }

  FLUTE_DEVICE void run(const float (&acc)[kAcc], int block, int token_tile) {
    const int g = lane >> 2, q = lane & 3, row = (thread / 32) * 16 + g;
#pragma unroll
    for (int slab = 0; slab < D::kTokens / D::kSlab; slab++) {
      if (token_tile * D::kTokens + slab * D::kSlab >= p.shape_m) break;
      if constexpr (D::kCluster > 1)  // the other ranks have read the last slab
        ptx::mbarrier_wait_cluster(read, parity ^ 1);
#pragma unroll
      for (int j = 0; j < D::kSlab / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          ptx::st_shared_f32(
              partials + ((j * 8 + q * 2 + (i & 1)) * D::kPartialStride + row + (i >> 1) * 8) * 4,
              acc[(slab * D::kSlab / 8 + j) * 4 + i]);
      sync();
      if constexpr (D::kCluster > 1) {
        if (thread < D::kCluster) ptx::mbarrier_arrive_cluster(ptx::mapa(ready, thread));
        ptx::mbarrier_wait_cluster(ready, parity);
      }
      const int first = D::kCluster > 1 ? thread * D::kCluster + static_cast<int>(rank) : thread;
#pragma unroll 1
      for (int i = first; i < D::kSlab * 8; i += 128 * D::kCluster)
        store(i, block, token_tile * D::kTokens + slab * D::kSlab + i / 8);
      sync();
      if constexpr (D::kCluster > 1) {
        if (thread < D::kCluster) ptx::mbarrier_arrive_cluster(ptx::mapa(read, thread));
        parity ^= 1;
      }
    }
  }

  // 8 rows of one token.
  FLUTE_DEVICE void store(int i, int block, int token) const {
    if (token >= p.shape_m) return;
    const int n = block * 64 + i % 8 * 8;
    if (n >= p.shape_n) return;
    const u32 at = partials + (i / 8 * D::kPartialStride + i % 8 * 8) * 4;
    float v[8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float part[4];
      if constexpr (D::kCluster > 1) {
        ptx::ld_cluster_v4_f32(part, ptx::mapa(at + h * 16, 0));
#pragma unroll 1  // the sums of later slabs still need their registers
        for (int r = 1; r < D::kCluster; r++) {
          float other[4];
          ptx::ld_cluster_v4_f32(other, ptx::mapa(at + h * 16, r));
#pragma unroll
          for (int j = 0; j < 4; j++) part[j] += other[j];
        }
      } else {
        u32 bits[4];
        ptx::ld_shared_v4(bits, at + h * 16);
#pragma unroll
        for (int j = 0; j < 4; j++) part[j] = __uint_as_float(bits[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) v[h * 4 + j] = part[j];
    }
    u16* out = static_cast<u16*>(p.out) + static_cast<long long>(token) * p.shape_n + n;
    const int count = min(8, p.shape_n - n);
    u32 packed[4];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float sum = v[j];
      if (j < count) {
        if constexpr (D::kGroup == 0) sum *= D::Scale::load_global(p.scales, n + j);
        if (p.bias != nullptr) sum += D::Act::load_global(p.bias, n + j);
      }
      const u32 half = D::Act::from_float(sum);
      packed[j / 2] = j % 2 ? packed[j / 2] | half << 16 : half;
    }
    if (p.shape_n % 8 == 0) {
      ptx::st_global_v4(out, packed);
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (j < count) ptx::st_global_u16(out + j, static_cast<u16>(packed[j / 2] >> (j % 2 * 16)));
    }
  }
};

template <class D>
FLUTE_DEVICE void produce_x(const BatchParams& p, const Panels& panels, u32 smem, u32 x_full,
                            u32 x_empty) {
  u32 stage = 0, parity = 0;
  for (Passes<D> passes(p); !passes.done(); passes.next(p))
#pragma unroll 1
    for (int i = 0; i < panels.count * (D::kPanel / D::kXPanel); i++) {
      ptx::mbarrier_wait_long(x_empty + stage * 8, parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(x_full + stage * 8, D::kXStageBytes);
#pragma unroll
      for (int j = 0; j < D::kXPanel; j++)
        ptx::cp_async_bulk_tensor(smem + stage * D::kXStageBytes + j * D::kXChunkBytes, p.x_map,
                                  (panels.begin * D::kPanel + i * D::kXPanel + j) * 64,
                                  passes.token_tile * D::kTokens, x_full + stage * 8);
      if (++stage == D::kXStages) {
        stage = 0;
        parity ^= 1;
      }
    }
}

template <class Config>
FLUTE_DEVICE void consume(const BatchParams& p, typename Batch<Config>::Ring& ring,
                          Feed<Batch<Config>>& feed, const Panels& panels, u32 smem, u32 rank,
                          int warp, int lane) {
  using D = Batch<Config>;
  const int warpgroup = warp / 4;
  const u32 barriers = smem + D::kBarrierOffset, smem_table = smem + D::kTableOffset;
  u32 offset = D::kRowTables ? lane * 4 : D::Steps::lane_offset(lane);
  offset = __shfl_sync(0xFFFFFFFFu, offset, lane);  // opaque: see decode.cuh
  const u32 table = smem_table + (D::kRowTables ? warp * D::kRowTableBytes : 0);
  Consumer<Config> consumer{p,
                            ring,
                            feed,
                            panels,
                            smem,
                            barriers + D::kXFull * 8,
                            barriers + D::kXEmpty * 8,
                            table,
                            offset,
                            lane};
  Epilogue<D> epilogue{p,
                       smem + D::kPartialOffset + warpgroup * D::kPartialBytes,
                       barriers + (D::kReady + warpgroup) * 8,
                       barriers + (D::kRead + warpgroup) * 8,
                       rank,
                       warpgroup,
                       lane,
                       static_cast<int>(threadIdx.x % 128)};
  bool waited = false;
  int range = -1;
#pragma unroll 1
  for (Passes<D> passes(p); !passes.done(); passes.next(p)) {
    if (!D::kRowTables && (range < 0 || p.num_ranges > 1) && range != passes.range(p)) {
      const bool first = range < 0;
      range = passes.range(p);
      if (!first) {
        constexpr int kAll = 1 + D::kWarpgroups;  // barrier of all consumers
        ptx::named_barrier(kAll, D::kWarps * 32);
        build_table<D>(smem_table, p, range, D::kWarps * 32);
        ptx::named_barrier(kAll, D::kWarps * 32);
      }
    }
    if (warpgroup >= passes.count) {
      consumer.idle();
      continue;
    }
    const int block = passes.block + warpgroup;
    if constexpr (D::kRowTables) {
      __syncwarp();
      build_row_table<D>(smem_table + warp * D::kRowTableBytes, static_cast<const float*>(p.table),
                         block * 64 + warp % 4 * 16, p.shape_n, lane);
      __syncwarp();
    }
    float acc[D::kTokens / 2];
    consumer.run(acc);
    if (!waited) ptx::griddepcontrol_wait();  // `out` may be read by the previous kernel
    waited = true;
    epilogue.run(acc, block, passes.token_tile);
  }
  // A block must not leave while another of its cluster reads its sums.
  if constexpr (D::kCluster > 1) ptx::mbarrier_wait_cluster(epilogue.read, epilogue.parity ^ 1);
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

  // The weights' flight needs nothing from the previous kernel, nor from the other warps.
  typename D::Ring ring(smem + D::kRingOffset + warp * Config::stages * D::Ring::kSlotBytes,
                        barriers + warp * D::Ring::kNumBarriers * 8);
  Feed<D> feed(p, panels, min(warp, D::kWarps - 1));
  if (warp < D::kWarps) {
    if (lane == 0) ring.init();
    ptx::fence_mbarrier_init();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < Config::stages; i++) feed.fill(ring, i, p, lane);
  } else if (warp == D::kWarps && lane == 0) {
    ptx::prefetch_tensor_map(p.x_map);
    for (int i = 0; i < D::kXStages; i++) {
      ptx::mbarrier_init(x_full + i * 8, 1);
      ptx::mbarrier_init(x_empty + i * 8, D::kWarps);
    }
    for (int i = 0; i < D::kWarpgroups; i++) {
      ptx::mbarrier_init(barriers + (D::kReady + i) * 8, D::kCluster);
      ptx::mbarrier_init(barriers + (D::kRead + i) * 8, D::kCluster);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::griddepcontrol_launch_dependents();
  if constexpr (!D::kRowTables)
    build_table<D>(smem + D::kTableOffset, p, Passes<D>(p).range(p), D::kThreads);
  __syncthreads();
  if constexpr (D::kCluster > 1) ptx::cluster_sync();

  if (warp >= D::kWarps) {
    ptx::setmaxnreg_dec<24>();
    if (warp == D::kWarps) {
      ptx::griddepcontrol_wait();
      if (ptx::elect_one()) produce_x<D>(p, panels, smem, x_full, x_empty);
    }
  } else {
    ptx::setmaxnreg_inc<D::kRegisters>();
    consume<Config>(p, ring, feed, panels, smem, rank, warp, lane);
  }
}

}  // namespace flute
