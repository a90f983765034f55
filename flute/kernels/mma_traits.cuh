// What is known about an mma kernel at compile time: its parameters, sizes and offsets, and the
// rules they obey. Owns no code that runs; the picture is at the top of mma.cuh.
#pragma once
#include "step_lookup.cuh"

namespace flute {

// Passed by value; flute/launchers.py packs the same fields in the same order.
struct MmaParams {
  const void* x;       // (M, K), activations' dtype, 16-byte aligned
  const void* packed;  // (tiles, num_chunks, chunk bytes)
  const void* scales;  // (tiles, num_chunks * 64 / GROUP, 8, 2); whole row: (tiles * 16)
  const void* table;   // (num_ranges or N, 2**NUM_BITS) fp32
  const void* bias;    // (N) in the activations' dtype, or null
  float* workspace;    // (2 * num_pieces, TOKENS, rows of a unit): sums of parts of units
  void* out;           // (M, N)
  int shape_m, shape_n, shape_k;
  int num_chunks;       // K padded to a multiple of 256, / 64
  int num_token_tiles;  // of TOKENS tokens
  int num_row_blocks;   // of all ranges, see unit_at
  int num_pieces;       // of all work: blocks of the first launch
  int grain;            // steps that are not parted: 1, or those of a unit
  int sums;             // 0: multiply; 1: sum the parts of units, in a second launch
  int num_ranges;    // tables in use, at most 8: tiles [range_end[i-1], range_end[i]) use table i
  int range_end[8];  // in tiles
  int early_dependents;  // 1: the next kernel may start while the previous one runs
};

// The kernel's shape. `Config` is a generated struct of constants; flute/mma.py says what each may
// be.
template <class Config>
struct Mma {
  static constexpr int kBits = Config::num_bits;
  static constexpr int kGroup = Config::group_size;  // 0: the whole row
  static constexpr int kTokens = Config::tokens;
  static constexpr int kColumns = kTokens / 8;     // mma column blocks
  static constexpr int kWarpsN = Config::warps_n;  // side by side along N
  static constexpr int kWarpsK =
      Config::warps_k;                            // that share rows and split the chunks of a stage
  static constexpr int kTiles = Config::tiles;    // of a warp, 16 rows each
  static constexpr int kChunks = Config::chunks;  // of a stage, 64 k each
  static constexpr int kStages = Config::stages;
  static constexpr bool kAhead = Config::ahead;  // look up a chunk ahead of its use
  static constexpr bool kRowTables = Config::row_tables;
  static constexpr bool kScaleSums = Config::scale_sums && kGroup != 0;
  static constexpr bool kScaleWeights = !Config::scale_sums && kGroup != 0;
  static constexpr bool kSameDtype = Config::dtype == Config::scale_dtype;

  using Act = Element<Config::dtype>;
  using Scale = Element<Config::scale_dtype>;
  using Table = Lookup<kBits>;
  using Steps = StepLookup<kBits>;

  static constexpr int kWarps = kWarpsN * kWarpsK;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kUnitTiles = kWarpsN * kTiles;
  static constexpr int kRows = kUnitTiles * 16;  // of a unit

  // A stage: x (chunk, token, 64 k), weights (tile, chunk), scales (tile, group).
  static constexpr int kXChunkBytes = kTokens * 128;
  static constexpr int kTileBytes = kChunks * Table::kChunkBytes;
  static constexpr int kGroupSteps = kGroup == 0 ? 4 : kGroup / 16;  // mma steps of 16 k
  static constexpr int kGroups = kGroup == 0             ? 0
                                 : kGroup > kChunks * 64 ? 1
                                                         : kChunks * 64 / kGroup;  // per row
  static constexpr int kScaleBytes = kGroups * 16 * Scale::kBytes;                 // of a tile
  static constexpr int kWeightOffset = kChunks * kXChunkBytes;
  static constexpr int kScaleOffset = kWeightOffset + kUnitTiles * kTileBytes;
  static constexpr int kStageBytes = kScaleOffset + kUnitTiles * kScaleBytes;

  static constexpr int kRowTableBytes = 128 << kBits;  // of a tile: a column of entries per lane
  static constexpr int kStageOffset = kRowTables ? kUnitTiles * kRowTableBytes : Table::kTableBytes;
  static constexpr int kPartialOffset = kStageOffset + kStages * kStageBytes;
  static constexpr int kPartialStride = kRows + 4;  // floats; + 4: no bank conflicts for lanes q
  static constexpr int kPartialBytes = 8 * kPartialStride * 4;  // of 8 tokens and a warp of K
  static constexpr int kSmemBytes = kPartialOffset + kWarpsK * kPartialBytes;

  static_assert(kSmemBytes == Config::smem_bytes, "what a launch asks for");
  static_assert(kBits >= 2 && kBits <= 4, "tables of 2, 3 or 4 bits");
  static_assert(kGroup == 0 || kGroup == 32 || kGroup == 64 || kGroup == 128 || kGroup == 256,
                "a group is 32, 64, 128 or 256 k, or 0 for the whole row");
  static_assert(kTokens % 16 == 0 && kTokens > 0, "ldmatrix reads 16 tokens");
  static_assert(kChunks == 1 || kChunks == 2 || kChunks == 4, "K is padded to 4 chunks");
  static_assert(kChunks % kWarpsK == 0, "each warp has as many chunks of a stage");
  static_assert(kStages >= 2 + kAhead, "a stage is filled while another, or two, are used");
  static_assert(kStageBytes % 128 == 0 && kStageOffset % 128 == 0, "rows of x are swizzled");
  static_assert(kScaleBytes <= 512, "a lane copies 16 bytes of a tile's scales");
};

}  // namespace flute
