// Who does what in an mma kernel, in which order: units, pieces, and the copies of a block's
// stages.
#pragma once
#include "mma_traits.cuh"

namespace flute {

// A unit: some rows, all of one table, for one tile of tokens, over all of K.
struct MmaUnit {
  int token_tile, tile, tile_end, range;  // tiles of 16 rows: at most kUnitTiles
};

// Units go through the rows first. Each range of rows is parted anew, so that any ranges of whole
// tiles do.
template <class D>
FLUTE_DEVICE MmaUnit unit_at(const MmaParams& p, int unit) {
  MmaUnit found;
  found.token_tile = unit / p.num_row_blocks;
  int block = unit - found.token_tile * p.num_row_blocks, begin = 0, range = 0;
  for (; range + 1 < p.num_ranges; range++) {
    const int blocks = (p.range_end[range] - begin + D::kUnitTiles - 1) / D::kUnitTiles;
    if (block < blocks) break;
    block -= blocks;
    begin = p.range_end[range];
  }
  found.range = range;
  found.tile = begin + block * D::kUnitTiles;
  found.tile_end = min(found.tile + D::kUnitTiles, p.range_end[range]);
  return found;
}

// Steps are the stages of all units, one unit after the other. A piece is a block's run of them;
// their sizes differ by a grain at most.
template <class D>
struct MmaPieces {
  int steps, grains, grain, count;  // of a unit; of all of them

