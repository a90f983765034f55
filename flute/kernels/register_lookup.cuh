// Lookups in registers, by PRMT. Owns nothing of the packed layout, which is lookup.cuh's.
//
// A table's 16-bit values lie in registers as bytes: `low` has the low bytes of the entries, `high`
// the high bytes. What shared memory delivers, 64 values per clock, is what most limits a kernel at
// 2 and 3 bits, so each value that the ALU makes instead is a gain, until that is as busy.
//
//   2 bits   one PRMT per pair of values, whose selector has nibbles (code, code | 4) twice
//   3 bits   low bytes of four values, high bytes of four values, then two pairs of these
//   4 bits   the same from either half of the table, and the right one by a mask
//
// A PRMT reads the lower half of its selector; `upper_half` brings the other one there by the
// floating-point unit, which has time, instead of the ALU.
//
// 57344 x 8192, M = 1, in us, by how many of 8 steps are looked up in registers:
//
//            0     1     2     3     4     6     8
//   2 bits   48.1        42.9        45.4  50.2  55.7
//   3 bits   53.7  52.2  53.2  54.9  56.9        64.8
//
// Also tried: selectors of two steps by one 64-bit IMAD (it blocks dispatch); tables of a lane's
// own two rows, read anew for each tile (28672 x 4096, 2 bits: 19.5 us, none in registers 17.2).
// All on an H200, 2026-11-22.
#pragma once
#include "lookup.cuh"

namespace flute {

template <int NUM_BITS>
struct RegisterTable {
  static constexpr int kEntries = 1 << NUM_BITS;
  static constexpr int kRegisters = kEntries / 4;
  u32 low[kRegisters], high[kRegisters];

  // From entries as the activations' dtype, two in each of `v`, the lower in the lower half.
  FLUTE_DEVICE void set(const u32 (&v)[kEntries / 2]) {
#pragma unroll
    for (int i = 0; i < kRegisters; i++) {
      low[i] = __byte_perm(v[2 * i], v[2 * i + 1], 0x6420);
      high[i] = __byte_perm(v[2 * i], v[2 * i + 1], 0x7531);
    }
  }

  template <class Act>
  FLUTE_DEVICE void load(const Entries<NUM_BITS, Act>& entries) {
    u32 v[kEntries / 2];
#pragma unroll
    for (int i = 0; i < kEntries / 2; i++) v[i] = entries.pair(2 * i | (2 * i + 1) << NUM_BITS);
    set(v);
  }

  // 3 bits: the values of four codes, one in each nibble of the lower half of `codes`, below 8.
  FLUTE_DEVICE void look_up(u32& first, u32& second, u32 codes) const {
    const u32 lows = ptx::prmt(low[0], low[kRegisters - 1], codes),
              highs = ptx::prmt(high[0], high[kRegisters - 1], codes);
    first = __byte_perm(lows, highs, 0x5140);
    second = __byte_perm(lows, highs, 0x7362);
  }

  // 4 bits: the same, with the codes' lower three bits in `codes` and the fourth in `upper`, as 0
  // or 1 in each nibble.
  FLUTE_DEVICE void look_up(u32& first, u32& second, u32 codes, u32 upper) const {
    static_assert(NUM_BITS == 4, "two halves of a table");
    const u32 mask = ptx::prmt(0xFF00u, 0u, upper);
    const u32 lows = ptx::select(mask, ptx::prmt(low[2], low[3], codes),
                                 ptx::prmt(low[0], low[1], codes)),
              highs = ptx::select(mask, ptx::prmt(high[2], high[3], codes),
                                  ptx::prmt(high[0], high[1], codes));
    first = __byte_perm(lows, highs, 0x5140);
    second = __byte_perm(lows, highs, 0x7362);
  }

  // 2 bits, the two steps of a word. Multiplying by 0x11 doubles the codes of one place in four
  // bytes, which are the selectors of both steps. A register's codes then come from two bytes
  // instead of one, hence k in another order: half 0 holds k = 2q and 2q + 8, half 1 the odd ones
  // (`crossed`).
  FLUTE_DEVICE void word(u32 (&a0)[4], u32 (&a1)[4], u32 word) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {  // code i / 2 of the pair, row g + 8 * (i % 2)
      const u32 selectors = ((word >> 2 * i) & 0x03030303u) * 0x11u + 0x40404040u;
      a0[i] = ptx::prmt(low[0], high[0], selectors);
      a1[i] = ptx::prmt(low[0], high[0], ptx::upper_half(selectors));
    }
  }

  // The same in natural order of k: a byte's two codes of a row go to two bytes first, which the
  // second multiplication by 0x11 needs.
  FLUTE_DEVICE void word_in_order(u32 (&a0)[4], u32 (&a1)[4], u32 word) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 codes = (word >> ((i >> 1) * 8 + (i & 1) * 2)) & 0x00330033u;
      const u32 selectors = ((codes * 0x11u) & 0x03030303u) * 0x11u + 0x40404040u;
      a0[i] = ptx::prmt(low[0], high[0], selectors);
      a1[i] = ptx::prmt(low[0], high[0], ptx::upper_half(selectors));
    }
  }

  // 4 bits, one step, whose pairs a0 to a3 are the bytes of `word`.
  FLUTE_DEVICE void step_of_pairs(u32 (&a)[4], u32 word) const {
    const u32 codes = word & 0x77777777u, upper = (word >> 3) & 0x11111111u;
    look_up(a[0], a[1], codes, upper);
    look_up(a[2], a[3], ptx::upper_half(codes), ptx::upper_half(upper));
  }

  // 3 bits, one step.
  FLUTE_DEVICE void step(u32 (&a)[4], u32 word) const {
    const u32 codes = word & 0x77777777u;
    look_up(a[0], a[2], codes);
    look_up(a[1], a[3], ptx::upper_half(codes));
  }
};

}  // namespace flute
