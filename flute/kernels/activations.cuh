// x on its way from global memory to mma B fragments, by the four routes of XSource.
#pragma once
#include "schedule.cuh"

namespace flute {

// x of a warp's panels as rows, 16 bytes a lane: on the way to fragments.
template <class D>
struct XRows {
  static constexpr int kStride = 144;  // bytes between tokens in the stage: 128 + 16
  u32 v[D::kXRounds * D::kPanel][2][4];

  // Tokens c * 8 to c * 8 + 7 of panels `panel`, `panel` + kWarps, ... of the share; else zeros.
  FLUTE_DEVICE void load(const DecodeParams& p, const Share<D>& share, int c, int panel, int lane) {
    const int last = min(p.shape_m - c * 8, 8) - 1, token = lane >> 3, granule = lane & 7;
#pragma unroll
    for (int j = 0; j < D::kXRounds * D::kPanel; j++) {
      const int at = panel + j / D::kPanel * D::kWarps;
      const int k = ((share.panel_begin + at) * D::kPanel + j % D::kPanel) * 64 + granule * 8;
      const bool inside = at < share.num_panels && k < p.shape_k;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        v[j][i][0] = v[j][i][1] = v[j][i][2] = v[j][i][3] = 0;
        const u16* x = static_cast<const u16*>(p.x) +
                       static_cast<long long>(c * 8 + token + i * 4) * p.shape_k + k;
        if (inside && token + i * 4 <= last) ptx::ld_global_v4(v[j][i], x);
      }
    }
  }
};

// x of one panel as B fragments: frag[chunk][column][step][half].
template <class D>
struct XFragments {
  u32 v[D::kXRounds * D::kPanel][D::kColumns][4][2];

  FLUTE_DEVICE void set(int j, int c, int half, const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int st = half * 2 + i;
      const bool crossed = D::kBits == 2 && D::in_registers(j % D::kPanel, st);
      v[j][c][st][0] = crossed ? __byte_perm(r[i * 2], r[i * 2 + 1], 0x5410) : r[i * 2];
      v[j][c][st][1] = crossed ? __byte_perm(r[i * 2], r[i * 2 + 1], 0x7632) : r[i * 2 + 1];
    }
  }

  // From shared memory. `row` is the address of this lane's ldmatrix row at k = 0 of the block.
  FLUTE_DEVICE void load_shared(const u32 (&row)[D::kColumns], int k) {
#pragma unroll
    for (int j = 0; j < D::kPanel; j++)
#pragma unroll
      for (int c = 0; c < D::kColumns; c++) read(j, c, row[c] + (k + j * 64) * 2);
  }

  // From rows in registers, through `stage` in shared memory: COUNT chunks at a time, 144 bytes a
  // token.
  template <int COUNT>
  FLUTE_DEVICE void transpose(const XRows<D>& rows, const DecodeParams& p, int c, u32 stage,
                              int lane) {
    constexpr int kStride = XRows<D>::kStride;
    const int last = min(p.shape_m - c * 8, 8) - 1, token = lane >> 3, granule = lane & 7;
    const int chunk_bytes = COUNT == 1 ? 0 : min(p.shape_m, 8) * kStride;
    const u32 row = stage + min(lane & 7, last) * kStride + (lane >> 3) * 16;
#pragma unroll
    for (int first = 0; first < D::kXRounds * D::kPanel; first += COUNT) {
#pragma unroll
      for (int j = 0; j < COUNT; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const u32(&v)[4] = rows.v[first + j][i];
          if (token + i * 4 <= last)
            ptx::st_shared_v4(stage + j * chunk_bytes + (token + i * 4) * kStride + granule * 16,
                              v[0], v[1], v[2], v[3]);
        }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < COUNT; j++) read(first + j, c, row + j * chunk_bytes);
      __syncwarp();
    }
  }

  // All of this warp's x, once. Why through registers: all loads fly at once (8 tokens of 57344 x
  // 8192 by cp.async, half of the chunks at a time: 4 us more).
  template <int COUNT>
  FLUTE_DEVICE void load_once(XRows<D> (&rows)[D::kColumns], const DecodeParams& p,
                              const Share<D>& share, u32 stage, int warp, int lane) {
#pragma unroll
    for (int c = 0; c < D::kColumns; c++) {
      if (c * 8 >= p.shape_m) break;
      rows[c].load(p, share, c, warp, lane);
      transpose<COUNT>(rows[c], p, c, stage, lane);
    }
  }

  // A chunk, from the row of its stage that this lane gives to ldmatrix.
  FLUTE_DEVICE void read(int j, int c, u32 row) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 r[4];
      ptx::ldmatrix_x4(r, row + half * 64);
      set(j, c, half, r);
    }
  }

  // From global memory (L1, L2): for x too large for shared memory.
  FLUTE_DEVICE void load_global(const DecodeParams& p, int k, int g, int q) {
#pragma unroll
    for (int j = 0; j < D::kPanel; j++)
#pragma unroll
      for (int c = 0; c < D::kColumns; c++) {
        int token = min(c * 8 + g, p.shape_m - 1);
        const u16* x = static_cast<const u16*>(p.x) + static_cast<long long>(token) * p.shape_k;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          u32 r[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = k + j * 64 + half * 32 + i * 8 + q * 2;
            r[i] = at < p.shape_k ? ptx::ld_global(x + at) : 0;
          }
          set(j, c, half, r);
        }
      }
  }
};

// Start the copy of the part of x that this warp alone reads; barrier `round` tells when that
// round's panel is there.
template <class D>
FLUTE_DEVICE void fetch_x(u32 smem_x, u32 barriers, const DecodeParams& p, const Share<D>& share,
                          int warp, int lane) {
  constexpr int kGranules = D::kPanel * 8;  // of 16 bytes = 8 k
  for (int round = 0; round < share.num_rounds; round++) {
    const int panel = round * D::kWarps + warp;
    if (panel < share.num_panels) {
      const int granule = lane % kGranules;
      const int k = (share.panel_begin + panel) * D::kPanel * 64 + granule * 8;
      const u32 num_bytes = k < p.shape_k ? 16 : 0;  // zeros past K
      const u16* x = static_cast<const u16*>(p.x) + (num_bytes ? k : 0);
      const u32 to = smem_x + (panel * kGranules + granule) * 16;
#pragma unroll 4
      for (int m = lane / kGranules; m < p.shape_m; m += 32 / kGranules)
        ptx::cp_async_16(to + m * p.x_stride, x + static_cast<long long>(m) * p.shape_k, num_bytes);
    }
    ptx::cp_async_mbarrier_arrive(barriers + round * 8);
  }
}

}  // namespace flute
