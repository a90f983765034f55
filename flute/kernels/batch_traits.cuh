// What is known about a batch kernel at compile time: its parameters, sizes and offsets, and the
// rules they obey. Owns no code that runs; the picture is at the top of batch.cuh.
#pragma once
#include "register_lookup.cuh"
#include "ring.cuh"
#include "step_lookup.cuh"

namespace flute {

// Passed by value; flute/launchers.py packs the same fields in the same order.
struct BatchParams {
  alignas(64) u8 x_map[128];  // CUtensorMap of x (M, K), box (TOKENS, 64), 128-byte swizzle
  const void* packed;         // (tiles, num_chunks, chunk bytes)
  const void* scales;         // (tiles, num_chunks * 64 / GROUP, 8, 2); whole row: (tiles * 16)
  const void* table;          // (num_ranges or N, 2**NUM_BITS) fp32
  const void* bias;           // (N) in the activations' dtype, or null
  void* out;                  // (M, N)
  int shape_m, shape_n;
  int num_chunks;        // K padded to a multiple of 256, / 64
  int num_token_tiles;   // of TOKENS tokens
  int units_each;        // of a cluster: 64 rows times a token tile
  int units_rest;        // so many clusters have one more
  int num_ranges;        // tables in use, at most 8
  int range_end[8];      // in tiles, multiples of 4: tiles before it use table i
  int early_dependents;  // 1: the next kernel may start while the previous one runs
};

template <class Config>
struct Batch {
  static constexpr int kBits = Config::num_bits;
  static constexpr int kGroup = Config::group_size;  // 0: the whole row
  static constexpr int kTokens = Config::tokens;
  static constexpr int kWarpgroups = Config::warpgroups;
  static constexpr int kWarps = kWarpgroups * 4;      // consumers
  static constexpr int kThreads = (kWarps + 4) * 32;  // and the producer's warpgroup
  // Registers of a consumer thread; the producer gives them its own (setmaxnreg), of those that the
  // launch bound leaves a block: 96, 128 or 168 a thread.
  static constexpr int kRegisters = kWarpgroups == 4 ? 112 : kWarpgroups == 3 ? 160 : 240;
  static constexpr int kPanel = Config::panel;
  static constexpr int kXStages = Config::x_stages;
  static constexpr int kXPanel = Config::x_panel;  // chunks of a stage of x
  static constexpr int kCluster = Config::cluster;
  // Warpgroups split K by panels, and each takes all units of a pass; else each takes a unit.
  static constexpr bool kSplitK = Config::split_k;
  static constexpr int kPassUnits = kSplitK ? Config::units : kWarpgroups;
  static constexpr int kAccs = kSplitK ? Config::units : 1;  // units of a warpgroup
  static constexpr int kShares = kSplitK ? kWarpgroups : 1;  // of K in a block, each with its x
  static constexpr int kGroups = kSplitK ? 1 : kWarpgroups;  // that store units of their own
  static constexpr int kGroupThreads = kWarps * 32 / kGroups;
  // compute-sanitizer's racecheck cannot follow an arrival by one thread for others; an arrival by
  // each takes 8 us in a cluster of 4.
#ifdef FLUTE_RACECHECK
  static constexpr bool kEachArrives = true;
#else
  static constexpr bool kEachArrives = false;
#endif
  static constexpr int kArrivals = kCluster * (kEachArrives ? kGroupThreads : 1);
  static constexpr bool kRowTables = Config::row_tables;
  static constexpr bool kScaleSums = Config::scale_sums && kGroup != 0;
  static constexpr bool kScaleWeights = !Config::scale_sums && kGroup != 0;

  using Act = Element<Config::dtype>;
  using Scale = Element<Config::scale_dtype>;
  using Table = Lookup<kBits>;
  using Steps = StepLookup<kBits>;
  // Of the 8 steps of two chunks, so many are looked up in registers, as in decode.cuh.
  static constexpr int kRegisterSteps = Config::register_steps;
  static constexpr FLUTE_DEVICE bool in_registers(int chunk, int step) {
    const int turn = kBits == 2 ? step / 2 * 4 + chunk % 2 * 2 : step * 2 + chunk % 2;
    return turn < kRegisterSteps;
  }
  static constexpr int kBatch = Config::batch;      // steps per group of wgmma
  static constexpr int kBuffers = Config::buffers;  // batches whose fragments are in registers
  // With four, a batch is looked up before the one ahead of it is multiplied.
  static constexpr bool kAhead = kBuffers == 4;

