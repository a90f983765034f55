// Who does what in a batch kernel, in which order: a cluster's units by passes, a block's part of
// K, the sequence of a warp's slots.
#pragma once
#include "batch_traits.cuh"

namespace flute {

// The units of a cluster, a pass at a time.
template <class D>
struct Passes {
  int unit, end, num_blocks;
  int block, count, token_tile;  // of the current pass: its first block of rows, how many, tokens

  FLUTE_DEVICE explicit Passes(const BatchParams& p) {
    const int cluster = blockIdx.x / D::kCluster;
    num_blocks = (p.shape_n + 63) / 64;
    unit = cluster * p.units_each + min(cluster, p.units_rest);
    end = unit + p.units_each + (cluster < p.units_rest);
    token_tile = p.num_token_tiles > 1 ? unit / num_blocks : 0;
    block = unit - token_tile * num_blocks;
    set_count(p);
  }

  FLUTE_DEVICE bool done() const { return unit >= end; }

  // The table of the current pass.
  FLUTE_DEVICE int range(const BatchParams& p) const {
    int i = 0;
    while (i + 1 < p.num_ranges && block * 4 >= p.range_end[i]) i++;
    return i;
  }

  // Why evenly: of 5 units, 3 + 2 keep more warpgroups busy than 4 + 1.
  FLUTE_DEVICE void set_count(const BatchParams& p) {
    int left = min(end - unit, num_blocks - block);
    if (!D::kRowTables && p.num_ranges > 1)  // a pass is of one table
      left = min(left, (p.range_end[range(p)] + 3) / 4 - block);
    const int num_passes = (left + D::kPassUnits - 1) / D::kPassUnits;
    count = num_passes > 1 ? (left + num_passes - 1) / num_passes : max(left, 0);
  }

  FLUTE_DEVICE void next(const BatchParams& p) {
    unit += count;
    block += count;
    if (block == num_blocks) {
      block = 0;
      token_tile++;
    }
    set_count(p);
  }
};

// First token of a tile. Why the last tile overlaps the one before: the part of a box past M is slow.
// Both write the same bits to the tokens that they share.
template <class D>
FLUTE_DEVICE int first_token(const BatchParams& p, int token_tile) {
  return max(0, min(token_tile * D::kTokens, p.shape_m - D::kTokens));
}

// Panels of K of this block: a rank's share of the cluster's.
struct Panels {
  int begin, count;
  template <class D>
  static FLUTE_DEVICE Panels of(const BatchParams& p, u32 rank) {
    const int all = p.num_chunks / D::kPanel, begin = all * static_cast<int>(rank) / D::kCluster;
    return {begin, all * static_cast<int>(rank + 1) / D::kCluster - begin};
  }
};

// Start the copy of a panel of a tile, from chunk `chunk` on, into stage `stage` of a ring.
template <class D>
FLUTE_DEVICE void fill_slot(typename D::Ring& ring, u32 stage, const BatchParams& p, u32 chunk,
                            bool wanted, int lane) {
  const u8* weights =
      static_cast<const u8*>(p.packed) + static_cast<u64>(chunk) * D::Table::kChunkBytes;
  const u8* scales = static_cast<const u8*>(p.scales) +
                     static_cast<u64>(chunk * 4 / D::kGroupSteps) * (16 * D::Scale::kBytes);
  ring.fill(stage, weights, scales, wanted, lane, 0);
}

// Walks a consumer warp's slots in the order of use and fills its ring.
template <class D, bool SPLIT_K = D::kSplitK>
struct Feed {
  Passes<D> passes;
  const Panels panels;
  const int warp;
  u32 chunk = 0;
  int left = 0;  // panels of the current unit

  FLUTE_DEVICE Feed(const BatchParams& p, const Passes<D>& passes, const Panels& panels, int warp)
      : passes(passes), panels(panels), warp(warp) {
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

  FLUTE_DEVICE void advance(const BatchParams& p) {
    chunk += D::kPanel;
    if (--left == 0) {
      passes.next(p);
      begin_unit(p);
    }
  }

  FLUTE_DEVICE void fill(typename D::Ring& ring, u32 stage, const BatchParams& p, int lane) {
    fill_slot<D>(ring, stage, p, chunk, left > 0, lane);
    if (left > 0) advance(p);
  }
};

// The same where warpgroups split K: by panels, in them by units.
template <class D>
struct Feed<D, true> {
  Passes<D> passes;
  const Panels panels;
  const int warp;
  int panel, unit = 0;

  FLUTE_DEVICE Feed(const BatchParams&, const Passes<D>& passes, const Panels& panels, int warp)
      : passes(passes), panels(panels), warp(warp), panel(warp / 4) {}

  FLUTE_DEVICE void fill(typename D::Ring& ring, u32 stage, const BatchParams& p, int lane) {
    const bool wanted = !passes.done() && panel < panels.count;
    const int tile = min((passes.block + unit) * 4 + warp % 4, (p.shape_n - 1) / 16);
    const u32 chunk = static_cast<u32>(tile) * p.num_chunks + (panels.begin + panel) * D::kPanel;
    fill_slot<D>(ring, stage, p, chunk, wanted, lane);
    if (!wanted || ++unit < passes.count) return;
    unit = 0;
    panel += D::kWarpgroups;
    if (panel >= panels.count) {
      panel = warp / 4;
      passes.next(p);
    }
  }
};

}  // namespace flute