  FLUTE_DEVICE explicit MmaPieces(const MmaParams& p)
      : steps(p.num_chunks / D::kChunks), grain(p.grain), count(p.num_pieces) {
    grains = p.num_row_blocks * p.num_token_tiles * (steps / grain);
  }
  FLUTE_DEVICE int begin(int piece) const {
    return static_cast<int>(static_cast<long long>(grains) * piece / count) * grain;
  }
  // Where a piece's sums of a unit wait: it has part of two units at most, its first and its last.
  FLUTE_DEVICE int slot(int piece, int unit) const {
    return 2 * piece + (unit != begin(piece) / steps);
  }
};

// Walks the steps of a piece and copies what they need, 16 bytes a thread. What is read is counted
// in granules of 16 bytes, so that an address is one multiply-add to a base in constant memory.
template <class D>
struct MmaFeed {
  static constexpr int kRowsAtOnce = D::kThreads / 8;  // of x, 8 granules each
  static constexpr int kXCopies = (D::kChunks * D::kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kScaleGranules = D::kScaleBytes / 16;  // of a tile
  static constexpr int kScaleCopies =
      (D::kUnitTiles * kScaleGranules + D::kThreads - 1) / D::kThreads;
  static constexpr int kChunkGranules = D::Table::kChunkBytes / 16;
  // A group longer than a stage is copied with each of its stages.
  static constexpr int kStepsPerGroup =
      D::kGroup > D::kChunks * 64 ? D::kGroup / (D::kChunks * 64) : 1;

  const MmaParams& p;
  const int steps;
  int unit, step, left;                        // step of the unit; steps of the piece to go
  u32 x_to, weights_to;                        // in a stage
  u32 x_granule[kXCopies], x_steps[kXCopies];  // how many steps have anything to copy
  u32 granule[D::kTiles];
  u32 scale[kScaleCopies + 1];

  FLUTE_DEVICE MmaFeed(const MmaParams& p, const MmaPieces<D>& pieces, int begin, int end, int warp,
                       int lane)
      : p(p),
        steps(pieces.steps),
        unit(begin / pieces.steps),
        step(begin % pieces.steps),
        left(end - begin) {
    const int warp_n = warp % D::kWarpsN, warp_k = warp / D::kWarpsN, row = threadIdx.x / 8;
    x_to = row * 128 + ((threadIdx.x ^ row) & 7) * 16;
    weights_to = D::kWeightOffset + warp_n * D::kTiles * D::kTileBytes +
                 warp_k * D::Table::kChunkBytes + lane * 16;
    // Opaque, so that ptxas does not compute them anew each step (decode.cuh).
    x_to = __shfl_sync(0xFFFFFFFFu, x_to, lane);
    weights_to = __shfl_sync(0xFFFFFFFFu, weights_to, lane);
    begin_unit(warp_n * D::kTiles, warp_k, lane);
  }

  // Set what is read to the current step of the current unit.
  FLUTE_DEVICE void begin_unit(int warp_tile, int warp_k, int lane) {
    const MmaUnit u = unit_at<D>(p, unit);
#pragma unroll
    for (int i = 0; i < kXCopies; i++) {
      const int row = threadIdx.x / 8 + i * kRowsAtOnce;  // chunk, token
      const int m = u.token_tile * D::kTokens + row % D::kTokens;
      const int at = row / D::kTokens * 8 + threadIdx.x % 8, row_granules = p.shape_k / 8;
      x_granule[i] = static_cast<u32>(m) * row_granules + step * (D::kChunks * 8) + at;
      const bool inside = m < p.shape_m && row < D::kChunks * D::kTokens;
      x_steps[i] = inside ? max(row_granules - at + D::kChunks * 8 - 1, 0) / (D::kChunks * 8) : 0;
    }
    // Rows past the last: any tile will do, they are not stored.
#pragma unroll
    for (int r = 0; r < D::kTiles; r++) {
      const u32 tile = min(u.tile + warp_tile + r, u.tile_end - 1);
      granule[r] = (tile * p.num_chunks + step * D::kChunks + warp_k) * kChunkGranules + lane;
    }
    // A unit of scales is 16 rows of a group; K is padded to 256, so a tile has whole groups.
    if constexpr (kScaleCopies > 0)
#pragma unroll
      for (int i = 0; i < kScaleCopies; i++) {
        const int at = threadIdx.x + i * D::kThreads;
        const u32 tile = min(u.tile + at / kScaleGranules, u.tile_end - 1);
        const u32 group = tile * p.num_chunks * 4 / D::kGroupSteps;
        scale[i] = group * D::Scale::kBytes + at % kScaleGranules;
      }
  }

  FLUTE_DEVICE void advance(int warp, int lane) {
    if (--left <= 0) return;
    if (++step < steps) {
#pragma unroll
      for (int i = 0; i < kXCopies; i++) x_granule[i] += D::kChunks * 8;
#pragma unroll
      for (int r = 0; r < D::kTiles; r++) granule[r] += D::kChunks * kChunkGranules;
    } else {
      step = 0;
      unit++;
      begin_unit(warp % D::kWarpsN * D::kTiles, warp / D::kWarpsN, lane);
    }
  }

  // Granules of a row (token) of 64 k are swizzled, so that ldmatrix meets no bank twice; zeros
  // past M and K.
  FLUTE_DEVICE void copy_x(u32 stage) const {
    if (left <= 0) return;
#pragma unroll
    for (int i = 0; i < kXCopies; i++) {
      if ((i + 1) * kRowsAtOnce > D::kChunks * D::kTokens &&
          threadIdx.x / 8 + i * kRowsAtOnce >= D::kChunks * D::kTokens)
        break;
      ptx::cp_async_16(stage + x_to + i * kRowsAtOnce * 128,
                       static_cast<const u8*>(p.x) + static_cast<u64>(x_granule[i]) * 16,
                       step < static_cast<int>(x_steps[i]) ? 16 : 0);
    }
  }

  // Each warp its own chunks of its own tiles; scales by all threads.
  FLUTE_DEVICE void copy_weights(u32 stage, int lane) const {
    if (left <= 0) return;
    if (lane < kChunkGranules)
#pragma unroll
      for (int r = 0; r < D::kTiles; r++) {
        const u8* from = static_cast<const u8*>(p.packed) + static_cast<u64>(granule[r]) * 16;
#pragma unroll
        for (int j = 0; j < D::kChunks; j += D::kWarpsK)
          ptx::cp_async_16(stage + weights_to + r * D::kTileBytes + j * D::Table::kChunkBytes,
                           from + j * D::Table::kChunkBytes, 16);
      }
    if constexpr (kScaleCopies > 0)
#pragma unroll
      for (int i = 0; i < kScaleCopies; i++) {
        const int at = threadIdx.x + i * D::kThreads;
        if (at < D::kUnitTiles * kScaleGranules)
          ptx::cp_async_16(
              stage + D::kScaleOffset + at * 16,
              static_cast<const u8*>(p.scales) +
                  static_cast<u64>(scale[i] + step / kStepsPerGroup * kScaleGranules) * 16,
              16);
      }
  }
};

}  // namespace flute
