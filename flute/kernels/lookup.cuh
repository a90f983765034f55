// From packed bits to mma A fragments through a table in shared memory.
// Owns the packed layout of a chunk and the layout of the table; flute/kernel_order.py states the
// same layout in Python.
//
// A *chunk* is 16 output features x 64 k. Lane = g * 4 + q holds, of k16-step `st` (st = 0..3), the
// four fragment registers of mma.m16n8k16 in natural k order:
//
//            k = st*16 + 2q, +1      k = st*16 + 8 + 2q, +1
//   row g         a0                      a2
//   row g + 8     a1                      a3
//
// One register is a *pair* of codes along k (lower k in the lower bits). The same registers are a
// wgmma m64k16 A fragment when warp w of a warpgroup reads the chunk of rows 16w..16w+15.
//
//   bits  bytes  words a lane reads from a chunk     one lookup is
//   4     512    w[st], one byte per pair a0..a3     byte -> 2 values, 4 bytes, 256 x 32 columns
//   3     384    w[0..2], see Lookup<3>              6 bits -> 2 values, 4 bytes, 64 x 32 columns
//   2     256    w[st/2], half-word st % 2           byte -> 4 values, 8 bytes, 256 x 16 columns
//
// Each entry is stored once per column (column = lane, or lane % 16 for 8-byte entries, which the
// hardware serves in two half-warps), so a lane always reads its own bank and lookups never
// conflict. 16-bit values leave shared memory at 64 per clock at most, which the pair (quad) table
// reaches; the idea of a pair table is FLUTE's (arXiv 2407.10960), one column per lane is the usual
// cure for histogram-like access.
//
// Some of the lookups are better done in registers: register_lookup.cuh.
#pragma once
#include "element.cuh"

namespace flute {

template <int NUM_BITS>
struct Lookup;

// The two values of a pair of codes, rounded to the activations' dtype, lower k in the lower half.
// Why here: the table on disk is fp32; rounding it while it is spread saves a cast kernel per call.
template <int NUM_BITS, class Act>
FLUTE_DEVICE u32 table_pair(const float* table, int pair) {
  u32 lo = Act::from_float(ptx::ld_global_nc_f32(table + (pair & ((1 << NUM_BITS) - 1))));
  u32 hi = Act::from_float(ptx::ld_global_nc_f32(table + (pair >> NUM_BITS)));
  return lo | (hi << 16);
}

// A table's entries, rounded to the activations' dtype, one in each lane of a warp. Why not each
// pair's two from global memory as it is spread: a load's latency several times over, in which a
// block does nothing else.
template <int NUM_BITS, class Act>
struct Entries {
  static constexpr int kMask = (1 << NUM_BITS) - 1;
  u32 own;

  FLUTE_DEVICE explicit Entries(float entry) : own(Act::from_float(entry)) {}
  FLUTE_DEVICE Entries(const float* table, int lane) : Entries(load(table, lane)) {}

  // The lane's entry as it is stored, for a kernel that has other things to start while it flies.
  static FLUTE_DEVICE float load(const float* table, int lane) {
    return ptx::ld_global_nc_f32(table + (lane & kMask));
  }

