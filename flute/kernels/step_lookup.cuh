// Lookups of a batch kernel: a step at a time, and the layout of its tables in shared memory.
// The packed layout is lookup.cuh's.
#pragma once
#include "lookup.cuh"

namespace flute {

// Lookups a step at a time. `bytes`: the words of a chunk with a pair (quad) of codes in each byte;
// one PRMT places a byte at its offset in a table of 256-byte entries, `byte << 8 | lane offset`.
// Why not decode.cuh's tables of 128-byte entries: they take a shift and a mask per lookup.
template <int NUM_BITS>
struct StepLookup {
  using Table = Lookup<NUM_BITS>;
  static constexpr int kTableBytes = NUM_BITS == 3 ? Table::kTableBytes : 256 * 256;
  static constexpr int kWords = NUM_BITS == 2 ? 2 : 4;

  static FLUTE_DEVICE u32 lane_offset(int lane) { return Table::lane_offset(lane); }

  template <class Act>
  static FLUTE_DEVICE void build(u32 smem_table, const Entries<NUM_BITS, Act>& entries,
                                 int thread_idx, int num_threads) {
    if constexpr (NUM_BITS == 3) {
      Table::build(smem_table, entries, thread_idx, num_threads);
    } else {
      Table::build_wide(smem_table, entries, thread_idx, num_threads);
    }
  }

  static FLUTE_DEVICE void split(u32 (&bytes)[kWords], const u32 (&w)[Table::kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      if constexpr (NUM_BITS == 3)
        bytes[i] = Table::step_word(w, i) & Table::kCodes;
      else
        bytes[i] = w[i];
    }
  }

  // A fragments of step `st`; `row_table`: this lane's own tables (build_row_table).
  template <bool ROW_TABLES>
  static FLUTE_DEVICE void fragments(u32 (&a)[4], const u32 (&bytes)[kWords], int st, u32 table,
                                     u32 offset) {
    if constexpr (ROW_TABLES) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 v[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int bit = NUM_BITS == 2   ? st % 2 * 16 + (i >> 1) * 8 + e * 4 + (i & 1) * 2
                          : NUM_BITS == 3 ? Lookup<3>::byte_of(i) * 8 + e * 4
                                          : i * 8 + e * 4;
          const u32 word = bytes[NUM_BITS == 2 ? st / 2 : st];
          const u32 at = bit < 7 ? word << (7 - bit) : word >> (bit - 7);
          v[e] = ptx::ld_table(table + ((at & ((1 << NUM_BITS) - 1) << 7) | offset));
        }
        a[i] = __byte_perm(v[0], v[1], i % 2 ? 0x7632 : 0x5410);
      }
    } else if constexpr (NUM_BITS == 2) {
      const u32 v = bytes[st / 2];
      ptx::ld_table_v2(a[0], a[1], table + __byte_perm(v, offset, st % 2 ? 0x7624 : 0x7604));
      ptx::ld_table_v2(a[2], a[3], table + __byte_perm(v, offset, st % 2 ? 0x7634 : 0x7614));
    } else if constexpr (NUM_BITS == 3) {
      Table::read_step(a, bytes[st], table, offset);
    } else {
      Table::read_step_wide(a, bytes[st], table, offset);
    }
  }
};

}  // namespace flute