  static constexpr int kPanelSteps = kPanel * 4;
  static constexpr int kGroupSteps = kGroup == 0 ? kPanelSteps : kGroup / 16;
  static constexpr int kUnitSteps = kGroupSteps < kPanelSteps ? kGroupSteps : kPanelSteps;
  static constexpr int kUnits = kGroup == 0 ? 0 : kPanelSteps / kUnitSteps;
  // Two, so that a group can be scaled while the next is multiplied.
  static constexpr int kSumBuffers =
      kScaleSums && kUnits % 2 == 0 && Config::sum_buffers == 2 ? 2 : 1;
  static constexpr int kWeightBytes = kPanel * Table::kChunkBytes;
  static constexpr int kScaleBytes = kUnits * 16 * Scale::kBytes;
  using Ring = BulkRing<Config::stages, kWeightBytes, kScaleBytes>;

  static constexpr int kXChunkBytes = kTokens * 128;
  static constexpr int kXStageBytes = kXPanel * kXChunkBytes;
  static constexpr int kRowTableBytes = 128 << kBits;  // of a tile: a column of entries per lane
  static constexpr int kXParts = kPanel / kXPanel;     // stages of x of a panel
  static constexpr int kSlab = kTokens % 32 == 0 && !kSplitK       ? 32
                               : kTokens > 32 || kTokens % 16 == 0 ? 16
                                                                   : kTokens;
  static constexpr int kPartialStride = 64 + 4;  // floats; + 4: no bank conflicts for lanes q
  static constexpr int kPartialBytes = kSlab * kPartialStride * 4;  // of a warpgroup

  static constexpr int kRowTableCount = kSplitK ? kAccs * 4 : kWarps;  // tiles of a pass
  static constexpr int kTableOffset = kShares * kXStages * kXStageBytes;
  static constexpr int kRingOffset =
      kTableOffset + (kRowTables ? kRowTableCount * kRowTableBytes : Steps::kTableBytes);
  static constexpr int kPartialOffset = kRingOffset + kWarps * Config::stages * Ring::kSlotBytes;
  static constexpr int kBarrierOffset = kPartialOffset + kWarpgroups * kPartialBytes;
  // Barriers: rings, x full, x empty per share of K, sums ready and sums read per group.
  static constexpr int kXFull = kWarps * Ring::kNumBarriers;
  static constexpr int kXEmpty = kXFull + kShares * kXStages;
  static constexpr int kReady = kXEmpty + kShares * kXStages;
  static constexpr int kRead = kReady + kGroups;
  static constexpr int kSmemBytes = kBarrierOffset + (kRead + kGroups) * 8;

  static_assert(kSmemBytes == Config::smem_bytes, "what a launch asks for");
  static_assert(kBits >= 2 && kBits <= 4, "tables of 2, 3 or 4 bits");
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128 || kGroup == 256,
                "a group is 32, 64, 128 or 256 k, or 0 for the whole row");
  static_assert(kWarpgroups >= 2 && kWarpgroups <= 4, "of consumers");
  static_assert(kTokens % 8 == 0 && kTokens >= 8 && kTokens <= 256, "n of wgmma");
  static_assert(kRegisterSteps == 0 || !kRowTables, "registers hold one table");
  static_assert(kRegisterSteps >= 0 && kRegisterSteps <= 8 &&
                    (kBits > 2 || kRegisterSteps % 2 == 0),
                "steps of two chunks; at 2 bits words of two steps");
  static_assert(kBatch == 4 || kBatch == 2, "steps that fragments are held for");
  static_assert(kBuffers == 2 || kBuffers == 4, "of fragments");
  static_assert(kPanelSteps / kBatch % kBuffers == 0, "buffers are fixed at compile time");
  static_assert(kPanel % kXPanel == 0, "stages of x");
  static_assert(!kSplitK || kXStages > kXParts, "a panel of x stays for all units");
  static_assert(!kScaleSums || kUnitSteps % kBatch == 0, "a batch is of one group");
  static_assert(kPanel == 1 || kPanel == 2 || kPanel == 4, "K is padded to 4 chunks");
};

}  // namespace flute