  // The two values of a pair of codes, the lower k's in the lower half. All lanes call.
  FLUTE_DEVICE u32 pair(int codes) const {
    const u32 lo = __shfl_sync(0xFFFFFFFFu, own, codes & kMask),
              hi = __shfl_sync(0xFFFFFFFFu, own, codes >> NUM_BITS);
    return lo | hi << 16;
  }
};

// The tables of one tile of 16 rows, for lookups by pair: entry `pair` at row_entry(pair) + h *
// 128 + lane * 4 holds the two values of row g + 8h. A lane serves two rows only, so per-row tables
// need no lookup more than a common one.
template <int NUM_BITS, class Act>
FLUTE_DEVICE void build_row_pairs(u32 smem_table, const float* tables, int row, int num_rows,
                                  int thread_idx, int num_threads) {
#pragma unroll 4
  for (int i = thread_idx; i < (1 << 2 * NUM_BITS) * 16; i += num_threads) {
    const float* table =
        tables + (static_cast<long long>(min(row + (i & 15), num_rows - 1)) << NUM_BITS);
    u32 v = table_pair<NUM_BITS, Act>(table, i >> 4);
    ptx::st_shared_v4(smem_table + Lookup<NUM_BITS>::row_entry(i >> 4) + (i & 15) * 16, v, v, v, v);
  }
}

// The tables of NUM_TILES tiles' rows on their way: global memory -> registers -> `raw` in shared
// memory, 16 bits an entry -> pairs (as build_row_pairs). In three parts for a block to do between
// its barriers, while it computes. Why through `raw`: 16 rows' entries pair by pair from global
// memory took longer than a tile's lookups (28672 x 4096, 4 bits: 36 us instead of 27).
template <int NUM_BITS, class Act, int NUM_TILES, int NUM_THREADS>
struct RowTables {
  static constexpr int kEntries = 1 << NUM_BITS;
  static constexpr int kRawBytes = NUM_TILES * 16 * kEntries * 2;
  static constexpr int kCount = (NUM_TILES * 16 * kEntries + NUM_THREADS - 1) / NUM_THREADS;
  float v[kCount];

  FLUTE_DEVICE void load(const float* tables, int row, int num_rows, int thread_idx) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int at = i * NUM_THREADS + thread_idx, r = min(row + at / kEntries, num_rows - 1);
      v[i] = ptx::ld_global_nc_f32(tables + static_cast<long long>(r) * kEntries + at % kEntries);
    }
  }

  FLUTE_DEVICE void store(u32 smem_raw, int thread_idx) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int at = i * NUM_THREADS + thread_idx;
      if (at < NUM_TILES * 16 * kEntries)
        ptx::st_shared_u16(smem_raw + at * 2, Act::from_float(v[i]));
    }
  }

  // An item is a row, a lower code and as many upper codes as 16 bytes of `raw` hold.
  template <class Table>
  static FLUTE_DEVICE void build(u32 smem_table, u32 smem_raw, int thread_idx) {
    constexpr int kUpper = kEntries < 8 ? kEntries : 8;
    constexpr int kItems = 16 * kEntries * (kEntries / kUpper);  // of a tile
    for (int i = thread_idx; i < NUM_TILES * kItems; i += NUM_THREADS) {
      const int tile = i / kItems, row = i & 15, lower = i / 16 % kEntries,
                upper = i % kItems / (16 * kEntries) * kUpper;
      const u32 raw = smem_raw + (tile * 16 + row) * kEntries * 2;
      const u32 low = ptx::ld_shared_u16(raw + lower * 2);
      u32 high[4];
      if constexpr (kUpper == 8)
        ptx::ld_shared_v4(high, raw + upper * 2);
      else
        ptx::ld_shared_v2(high[0], high[1], raw);
#pragma unroll
      for (int j = 0; j < kUpper; j++) {
        const u32 v = __byte_perm(low, high[j / 2], j % 2 ? 0x7610 : 0x5410);
        ptx::st_shared_v4(smem_table + tile * Table::kRowTableBytes +
                              Table::row_entry(lower | (upper + j) << NUM_BITS) + row * 16,
                          v, v, v, v);
      }
    }
  }
};

// Look up one step's four pairs, a byte each, in tables with entry stride 256: one PRMT makes `byte
// << 8 | lane * 4`.
FLUTE_DEVICE void place_and_read_rows(u32 (&a)[4], u32 bytes, u32 smem_table, u32 offset) {
  a[0] = ptx::ld_table(smem_table + __byte_perm(bytes, offset, 0x7604));
  a[1] = ptx::ld_table(smem_table + 128 + __byte_perm(bytes, offset, 0x7614));
  a[2] = ptx::ld_table(smem_table + __byte_perm(bytes, offset, 0x7624));
  a[3] = ptx::ld_table(smem_table + 128 + __byte_perm(bytes, offset, 0x7634));
}

