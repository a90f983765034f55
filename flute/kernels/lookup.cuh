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
// Shared memory is the busiest unit at 2 bits (77 %; ALU 37 %), so a part of the lookups is better
// done in registers, by PRMT. 57344 x 8192, M = 1, in us, by the part:
//
//   2 bits   none 47.8   an eighth 44.5   a quarter 43.3   half 47.9   all 63
//   3 bits   none 52.3   a quarter 54.9 (an eighth, 28672 x 4096: 17.0 against 16.4)
//
// (The eighth and all with other selectors, 3 bits before refills waited for reads.) At 3 bits the
// ALU is at 54 % already and an entry's bytes take two registers. Tried before (2 bits, half: 56):
// with __byte_perm, which masks each selector, and addresses of two instructions. Selectors of two
// steps by one 64-bit IMAD: 50.7 instead of 47.9, it blocks dispatch. 32 warps of 64 registers: 65
// to 69 (ncu). Wide tables at 3 and 4 bits: no gain. All on an H200, 2026-11-22.
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

// A table of 4 entries in registers, the bytes of its 16-bit values apart: byte i of `low` (`high`)
// is the low (high) byte of entry i. PRMT(low, high) with nibbles (c, c | 4) is entry c.
struct RegisterTable {
  u32 low, high;

  template <class Act>
  FLUTE_DEVICE void load(const float* table) {
    const u32 v01 = table_pair<2, Act>(table, 0 | 1 << 2),
              v23 = table_pair<2, Act>(table, 2 | 3 << 2);
    low = __byte_perm(v01, v23, 0x6420);
    high = __byte_perm(v01, v23, 0x7531);
  }
};

// The tables of one tile of 16 rows, for lookups by pair: entry `pair` at pair * 256 + h * 128 +
// lane * 4 holds the two values of row g + 8h. A lane serves two rows only, so per-row tables need
// no lookup more than a common one.
template <int NUM_BITS, class Act>
FLUTE_DEVICE void build_row_pairs(u32 smem_table, const float* tables, int row, int num_rows,
                                  int thread_idx, int num_threads) {
#pragma unroll 4
  for (int i = thread_idx; i < (1 << 2 * NUM_BITS) * 16; i += num_threads) {
    const float* table =
        tables + (static_cast<long long>(min(row + (i & 15), num_rows - 1)) << NUM_BITS);
    u32 v = table_pair<NUM_BITS, Act>(table, i >> 4);
    ptx::st_shared_v4(smem_table + i * 16, v, v, v, v);
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
  // Words are stored rotated left by 7, so that byte 0 already stands at its offset `pair * 128`.
  static constexpr u32 kMask = 0x7F80;

  static FLUTE_DEVICE u32 lane_offset(int lane) { return lane * 4; }
  static FLUTE_DEVICE u32 row_lane_offset(int lane) { return lane * 4; }

  // Entry stride 128 bytes. 8 threads write one entry, 4 columns each.
  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const float* table, int thread_idx,
                                 int num_threads) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      u32 v = table_pair<4, Act>(table, i >> 3);
      ptx::st_shared_v4(smem_table + i * 16, v, v, v, v);
    }
  }

  static FLUTE_DEVICE void load(u32 (&w)[kWords], u32 smem_chunk, int lane) {
    ptx::ld_shared_v4(w, smem_chunk + lane * 16);
  }

  static FLUTE_DEVICE void fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                     u32 offset) {
#pragma unroll
    for (int st = 0; st < 4; st++) {
      a[st][0] = ptx::ld_table(smem_table + ((w[st] & kMask) | offset));
      a[st][1] = ptx::ld_table(smem_table + (((w[st] >> 8) & kMask) | offset));
      a[st][2] = ptx::ld_table(smem_table + (((w[st] >> 16) & kMask) | offset));
      a[st][3] = ptx::ld_table(smem_table + ((__funnelshift_l(w[st], w[st], 8) & kMask) | offset));
    }
  }

  // One table per row: entry stride 256, the upper 128 bytes serve rows g + 8.
  static constexpr int kRowTableBytes = 256 * 256;
  static FLUTE_DEVICE u32 row_entry(int pair) { return pair * 256; }

  template <class Act>
  static FLUTE_DEVICE void build_rows(u32 smem_table, const float* tables, int row, int num_rows,
                                      int thread_idx, int num_threads) {
    build_row_pairs<4, Act>(smem_table, tables, row, num_rows, thread_idx, num_threads);
  }

  static FLUTE_DEVICE void row_fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                         u32 offset) {
#pragma unroll
    for (int st = 0; st < 4; st++)
      place_and_read_rows(a[st], __funnelshift_l(w[st], w[st], 25), smem_table, offset);
  }
};

template <>
struct Lookup<3> {
  static constexpr int kChunkBytes = 384;
  static constexpr int kWords = 3;
  // Entry stride 256 bytes (the upper 128 stay unused): one PRMT then places a byte at its offset,
  // `pair << 8 | lane * 4`. Why: 25 instead of 33 ALU instructions per chunk, of the 48 that full
  // bandwidth leaves at 3 bits.
  static constexpr int kTableBytes = 64 * 256;

