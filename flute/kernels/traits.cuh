// What is known about a decode kernel at compile time: its parameters, sizes and offsets, and the
// rules they obey. Owns no code that runs. The picture these constants describe is at the top of
// decode.cuh.
#pragma once
#include "element.cuh"
#include "register_lookup.cuh"
#include "ring.cuh"

namespace flute {

// Where a panel's x comes from each time it is needed. Registers: read once, kept (K of a warp is
// short); shared memory: read once per tile block; global memory (L1, L2): the way out when x fits
// neither; streamed: from global memory (L2) one round ahead, for blocks with one or two tile
// blocks, where keeping x would save little and phases of K would cost more.
enum XSource : int { kXShared = 0, kXGlobal = 1, kXRegisters = 2, kXStreamed = 3 };

// Passed by value; flute/launchers.py packs the same fields in the same order.
struct DecodeParams {
  const void* x;       // (M, K), activations' dtype, 16-byte aligned
  const void* packed;  // (tiles, num_chunks, chunk bytes)
  const void* scales;  // (tiles, num_chunks * 64 / GROUP, 8, 2); whole row: (tiles * 16)
  const void* table;   // (num_ranges or N, 2**NUM_BITS) fp32
  const void* bias;    // (N) in the activations' dtype, or null
  float* workspace;    // (M, N), unless num_phases is 1: sums of the phases so far
  void* out;           // (M, N)
  int shape_m, shape_n, shape_k;
  int num_chunks;  // K padded to a multiple of 256, / 64
  int x_stride;    // bytes between two tokens of x in shared memory
  int x_stage;     // chunks of x that are transposed at once, a power of two up to 8
  int tiles_each;  // of a cluster; the first `tiles_rest` have one more
  int tiles_rest;
  int num_phases;    // K is done in so many parts, one after the other
  int num_ranges;    // tables in use, at most 8: tiles [range_end[i-1], range_end[i]) use table i
  int range_end[8];  // in tiles
  int early_dependents;  // 1: the next kernel may start while the previous one runs
};

// The kernel's shape. `Config` is a generated struct of constants; config.py says what each may be.
template <class Config>
struct Decode {
  static constexpr int kBits = Config::num_bits;
  static constexpr int kGroup = Config::group_size;  // 0: the whole row
  static constexpr int kWarps = Config::num_warps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kPanel = Config::panel;
  static constexpr int kTiles = Config::tiles;
  static constexpr int kCluster = Config::cluster;
  static constexpr int kColumns = Config::block_tokens / 8;  // mma column blocks
  static constexpr bool kXStays = Config::x_source == kXRegisters;
  static constexpr bool kPhased = Config::phased;  // more than one phase
  static constexpr int kXRounds =
      kXStays ? Config::x_rounds : 1;  // rounds whose x is in registers at once
  static constexpr bool kRowTables = Config::row_tables;
  // Of the 8 steps of two chunks, so many are looked up in registers (register_lookup.cuh), the
  // first ones of each chunk first; at 2 bits the two steps of a word go together.
  static constexpr int kRegisterSteps = Config::register_steps;
  static constexpr bool kWideTable = Config::wide_table;
  static constexpr bool kAllInRegisters = kRegisterSteps == 8;
  static constexpr FLUTE_DEVICE bool in_registers(int chunk, int step) {
    const int turn = kBits == 2 ? step / 2 * 4 + chunk % 2 * 2 : step * 2 + chunk % 2;
    return kAllInRegisters || turn < kRegisterSteps;
  }
  static constexpr int kPartChunks = Config::part;  // chunks whose words are in registers at once

  using Act = Element<Config::dtype>;
  using Scale = Element<Config::scale_dtype>;
  using Table = Lookup<kBits>;

  // Groups in mma steps (16 k) and the part of a group that one panel covers.
  static constexpr int kPanelSteps = kPanel * 4;
  static constexpr int kGroupSteps = kGroup == 0 ? kPanelSteps : kGroup / 16;
  static constexpr int kUnitSteps = kGroupSteps < kPanelSteps ? kGroupSteps : kPanelSteps;
  static constexpr int kUnits =
      kGroup == 0 ? 0 : kPanelSteps / kUnitSteps;  // scales per row and panel
  static constexpr int kWeightBytes = kPanel * Table::kChunkBytes;
  static constexpr int kScaleBytes = kUnits * 16 * Scale::kBytes;

  template <bool BULK, int S, int A, int B>
  struct PickRing {
    using Type = BulkRing<S, A, B>;
  };
  template <int S, int A, int B>
  struct PickRing<false, S, A, B> {
    using Type = AsyncRing<S, A, B>;
  };
  using Ring = typename PickRing<Config::bulk, Config::stages, kWeightBytes, kScaleBytes>::Type;

  // With one table per row, the tables of the next tile block are built while those of this one are
  // in use, if there is room for both.
  using Rows = RowTables<kBits, Act, kTiles, kThreads>;
  static constexpr int kRowBuffers = Config::row_buffers;
  static constexpr int kBufferBytes = kTiles * Table::kRowTableBytes;
  static constexpr int kRawOffset = 2 * kBufferBytes;  // of two buffers of tables as they are
  static constexpr FLUTE_DEVICE int table_bytes() {
    if constexpr (kRowTables)
      return kRowBuffers == 2 ? kRawOffset + 2 * Rows::kRawBytes : kBufferBytes;
    else if constexpr (kAllInRegisters)
      return 0;
    else if constexpr (kWideTable)
      return Table::kWideTableBytes;
    else
      return Table::kTableBytes;
  }
  static constexpr int kTableBytes = table_bytes();
  static constexpr int kRingOffset = kTableBytes;
  static constexpr int kBarrierOffset = kRingOffset + kWarps * Config::stages * Ring::kSlotBytes;
  static constexpr int kXBarriers =
      kWarps * Ring::kNumBarriers;  // index of the first; warp * num_rounds + round
  static constexpr int kPartialStride =
      kTiles * 16 + 4;  // floats; + 4: tokens 8 banks apart for lanes q

  static_assert(kBits >= 2 && kBits <= 4, "tables of 2, 3 or 4 bits");
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128 || kGroup == 256,
                "a group is 32, 64, 128 or 256 k, or 0 for the whole row");
  static_assert(kRegisterSteps == 0 || !kRowTables, "registers hold one table");
  static_assert(kRegisterSteps >= 0 && kRegisterSteps <= 8 &&
                    (kBits > 2 || kRegisterSteps % 2 == 0),
                "steps of two chunks; at 2 bits words of two steps");
  static_assert(!kWideTable || !kRowTables, "one table");
  static_assert(kRowBuffers == 1 || kRowBuffers == 2, "tables of one or two tile blocks");
  static_assert(!kPhased || kXStays, "phases are of x in registers");
  static_assert(kXRounds <= 2, "registers hold x of two rounds at most");
  static_assert(kPanel == 1 || kPanel == 2 || kPanel == 4 || (kPanel == 8 && kXStays),
                "K is padded to 4 chunks; panels of 8 need K % 512 == 0 and, since fetch_x has 32 "
                "lanes, x in registers");
  static_assert(Config::block_tokens % 8 == 0 && kColumns >= 1 && kColumns <= 4,
                "8, 16, 24 or 32 tokens");
  static_assert(kCluster == 1 || Config::bulk, "clusters need sm_90, as bulk copies do");
};

}  // namespace flute