template <>
struct Lookup<4> {
  static constexpr int kChunkBytes = 512;
  static constexpr int kWords = 4;
  static constexpr int kTableBytes = 256 * 128;
  static constexpr u32 kMask = 0x7F80;  // a pair's offset, `pair * 128`

  static FLUTE_DEVICE u32 lane_offset(int lane) { return lane * 4; }

  // Entry stride 128 bytes. 8 threads write one entry, 4 columns each.
  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const Entries<4, Act>& entries, int thread_idx,
                                 int num_threads) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      u32 v = entries.pair(i >> 3);
      ptx::st_shared_v4(smem_table + i * 16, v, v, v, v);
    }
  }

  static FLUTE_DEVICE void load(u32 (&w)[kWords], u32 smem_chunk, int lane) {
    ptx::ld_shared_v4(w, smem_chunk + lane * 16);
  }

  // Lookups of one step.
  static FLUTE_DEVICE void read_step(u32 (&a)[4], u32 word, u32 smem_table, u32 offset) {
    a[0] = ptx::ld_table(smem_table + (((word << 7) & kMask) | offset));
    a[1] = ptx::ld_table(smem_table + (((word >> 1) & kMask) | offset));
    a[2] = ptx::ld_table(smem_table + (((word >> 9) & kMask) | offset));
    a[3] = ptx::ld_table(smem_table + (((word >> 17) & kMask) | offset));
  }

  // The same with entries 256 bytes apart (the upper 128 stay unused): one PRMT then places a byte.
  static constexpr int kWideTableBytes = 256 * 256;

  template <class Act>
  static FLUTE_DEVICE void build_wide(u32 smem_table, const Entries<4, Act>& entries,
                                      int thread_idx, int num_threads) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      const u32 v = entries.pair(i >> 3);
      ptx::st_shared_v4(smem_table + (i >> 3) * 256 + (i & 7) * 16, v, v, v, v);
    }
  }

  static FLUTE_DEVICE void read_step_wide(u32 (&a)[4], u32 word, u32 smem_table, u32 offset) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = ptx::ld_table(smem_table + __byte_perm(word, offset, 0x7604 + i * 16));
  }

  // One table per row: entry stride 256, the upper 128 bytes serve rows g + 8.
  static constexpr int kRowTableBytes = 256 * 256;
  static FLUTE_DEVICE u32 row_entry(int pair) { return pair * 256; }

  template <class Act>
  static FLUTE_DEVICE void build_rows(u32 smem_table, const float* tables, int row, int num_rows,
                                      int thread_idx, int num_threads) {
    build_row_pairs<4, Act>(smem_table, tables, row, num_rows, thread_idx, num_threads);
  }

  static FLUTE_DEVICE void read_step_rows(u32 (&a)[4], u32 word, u32 smem_table, u32 offset) {
    place_and_read_rows(a, word, smem_table, offset);
  }
};

template <>
struct Lookup<3> {
  static constexpr int kChunkBytes = 384;
  static constexpr int kWords = 3;
  // A byte has a pair's codes in bits 0-2 and 4-6. Entry stride 256 bytes (the upper 128 stay
  // unused): one PRMT then places a byte at its offset, `byte << 8 | lane * 4`. The wide table has
  // each entry four times, whatever bits 3 and 7 are, which saves masks.
  static constexpr int kTableBytes = 0x78 * 256;
  static constexpr int kWideTableBytes = 256 * 256;
  static constexpr u32 kCodes = 0x77777777;

