// A stage of an mma kernel in one warp: words -> lookups -> A fragments; x -> ldmatrix -> B; mma.
#pragma once
#include "mma_traits.cuh"

namespace flute {

// Table per row: a column of 2**NUM_BITS entries for each lane, 128 bytes apart: the values of its
// own rows g (low half) and g + 8. The warps of the block take the tiles in turn.
template <class D>
FLUTE_DEVICE void build_row_tables(u32 smem_table, const float* tables, int tile, int num_rows,
                                   int warp, int lane) {
  for (int t = warp; t < D::kUnitTiles; t += D::kWarps) {
    const int lo = min((tile + t) * 16 + (lane >> 2), num_rows - 1), hi = min(lo + 8, num_rows - 1);
    const float* low = tables + (static_cast<long long>(lo) << D::kBits);
    const float* high = tables + (static_cast<long long>(hi) << D::kBits);
#pragma unroll 4
    for (int e = 0; e < 1 << D::kBits; e++) {
      const u32 v0 = D::Act::from_float(ptx::ld_global_nc_f32(low + e)),
                v1 = D::Act::from_float(ptx::ld_global_nc_f32(high + e));
      ptx::st_shared_u32(smem_table + t * D::kRowTableBytes + e * 128 + lane * 4, v0 | v1 << 16);
    }
  }
}

// The fragments of step `st` of a chunk, from its words. The tables are decode.cuh's, half the size
// of batch.cuh's: shared memory is short on most GPUs.
template <class D>
FLUTE_DEVICE void look_up_step(u32 (&a)[4], const u32 (&words)[D::Table::kWords], int st, u32 table,
                               u32 offset) {
  if constexpr (D::kRowTables || D::kBits == 3) {
    u32 bytes[D::Steps::kWords];
    D::Steps::split(bytes, words);
    D::Steps::template fragments<D::kRowTables>(a, bytes, st, table, offset);
  } else if constexpr (D::kBits == 4) {
    D::Table::read_step(a, words[st], table, offset);
  } else {
    const u32 w = words[st / 2], mask = D::Table::kMask;
    const u32 first = st % 2 ? w >> 9 : w << 7, second = w >> (st % 2 ? 17 : 1);
    ptx::ld_table_v2(a[0], a[1], table + ((first & mask) | offset));
    ptx::ld_table_v2(a[2], a[3], table + ((second & mask) | offset));
  }
}

// One warp. Of its chunk in hand, the fragments and scales are in registers. With kAhead they are
// looked up while the chunk before is multiplied, a step into the registers of the step just used:
// else all warps look up after each barrier, and the tensor cores wait (4 to 6 % from 96 tokens
// on).
template <class D>
struct MmaWarp {
  static constexpr int kGroups = D::kGroup == 32 ? 2 : 1;  // of a chunk
  const u32 table, offset, x_lane;
  const int warp_n, warp_k, lane;
  u32 a[D::kTiles][4][4], scale[D::kTiles][kGroups][2];

  // ptxas computes what depends on the thread index anew wherever it is used, but for shuffled
  // values (decode.cuh).
  static FLUTE_DEVICE u32 opaque(u32 value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
  }

  FLUTE_DEVICE MmaWarp(u32 smem_table, int warp, int lane)
      : table(smem_table),
        offset(opaque(D::kRowTables ? lane * 4 : D::Table::lane_offset(lane), lane)),
        // ldmatrix: lanes 0-7 k 0-7 and 8-15 k 8-15 of tokens 0-7, lanes 16-31 of tokens 8-15.
        x_lane(opaque(((lane >> 4) * 8 + (lane & 7)) * 128 + (((lane >> 3) & 1) ^ (lane & 7)) * 16,
                      lane)),
        warp_n(warp % D::kWarpsN),
        warp_k(warp / D::kWarpsN),
        lane(lane) {}

  FLUTE_DEVICE void load_words(u32 (&words)[D::kTiles][D::Table::kWords], u32 stage,
                               int chunk) const {
#pragma unroll
    for (int r = 0; r < D::kTiles; r++)
      D::Table::load(words[r],
                     stage + D::kWeightOffset + (warp_n * D::kTiles + r) * D::kTileBytes +
                         chunk * D::Table::kChunkBytes,
                     lane);
  }

  FLUTE_DEVICE void look_up(const u32 (&words)[D::kTiles][D::Table::kWords], int st) {
#pragma unroll
    for (int r = 0; r < D::kTiles; r++)
      look_up_step<D>(a[r][st], words[r], st,
                      table + (D::kRowTables ? (warp_n * D::kTiles + r) * D::kRowTableBytes : 0),
                      offset);
  }

