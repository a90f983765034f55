// A consumer warpgroup of a batch kernel: words -> fragments -> wgmma -> sums in registers.
#pragma once
#include "batch_schedule.cuh"
#include "hopper.cuh"

namespace flute {

template <class D>
using TableEntries = Entries<D::kBits, typename D::Act>;

// This lane's entry of a range's table.
template <class D>
FLUTE_DEVICE float load_entry(const BatchParams& p, int range) {
  return TableEntries<D>::load(static_cast<const float*>(p.table) + (range << D::kBits),
                               threadIdx.x % 32);
}

// Table per row: the lane's own rows g and g + 8, an entry the pair of their values, 128 bytes
// apart. Why one code at a time: pair tables of all tiles in flight do not fit shared memory.
template <class D>
FLUTE_DEVICE void build_row_table(u32 smem_table, const float* tables, int row, int num_rows,
                                  int lane) {
  const int lo = min(row + (lane >> 2), num_rows - 1),
            hi = min(row + 8 + (lane >> 2), num_rows - 1);
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
  const u32 smem_x, x_full, x_empty, table, offset;
  const int share, lane;
  RegisterTable<D::kBits> registers;
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
    for (int i = 0; i < panels.count * D::kXParts; i++) {
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
      const u32 address = slot + D::kWeightBytes + ((lane >> 2) * 2 + u * 16) * D::Scale::kBytes;
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
                            int idx, u32 table_at) const {
#pragma unroll
    for (int i = 0; i < D::kBatch; i++) {
      const int chunk = idx * D::kBatch / 4, st = (idx * D::kBatch + i) % 4;
      if (!D::in_registers(chunk, st))
        D::Steps::template fragments<D::kRowTables>(frag[i], bytes, st, table_at, offset);
      else if constexpr (D::kBits == 4)
        registers.step_of_pairs(frag[i], bytes[st]);
      else if constexpr (D::kBits == 3)
        registers.step(frag[i], bytes[st]);
      else if (st % 2 == 0)  // a word, two steps
        registers.word_in_order(frag[i], frag[i + 1], bytes[st / 2]);
    }
  }

  FLUTE_DEVICE void scale_weights(u32 (&frag)[D::kBatch][4], const u32 (&scale)[kUnits][2],
                                  int idx) const {
    if constexpr (D::kScaleWeights)
#pragma unroll
      for (int i = 0; i < D::kBatch; i++)
#pragma unroll
        for (int r = 0; r < 4; r++)
          frag[i][r] = scale_pair(frag[i][r], scale[(idx * D::kBatch + i) / D::kUnitSteps][r % 2]);
  }

  // What goes on from slot to slot, in registers.
  struct Flight {
    float sum[D::kSumBuffers][kSums];
    float sum_scale[D::kSumBuffers][2];  // of the group in `sum`: rows g and g + 8
    u32 a[D::kBuffers][D::kBatch][4], words[D::Table::kWords], bytes[D::Steps::kWords];
    u32 scale[kUnits][2];
    u32 slot;
    u32 previous = 0;  // stage of x that the wgmma still running may read
  };

  static FLUTE_DEVICE void add_sums(float (&acc)[kAcc], const Flight& f, int b) {
#pragma unroll
    for (int i = 0; i < kSums; i++) acc[i] += f.sum_scale[b][i / 2 % 2] * f.sum[b][i];
  }

  // The stages of x of a panel are free.
  FLUTE_DEVICE void release_panel(u32 stage) const {
#pragma unroll
    for (int i = 0; i < D::kXParts; i++) {
      release(stage);
      if (++stage == D::kXStages) stage = 0;
    }
  }

  // A slot: a panel of one unit. `table_at`, `table_next`: tables of this slot's and the next one's
  // rows. `first`: the first of this warpgroup; `enters`: the first of its panel; `more`: not the
  // last.
  FLUTE_DEVICE void multiply_slot(float (&acc)[kAcc], Flight& f, u32 table_at, u32 table_next,
                                  bool first, bool enters, bool more) {
    constexpr int kPerChunk = 4 / D::kBatch, kPerPanel = D::kPanel * kPerChunk;
    const u32 ring_stage = ring.stage;
    u32 x = 0;
#pragma unroll
    for (int idx = 0; idx < kPerPanel; idx++) {
      const int j = idx / kPerChunk;
      // The next chunk's words are on their way while this one is looked up.
      if (idx % kPerChunk == 0) {
        if (j < D::kPanel - 1) {
          D::Table::load(f.words, f.slot + (j + 1) * D::Table::kChunkBytes, lane);
        } else {
          ring.advance();
          if (more) {
            f.slot = ring.wait();
            D::Table::load(f.words, f.slot, lane);
          }
        }
      }
      const bool last = (idx + 1) % kPerChunk == 0;  // of the chunk
      u32(&frag)[D::kBatch][4] = f.a[idx % D::kBuffers];
      if constexpr (D::kAhead) {
        if (last) D::Steps::split(f.bytes, f.words);
        if (idx + 1 < kPerPanel || more)
          look_up(f.a[(idx + 1) % D::kBuffers], f.bytes, (idx + 1) % kPerPanel,
                  idx + 1 < kPerPanel ? table_at : table_next);
      } else {
        look_up(frag, f.bytes, idx, table_at);
        if (last) D::Steps::split(f.bytes, f.words);
      }
      if (idx % (D::kXPanel * kPerChunk) == 0) {
        u32 stage = x_stage;
        if constexpr (D::kSplitK) {
          stage += idx / (D::kXPanel * kPerChunk);
          const bool wraps = stage >= D::kXStages;
          if (wraps) stage -= D::kXStages;
          if (enters) ptx::mbarrier_wait(x_full + stage * 8, x_parity ^ wraps);
        } else {
          if (idx > 0) advance();
          stage = x_stage;
          ptx::mbarrier_wait(x_full + stage * 8, x_parity);
        }
        x = ptx::wgmma_descriptor_low(smem_x + stage * D::kXStageBytes);
      }
      scale_weights(frag, f.scale, idx);
      pin(frag);
      const bool begins = idx * D::kBatch % D::kUnitSteps == 0;  // a group
      const int unit = idx * D::kBatch / D::kUnitSteps, b = unit % D::kSumBuffers;
      if constexpr (D::kScaleSums) {
        if (begins) {
          // Split K: the last group of a slot is added at its end, since the next one is another
          // unit's.
          if (D::kSumBuffers == 1 && (!D::kSplitK || idx > 0)) {
            ptx::wgmma_wait<0>();
            add_sums(acc, f, 0);
          }
          f.sum_scale[b][0] = __uint_as_float(f.scale[unit][0]);
          f.sum_scale[b][1] = __uint_as_float(f.scale[unit][1]);
        }
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < D::kBatch; i++) {
        const u64 descriptor = ptx::wgmma_descriptor(x + ((j % D::kXPanel * D::kXChunkBytes) >> 4) +
                                                     (idx * D::kBatch + i) % 4 * 2);
        if constexpr (D::kScaleSums)
          Config::wgmma(f.sum[b], frag[i], descriptor, !(begins && i == 0));
        else
          Config::wgmma(acc, frag[i], descriptor, true);
      }
      ptx::wgmma_commit();
      if (idx + 1 == kPerPanel) {  // the slot is in registers: refill it
        __syncwarp();
        feed.fill(ring, ring_stage, p, lane);
        if (more) load_scales(f.scale, f.slot);
      }
      ptx::wgmma_wait<1>();  // the last batch's fragments, sums and x are free
      if constexpr (D::kScaleSums && D::kSumBuffers == 2) {
        if (idx > 0 && begins) add_sums(acc, f, b ^ 1);
        if (idx + 1 == kPerPanel) {
          ptx::wgmma_wait<0>();
          add_sums(acc, f, b);
        }
      } else if constexpr (D::kScaleSums && D::kSplitK) {
        if (idx + 1 == kPerPanel) {
          ptx::wgmma_wait<0>();
          add_sums(acc, f, 0);
        }
      }
      if constexpr (D::kSplitK) {
        if (idx == 0 && enters && !first) release_panel(f.previous);
      } else if (idx % (D::kXPanel * kPerChunk) == 0) {
        if (idx >= kPerChunk || !first) release(f.previous);
        f.previous = x_stage;
      }
    }
  }

  // The sums of `count` units (one, unless warpgroups split K) over this warpgroup's panels.
  FLUTE_DEVICE void run(float (&acc)[D::kAccs][kAcc], int count) {
    Flight f;
#pragma unroll
    for (int b = 0; b < D::kSumBuffers; b++) {
      f.sum_scale[b][0] = f.sum_scale[b][1] = 0.f;
#pragma unroll
      for (int i = 0; i < kSums; i++) f.sum[b][i] = 0.f;
    }
#pragma unroll
    for (int u = 0; u < D::kAccs; u++)
#pragma unroll
      for (int i = 0; i < kAcc; i++) acc[u][i] = 0.f;
    if (D::kSplitK && share >= panels.count) return;

    f.slot = ring.wait();
    D::Table::load(f.words, f.slot, lane);
    load_scales(f.scale, f.slot);
    D::Steps::split(f.bytes, f.words);
    if constexpr (D::kAhead) look_up(f.a[0], f.bytes, 0, table);
#pragma unroll 1
    for (int panel = share; panel < panels.count; panel += D::kShares) {
      const bool more = panel + D::kShares < panels.count;
#pragma unroll
      for (int u = 0; u < D::kAccs; u++) {
        if (D::kSplitK && u >= count) break;
        const bool ends = !D::kSplitK || u + 1 == count;
        const u32 at = table + (D::kRowTables ? u * 4 * D::kRowTableBytes : 0);
        multiply_slot(acc[u], f, at, D::kRowTables && !ends ? at + 4 * D::kRowTableBytes : table,
                      panel == share, u == 0, more || !ends);
      }
      if constexpr (D::kSplitK) {
        f.previous = x_stage;
#pragma unroll
        for (int i = 0; i < D::kXParts; i++) advance();
      } else {
        advance();
      }
    }
    ptx::wgmma_wait<0>();
    if constexpr (D::kScaleSums && D::kSumBuffers == 1 && !D::kSplitK) add_sums(acc[0], f, 0);
    if constexpr (D::kSplitK)
      release_panel(f.previous);
    else
      release(f.previous);
  }
};

}  // namespace flute