  static FLUTE_DEVICE u32 lane_offset(int lane) { return lane * 4; }

  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const Entries<3, Act>& entries, int thread_idx,
                                 int num_threads) {
    for (int i = thread_idx; i < 64 * 8; i += num_threads) {
      const int pair = i >> 3;
      const u32 v = entries.pair(pair);
      ptx::st_shared_v4(smem_table + (pair & 7 | (pair & 56) << 1) * 256 + (i & 7) * 16, v, v, v,
                        v);
    }
  }

  template <class Act>
  static FLUTE_DEVICE void build_wide(u32 smem_table, const Entries<3, Act>& entries,
                                      int thread_idx, int num_threads) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      const int byte = i >> 3;
      const u32 v = entries.pair(byte & 7 | (byte >> 1 & 56));
      ptx::st_shared_v4(smem_table + byte * 256 + (i & 7) * 16, v, v, v, v);
    }
  }

  // Words 0 and 1 of all lanes (8 bytes each), then word 2 of all lanes.
  static FLUTE_DEVICE void load(u32 (&w)[kWords], u32 smem_chunk, int lane) {
    ptx::ld_shared_v2(w[0], w[1], smem_chunk + lane * 8);
    w[2] = ptx::ld_shared(smem_chunk + 256 + lane * 4);
  }

  // A word's bytes are the pairs a0, a2, a1, a3 of a step, so that a half-word is of one row. Bits
  // 3 and 7 of the words of steps 0 to 2 are the bits 2, 1 and 0 of step 3's codes.
  static constexpr FLUTE_DEVICE int byte_of(int pair) { return pair >> 1 | (pair & 1) << 1; }

  // The word of step `st`; bits 3 and 7 of its bytes mean nothing.
  static FLUTE_DEVICE u32 step_word(const u32 (&w)[kWords], int st) {
    if (st < 3) return w[st];
    const u32 upper = ((w[0] >> 1) & 0x44444444u) | ((w[1] >> 2) & ~0x44444444u);
    return (upper & 0x66666666u) | ((w[2] >> 3) & ~0x66666666u);
  }

  // Lookups by the bytes of one step's word; those of row g + 8 `second` bytes further.
  static FLUTE_DEVICE void read_step(u32 (&a)[4], u32 word, u32 smem_table, u32 offset,
                                     u32 second = 0) {
    a[0] = ptx::ld_table(smem_table + __byte_perm(word, offset, 0x7604));
    a[2] = ptx::ld_table(smem_table + __byte_perm(word, offset, 0x7614));
    a[1] = ptx::ld_table(smem_table + second + __byte_perm(word, offset, 0x7624));
    a[3] = ptx::ld_table(smem_table + second + __byte_perm(word, offset, 0x7634));
  }

  // One table per row: the unused half of each entry's stride serves rows g + 8.
  static constexpr int kRowTableBytes = kTableBytes;
  static FLUTE_DEVICE u32 row_entry(int pair) { return ((pair & 7) | (pair & 56) << 1) * 256; }

  template <class Act>
  static FLUTE_DEVICE void build_rows(u32 smem_table, const float* tables, int row, int num_rows,
                                      int thread_idx, int num_threads) {
    build_row_pairs<3, Act>(smem_table, tables, row, num_rows, thread_idx, num_threads);
  }
};

template <>
struct Lookup<2> {
  static constexpr int kChunkBytes = 256;
  static constexpr int kWords = 2;
  static constexpr int kTableBytes = 256 * 128;
  static constexpr u32 kMask = 0x7F80;

  static FLUTE_DEVICE u32 lane_offset(int lane) { return (lane & 15) * 8; }