  static FLUTE_DEVICE u32 lane_offset(int lane) { return lane * 4; }
  static FLUTE_DEVICE u32 row_lane_offset(int lane) { return lane * 4; }

  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const float* table, int thread_idx,
                                 int num_threads) {
    for (int i = thread_idx; i < 64 * 8; i += num_threads) {
      u32 v = table_pair<3, Act>(table, i >> 3);
      ptx::st_shared_v4(smem_table + (i >> 3) * 256 + (i & 7) * 16, v, v, v, v);
    }
  }

  // Words 0 and 1 of all lanes (8 bytes each), then word 2 of all lanes.
  static FLUTE_DEVICE void load(u32 (&w)[kWords], u32 smem_chunk, int lane) {
    ptx::ld_shared_v2(w[0], w[1], smem_chunk + lane * 8);
    w[2] = ptx::ld_shared(smem_chunk + 256 + lane * 4);
  }

  // Byte i of w[st], st < 3: low 6 bits = pair a_i of step st; top 2 bits = bits (2 st, 2 st + 1)
  // of pair a_i of step 3.
  static FLUTE_DEVICE void pairs(u32 (&v)[4], const u32 (&w)[kWords]) {
    constexpr u32 kLow6 = 0x3F3F3F3F;
    u32 low = ((w[0] >> 6) & 0x03030303u) | ((w[1] >> 4) & ~0x03030303u);
    u32 last = (low & 0x0F0F0F0Fu) | ((w[2] >> 2) & ~0x0F0F0F0Fu);
    v[0] = w[0] & kLow6;
    v[1] = w[1] & kLow6;
    v[2] = w[2] & kLow6;
    v[3] = last & kLow6;
  }

  static FLUTE_DEVICE void fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                     u32 offset) {
    u32 v[4];
    pairs(v, w);
#pragma unroll
    for (int st = 0; st < 4; st++) {
      a[st][0] = ptx::ld_table(smem_table + __byte_perm(v[st], offset, 0x7604));
      a[st][1] = ptx::ld_table(smem_table + __byte_perm(v[st], offset, 0x7614));
      a[st][2] = ptx::ld_table(smem_table + __byte_perm(v[st], offset, 0x7624));
      a[st][3] = ptx::ld_table(smem_table + __byte_perm(v[st], offset, 0x7634));
    }
  }

  // One table per row: the unused half of each entry's stride serves rows g + 8.
  static constexpr int kRowTableBytes = 64 * 256;
  static FLUTE_DEVICE u32 row_entry(int pair) { return pair * 256; }

  template <class Act>
  static FLUTE_DEVICE void build_rows(u32 smem_table, const float* tables, int row, int num_rows,
                                      int thread_idx, int num_threads) {
    build_row_pairs<3, Act>(smem_table, tables, row, num_rows, thread_idx, num_threads);
  }

  static FLUTE_DEVICE void row_fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                         u32 offset) {
    u32 v[4];
    pairs(v, w);
#pragma unroll
    for (int st = 0; st < 4; st++) place_and_read_rows(a[st], v[st], smem_table, offset);
  }
};

template <>
struct Lookup<2> {
  static constexpr int kChunkBytes = 256;
  static constexpr int kWords = 2;
  static constexpr int kTableBytes = 256 * 128;
  static constexpr u32 kMask = 0x7F80;  // words rotated left by 7, as for 4 bits

  static FLUTE_DEVICE u32 lane_offset(int lane) { return (lane & 15) * 8; }

