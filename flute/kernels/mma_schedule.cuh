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

// Walks the steps of a piece and copies what they need, 16 bytes a thread.
template <class D>
struct MmaFeed {
  const MmaParams& p;
  const int steps, warp_n, warp_k, lane;
  int unit, step, left;  // step of the unit; steps of the piece to go
  int token;             // first of the unit
  u32 chunk[D::kTiles];  // of the warp's tiles, at k = 0

  FLUTE_DEVICE MmaFeed(const MmaParams& p, const MmaPieces<D>& pieces, int begin, int end, int warp,
                       int lane)
      : p(p),
        steps(pieces.steps),
        warp_n(warp % D::kWarpsN),
        warp_k(warp / D::kWarpsN),
        lane(lane),
        unit(begin / pieces.steps),
        step(begin % pieces.steps),
        left(end - begin) {
    if (left > 0) begin_unit();
  }

  FLUTE_DEVICE void begin_unit() {
    const MmaUnit u = unit_at<D>(p, unit);
    token = u.token_tile * D::kTokens;
    // Rows past the last: any tile will do, they are not stored.
#pragma unroll
    for (int r = 0; r < D::kTiles; r++)
      chunk[r] =
          static_cast<u32>(min(u.tile + warp_n * D::kTiles + r, u.tile_end - 1)) * p.num_chunks;
  }

  FLUTE_DEVICE void advance() {
    if (left == 0) return;
    if (--left > 0 && ++step == steps) {
      step = 0;
      unit++;
      begin_unit();
    }
  }

  // Granules of 16 bytes, 8 to a token and chunk, swizzled so that ldmatrix meets no bank twice;
  // zeros past M and K.
  FLUTE_DEVICE void copy_x(u32 stage) const {
    if (left == 0) return;
    constexpr int kGranules = D::kChunks * D::kTokens * 8;
    const int granule = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < (kGranules + D::kThreads - 1) / D::kThreads; i++) {
      const int row = threadIdx.x / 8 + i * (D::kThreads / 8);  // chunk, token
      if (kGranules % D::kThreads && row * 8 >= kGranules) break;
      const int m = token + row % D::kTokens,
                k = (step * D::kChunks + row / D::kTokens) * 64 + granule * 8;
      const bool inside = m < p.shape_m && k < p.shape_k;
      const u16* from =
          static_cast<const u16*>(p.x) + (inside ? static_cast<long long>(m) * p.shape_k + k : 0);
      ptx::cp_async_16(stage + row * 128 + ((granule ^ (row % D::kTokens)) & 7) * 16, from,
                       inside ? 16 : 0);
    }
  }

  // Each warp its own chunks of its own tiles, and the first along K the scales.
  FLUTE_DEVICE void copy_weights(u32 stage) const {
    if (left == 0) return;
    constexpr int kChunkBytes = D::Table::kChunkBytes;
#pragma unroll
    for (int r = 0; r < D::kTiles; r++) {
      const u32 at = chunk[r] + step * D::kChunks;
      const int tile = warp_n * D::kTiles + r;
      const u8* weights = static_cast<const u8*>(p.packed) +
                          static_cast<u64>(at + warp_k) * kChunkBytes + lane * 16;
      const u32 to =
          stage + D::kWeightOffset + tile * D::kTileBytes + warp_k * kChunkBytes + lane * 16;
#pragma unroll
      for (int j = 0; j < D::kChunks; j += D::kWarpsK)
        if (lane * 16 < kChunkBytes)
          ptx::cp_async_16(to + j * kChunkBytes, weights + j * kChunkBytes, 16);
      if (D::kScaleBytes > 0 && warp_k == 0 && lane * 16 < D::kScaleBytes) {
        // A group's scales are 16 rows'; K is padded to 256, so whole groups come before a tile.
        const u8* scales = static_cast<const u8*>(p.scales) +
                           static_cast<u64>(at * 4 / D::kGroupSteps) * (16 * D::Scale::kBytes);
        ptx::cp_async_16(stage + D::kScaleOffset + tile * D::kScaleBytes + lane * 16,
                         scales + lane * 16, 16);
      }
    }
  }
};

}  // namespace flute