  // Entry = 4 values, 8 bytes, 16 columns. 8 threads write one entry, 2 columns each. Bits of the
  // index: codes of a0's (or a2's) pair at 0-1 and 4-5, of a1's (a3's) at 2-3 and 6-7.
  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const Entries<2, Act>& entries, int thread_idx,
                                 int num_threads, int stride = 128) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      const int e = i >> 3;
      const u32 v0 = entries.pair((e & 3) | ((e >> 2) & 12)),
                v1 = entries.pair(((e >> 2) & 3) | ((e >> 4) & 12));
      ptx::st_shared_v4(smem_table + e * stride + (i & 7) * 16, v0, v1, v0, v1);
    }
  }

  static FLUTE_DEVICE void load(u32 (&w)[kWords], u32 smem_chunk, int lane) {
    ptx::ld_shared_v2(w[0], w[1], smem_chunk + lane * 8);
  }

  // Half-word s % 2 of w[s / 2] is step s: bits 4j, 4j + 1 code j of row g, bits 4j + 2, 4j + 3
  // code j of row g + 8; codes 0, 1 are a0's (a1's), 2, 3 a2's (a3's). So a byte is a quad, and
  // alternate pairs of bits are the two rows'. Lookups of a word's two steps:
  static FLUTE_DEVICE void read_word(u32 (&a0)[4], u32 (&a1)[4], u32 word, u32 smem_table,
                                     u32 offset) {
    ptx::ld_table_v2(a0[0], a0[1], smem_table + (((word << 7) & kMask) | offset));
    ptx::ld_table_v2(a0[2], a0[3], smem_table + (((word >> 1) & kMask) | offset));
    ptx::ld_table_v2(a1[0], a1[1], smem_table + (((word >> 9) & kMask) | offset));
    ptx::ld_table_v2(a1[2], a1[3], smem_table + (((word >> 17) & kMask) | offset));
  }

  // The same with entries 256 bytes apart (the upper 128 stay unused): one PRMT then places a byte.
  static constexpr int kWideTableBytes = 256 * 256;

  template <class Act>
  static FLUTE_DEVICE void build_wide(u32 smem_table, const Entries<2, Act>& entries,
                                      int thread_idx, int num_threads) {
    build(smem_table, entries, thread_idx, num_threads, 256);
  }

  static FLUTE_DEVICE void read_word_wide(u32 (&a0)[4], u32 (&a1)[4], u32 word, u32 smem_table,
                                          u32 offset) {
    ptx::ld_table_v2(a0[0], a0[1], smem_table + __byte_perm(word, offset, 0x7604));
    ptx::ld_table_v2(a0[2], a0[3], smem_table + __byte_perm(word, offset, 0x7614));
    ptx::ld_table_v2(a1[0], a1[1], smem_table + __byte_perm(word, offset, 0x7624));
    ptx::ld_table_v2(a1[2], a1[3], smem_table + __byte_perm(word, offset, 0x7634));
  }

  // One table per row: pairs (index bits 0-1 and 4-5, stride 256), since a quad mixes rows g and g
  // + 8. Costs 8 more instructions a chunk, no more shared-memory cycles, and far less to build.
  static constexpr int kRowTableBytes = 0x34 * 256;
  static FLUTE_DEVICE u32 row_entry(int pair) { return ((pair & 3) | (pair & 12) << 2) * 256; }

  template <class Act>
  static FLUTE_DEVICE void build_rows(u32 smem_table, const float* tables, int row, int num_rows,
                                      int thread_idx, int num_threads) {
    build_row_pairs<2, Act>(smem_table, tables, row, num_rows, thread_idx, num_threads);
  }

  static FLUTE_DEVICE void read_word_rows(u32 (&a0)[4], u32 (&a1)[4], u32 word, u32 smem_table,
                                          u32 offset) {
    const u32 first = word & 0x33333333u, second = (word >> 2) & 0x33333333u;
    a0[0] = ptx::ld_table(smem_table + __byte_perm(first, offset, 0x7604));
    a0[1] = ptx::ld_table(smem_table + 128 + __byte_perm(second, offset, 0x7604));
    a0[2] = ptx::ld_table(smem_table + __byte_perm(first, offset, 0x7614));
    a0[3] = ptx::ld_table(smem_table + 128 + __byte_perm(second, offset, 0x7614));
    a1[0] = ptx::ld_table(smem_table + __byte_perm(first, offset, 0x7624));
    a1[1] = ptx::ld_table(smem_table + 128 + __byte_perm(second, offset, 0x7624));
    a1[2] = ptx::ld_table(smem_table + __byte_perm(first, offset, 0x7634));
    a1[3] = ptx::ld_table(smem_table + 128 + __byte_perm(second, offset, 0x7634));
  }
};

}  // namespace flute