  // Rows g and g + 8 of a group: fp32 bits, or a pair of equal values to multiply weights with.
  FLUTE_DEVICE void load_scales(u32 (&to)[D::kTiles][kGroups][2], u32 stage, int chunk) const {
    if constexpr (D::kGroup != 0)
#pragma unroll
      for (int r = 0; r < D::kTiles; r++)
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
          const int group = D::kGroups == 1 ? 0 : chunk * 4 / D::kGroupSteps + i;
          const u32 address = stage + D::kScaleOffset + (warp_n * D::kTiles + r) * D::kScaleBytes +
                              ((lane >> 2) * 2 + group * 16) * D::Scale::kBytes;
          if constexpr (D::kScaleWeights && D::kSameDtype) {
            const u32 s = ptx::ld_shared(address);
            to[r][i][0] = __byte_perm(s, s, 0x1010);
            to[r][i][1] = __byte_perm(s, s, 0x3232);
          } else {
            float lo, hi;
            D::Scale::load_pair(lo, hi, address);
            to[r][i][0] = __float_as_uint(lo);
            to[r][i][1] = __float_as_uint(hi);
          }
        }
  }

  // Have the first chunk of a stage in hand.
  FLUTE_DEVICE void begin(u32 stage) {
    u32 words[D::kTiles][D::Table::kWords];
    load_words(words, stage, warp_k);
    load_scales(scale, stage, warp_k);
#pragma unroll
    for (int st = 0; st < 4; st++) look_up(words, st);
  }

  // Two weights times their scale, rounded once: what `dequantize` gives.
  static FLUTE_DEVICE u32 scale_pair(u32 a, u32 scale) {
    if constexpr (D::kSameDtype) return D::Act::multiply2(a, scale);
    const float s = __uint_as_float(scale);
    const u32 lo = D::Act::from_float(D::Act::to_float(static_cast<u16>(a)) * s),
              hi = D::Act::from_float(D::Act::to_float(static_cast<u16>(a >> 16)) * s);
    return lo | hi << 16;
  }

  // Multiply this warp's chunks of a stage. With kAhead the first one of `next` is in hand after
  // it; what lies there may be of another unit, or nothing: then `begin` comes again.
  FLUTE_DEVICE void run(float (&acc)[D::kTiles][D::kColumns][4], u32 stage, u32 next) {
    constexpr int kCount = D::kChunks / D::kWarpsK;
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      const int chunk = j * D::kWarpsK + warp_k;
      const u32 x = stage + chunk * D::kXChunkBytes;
      float sum[D::kTiles][D::kScaleSums ? D::kColumns : 1][4];
      if constexpr (D::kAhead) {
        const u32 from = j + 1 < kCount ? stage : next;
        const int after = j + 1 < kCount ? chunk + D::kWarpsK : warp_k;
        u32 words[D::kTiles][D::Table::kWords], scale_after[D::kTiles][kGroups][2];
        load_words(words, from, after);
        load_scales(scale_after, from, after);
#pragma unroll
        for (int st = 0; st < 4; st++) {
          multiply(acc, sum, x, st);
          look_up(words, st);
        }
#pragma unroll
        for (int i = 0; i < D::kTiles * kGroups * 2; i++)
          scale[i / (kGroups * 2)][i / 2 % kGroups][i % 2] =
              scale_after[i / (kGroups * 2)][i / 2 % kGroups][i % 2];
      } else {
        u32 words[D::kTiles][D::Table::kWords];
        load_words(words, stage, chunk);
        load_scales(scale, stage, chunk);
#pragma unroll
        for (int st = 0; st < 4; st++) look_up(words, st);
#pragma unroll
        for (int st = 0; st < 4; st++) multiply(acc, sum, x, st);
      }
    }
  }

  // Step `st` of the chunk in hand.
  FLUTE_DEVICE void multiply(float (&acc)[D::kTiles][D::kColumns][4],
                             float (&sum)[D::kTiles][D::kScaleSums ? D::kColumns : 1][4], u32 x,
                             int st) {
    constexpr int kSteps = 4 / kGroups;  // of a group, in this chunk
    if constexpr (D::kScaleWeights) {
#pragma unroll
      for (int r = 0; r < D::kTiles; r++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          a[r][st][i] = scale_pair(a[r][st][i], scale[r][st / kSteps][i % 2]);
    }
    const u32 at = x + (x_lane ^ (st * 32));
#pragma unroll
    for (int c = 0; c < D::kColumns; c += 2) {
      u32 b[4];
      ptx::ldmatrix_x4(b, at + c * 1024);
#pragma unroll
      for (int r = 0; r < D::kTiles; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if constexpr (D::kScaleSums) {
            float (&s)[4] = sum[r][c + h];
            if (st % kSteps == 0)
              D::Act::mma(s, a[r][st], b[h * 2], b[h * 2 + 1], 0.f, 0.f, 0.f, 0.f);
            else
              D::Act::mma(s, a[r][st], b[h * 2], b[h * 2 + 1], s[0], s[1], s[2], s[3]);
            if (st % kSteps == kSteps - 1) {
#pragma unroll
              for (int i = 0; i < 4; i++)
                acc[r][c + h][i] += __uint_as_float(scale[r][st / kSteps][i / 2]) * s[i];
            }
          } else {
            float (&s)[4] = acc[r][c + h];
            D::Act::mma(s, a[r][st], b[h * 2], b[h * 2 + 1], s[0], s[1], s[2], s[3]);
          }
        }
    }
  }
};

}  // namespace flute
