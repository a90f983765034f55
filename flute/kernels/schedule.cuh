// Who does what, in which order: the tiles and panels of a block, and the sequence of a warp's
// slots.
#pragma once
#include "traits.cuh"

namespace flute {

// The tiles and panels of a block.
template <class D>
struct Share {
  int tile_begin, tile_end, panel_begin, num_panels,
      num_rounds;          // panels and rounds of the current phase
  int all_begin, all_end;  // panels of all phases
  int most_rounds;  // of the cluster's largest share of K, so that all ranks have the same layout

  // Contiguous shares whose sizes differ by one at most.
  FLUTE_DEVICE Share(const DecodeParams& p, u32 rank) {
    const int cluster = blockIdx.x / D::kCluster;
    const int num_panels = p.num_chunks / D::kPanel;
    tile_begin = cluster * p.tiles_each + min(cluster, p.tiles_rest);
    tile_end = tile_begin + p.tiles_each + (cluster < p.tiles_rest);
    all_begin = num_panels * static_cast<int>(rank) / D::kCluster;
    all_end = num_panels * static_cast<int>(rank + 1) / D::kCluster;
    most_rounds = ((num_panels + D::kCluster - 1) / D::kCluster + D::kWarps - 1) / D::kWarps;
    set_phase(p, 0);
  }

  FLUTE_DEVICE void set_phase(const DecodeParams& p, int phase) {
    const int count = all_end - all_begin;
    panel_begin = all_begin;
    num_panels = count;
    if constexpr (D::kPhased) {
      panel_begin += count * phase / p.num_phases;
      num_panels = all_begin + count * (phase + 1) / p.num_phases - panel_begin;
    }
    num_rounds = (num_panels + D::kWarps - 1) / D::kWarps;
  }

  // Tiles of the block of tiles that starts at `tile`: at most kTiles, and all of one table.
  FLUTE_DEVICE int block_tiles(const DecodeParams& p, int tile) const {
    int end = tile_end;
    if (!D::kRowTables && p.num_ranges > 1) {
      for (int i = 0; i < p.num_ranges; i++)
        if (tile < p.range_end[i]) {
          end = min(end, p.range_end[i]);
          break;
        }
    }
    return min(D::kTiles, end - tile);
  }
};

// Walks a warp's slots in the order of use: phases, in them tile blocks, in them rounds, in them
// tiles.
template <class D>
struct Cursor {
  Share<D> share;
  int tile, count;  // first tile and number of tiles of the current block; count <= 0: past the end
  int panel, t = 0, phase = 0;
  const int warp;

  FLUTE_DEVICE Cursor(const DecodeParams& p, const Share<D>& s, int warp)
      : share(s), panel(warp), warp(warp) {
    start_phase(p);
  }

  // Begin the first phase, from `phase` on, that has a panel for this warp (phases differ by a
  // panel).
  FLUTE_DEVICE void start_phase(const DecodeParams& p) {
    count = 0;
    tile = share.tile_begin;
    for (; phase < (D::kPhased ? p.num_phases : 1); phase++) {
      if constexpr (D::kPhased) share.set_phase(p, phase);
      if (warp < share.num_panels) {
        count = share.block_tiles(p, tile);
        return;
      }
    }
  }

  FLUTE_DEVICE void advance(const DecodeParams& p) {
    if (++t < count) return;
    t = 0;
    panel += D::kWarps;
    if (panel < share.num_panels) return;
    panel = warp;
    tile += count;
    if (tile < share.tile_end) {
      count = share.block_tiles(p, tile);
    } else {
      phase++;
      start_phase(p);
    }
  }
};

// Start the copy of the warp's next slot into stage `at` of its ring, once `zero`, which is 0, is
// known.
template <class D>
FLUTE_DEVICE void refill(typename D::Ring& ring, u32 at, Cursor<D>& next, const DecodeParams& p,
                         int lane, u32 zero) {
  const bool wanted = next.count > 0;
  // NOTE: 32 bits count chunks of 1024 weights, so N * K stays below 2^42.
  const u32 chunk = static_cast<u32>(next.tile + next.t) * p.num_chunks +
                    (next.share.panel_begin + next.panel) * D::kPanel;
  const u8* weights =
      static_cast<const u8*>(p.packed) + static_cast<u64>(chunk) * D::Table::kChunkBytes;
  // A unit of scales is 16 rows of one group; K is padded to 256, so `chunk * 4 / kGroupSteps`
  // counts whole groups.
  const u8* scales = static_cast<const u8*>(p.scales) +
                     static_cast<u64>(chunk * 4 / D::kGroupSteps) * (16 * D::Scale::kBytes);
  ring.fill(at, weights, scales, wanted, lane, zero);
  if (wanted) next.advance(p);
}

}  // namespace flute