  // Entry = 4 values, 8 bytes, 16 columns. 8 threads write one entry, 2 columns each. Bits of the
  // index: codes of a0's (or a2's) pair at 0-1 and 4-5, of a1's (a3's) at 2-3 and 6-7.
  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const float* table, int thread_idx,
                                 int num_threads) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      const int e = i >> 3;
      const u32 v0 = table_pair<2, Act>(table, (e & 3) | ((e >> 2) & 12)),
                v1 = table_pair<2, Act>(table, ((e >> 2) & 3) | ((e >> 4) & 12));
      ptx::st_shared_v4(smem_table + i * 16, v0, v1, v0, v1);
    }
  }

  static FLUTE_DEVICE void load(u32 (&w)[kWords], u32 smem_chunk, int lane) {
    ptx::ld_shared_v2(w[0], w[1], smem_chunk + lane * 8);
  }

  // Before the rotation, half-word s % 2 of w[s / 2] is step s: bits 4j, 4j + 1 code j of row g,
  // bits 4j + 2, 4j + 3 code j of row g + 8; codes 0, 1 are a0's (a1's), 2, 3 a2's (a3's). So a
  // byte is a quad, and alternate pairs of bits are the two rows'.
  static FLUTE_DEVICE void fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                     u32 offset) {
#pragma unroll
    for (int st = 0; st < 4; st++) {
      const u32 v = w[st / 2];
      const u32 at0 = st % 2 ? v >> 16 : v, at1 = st % 2 ? __funnelshift_l(v, v, 8) : v >> 8;
      ptx::ld_table_v2(a[st][0], a[st][1], smem_table + ((at0 & kMask) | offset));
      ptx::ld_table_v2(a[st][2], a[st][3], smem_table + ((at1 & kMask) | offset));
    }
  }

  // The same with entries 256 bytes apart (the upper 128 stay unused): one PRMT then places a byte,
  // as for 3 bits, which leaves the ALU time for lookups in registers.
  static constexpr int kWideTableBytes = 256 * 256;

  template <class Act>
  static FLUTE_DEVICE void build_wide(u32 smem_table, const float* table, int thread_idx,
                                      int num_threads) {
    for (int i = thread_idx; i < 256 * 8; i += num_threads) {
      const int e = i >> 3;
      const u32 v0 = table_pair<2, Act>(table, (e & 3) | ((e >> 2) & 12)),
                v1 = table_pair<2, Act>(table, ((e >> 2) & 3) | ((e >> 4) & 12));
      ptx::st_shared_v4(smem_table + e * 256 + (i & 7) * 16, v0, v1, v0, v1);
    }
  }

  static FLUTE_DEVICE void wide_fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                          u32 offset) {
#pragma unroll
    for (int i = 0; i < 2; i++) wide_word(a[2 * i], a[2 * i + 1], w[i], smem_table, offset);
  }

  // The first two steps in registers, the others from the wide table. A register takes one PRMT,
  // whose selector has nibbles (code, code | 4) twice. Multiplying by 0x11 doubles the codes of one
  // place in four bytes, which are the selectors of two steps. A register's codes then come from
  // two bytes instead of one, hence k in another order: half 0 holds k = 2q and 2q + 8, half 1 the
  // odd ones (`crossed`).
  static FLUTE_DEVICE void mixed_fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                           u32 offset, const RegisterTable& table) {
#pragma unroll
    for (int i = 0; i < 4; i++) {  // code i / 2 of the pair, row g + 8 * (i % 2)
      const u32 selectors =
          (__funnelshift_r(w[0], w[0], 7 + 2 * i) & 0x03030303u) * 0x11u + 0x40404040u;
      a[0][i] = ptx::prmt(table.low, table.high, selectors);
      a[1][i] = ptx::prmt(table.low, table.high, selectors >> 16);
    }
    wide_word(a[2], a[3], w[1], smem_table, offset);
  }

  static constexpr FLUTE_DEVICE bool crossed(int step) { return step < 2; }

  static FLUTE_DEVICE void wide_word(u32 (&a0)[4], u32 (&a1)[4], u32 word, u32 smem_table,
                                     u32 offset) {
    const u32 plain = __funnelshift_r(word, word, 7);
    ptx::ld_table_v2(a0[0], a0[1], smem_table + __byte_perm(plain, offset, 0x7604));
    ptx::ld_table_v2(a0[2], a0[3], smem_table + __byte_perm(plain, offset, 0x7614));
    ptx::ld_table_v2(a1[0], a1[1], smem_table + __byte_perm(plain, offset, 0x7624));
    ptx::ld_table_v2(a1[2], a1[3], smem_table + __byte_perm(plain, offset, 0x7634));
  }

  // One table per row: pairs (index bits 0-1 and 4-5, stride 256), since a quad mixes rows g and g
  // + 8. Costs 8 more instructions a chunk, no more shared-memory cycles, and far less to build.
  static constexpr int kRowTableBytes = 64 * 256;
  static FLUTE_DEVICE u32 row_entry(int pair) { return ((pair & 3) | (pair & 12) << 2) * 256; }
  static FLUTE_DEVICE u32 row_lane_offset(int lane) { return lane * 4; }

  template <class Act>
  static FLUTE_DEVICE void build_rows(u32 smem_table, const float* tables, int row, int num_rows,
                                      int thread_idx, int num_threads) {
    for (int i = thread_idx; i < 16 * 16; i += num_threads) {
      const float* table =
          tables + (static_cast<long long>(min(row + (i & 15), num_rows - 1)) << 2);
      const int pair = i >> 4;
      const u32 v = table_pair<2, Act>(table, pair);
      ptx::st_shared_v4(smem_table + ((pair & 3) | (pair & 12) << 2) * 256 + (i & 15) * 16, v, v, v,
                        v);
    }
  }

  static FLUTE_DEVICE void row_fragments(u32 (&a)[4][4], const u32 (&w)[kWords], u32 smem_table,
                                         u32 offset) {
#pragma unroll
    for (int st = 0; st < 4; st++) {
      const u32 plain = __funnelshift_l(w[st / 2], w[st / 2], 25);
      const u32 even = plain & 0x33333333u, odd = (plain >> 2) & 0x33333333u;
      const u32 first = st % 2 ? 0x7624 : 0x7604, second = st % 2 ? 0x7634 : 0x7614;
      a[st][0] = ptx::ld_table(smem_table + __byte_perm(even, offset, first));
      a[st][1] = ptx::ld_table(smem_table + 128 + __byte_perm(odd, offset, first));
      a[st][2] = ptx::ld_table(smem_table + __byte_perm(even, offset, second));
      a[st][3] = ptx::ld_table(smem_table + 128 + __byte_perm(odd, offset, second));
    }
  }
};

}  // namespace flute
