/* One tile by AVX-512 with VNNI. Lane r of a vector is row r; a lookup is one permutation of words,
   vpermw, and vpdpwssd multiplies two codes by two activations a lane.

   vpermw looks at the low 5 bits of an index, so a table repeated over all its 32 entries needs no
   masking, and of 2 bits an index holds two codes: a second table, of its bits 2 and 3, saves every
   other shift. The halves of a word of 2 bits hold codes 8 apart, so activations are paired so. */
#include "lut.h"
#ifdef FLUTE_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif
#include <immintrin.h>

#define MOST_TOKENS 8

INLINE __m512 load_scales(const struct tiles *a, int64_t group) {
  const uint8_t *p = a->scales + (size_t)group * TILE * element_bytes(a->scale_type);
  if (a->scale_type == F32) return _mm512_loadu_ps((const float *)p);
  __m256i h = _mm256_loadu_si256((const __m256i *)p);
  if (a->scale_type == F16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Bit v of codes 30 and 31 is the top bit of each half of word v; gather them in the low bits. */
INLINE __m512i last_codes(const __m512i w[4]) {
  __m512i one = _mm512_srli_epi16(w[0], 15);
  __m512i two = _mm512_and_si512(_mm512_srli_epi16(w[1], 14), _mm512_set1_epi16(2));
  __m512i four = _mm512_and_si512(_mm512_srli_epi16(w[2], 13), _mm512_set1_epi16(4));
  return _mm512_or_si512(_mm512_or_si512(one, two), four);
}

/* Code i of each row's unit in the low bits of its lane. */
INLINE __m512i code_of(const __m512i w[4], const int bits, const int i) {
  if (bits == 4) return _mm512_srli_epi32(w[i / 8], 4 * (i % 8 / 2) + 16 * (i & 1));
  if (bits == 2) return _mm512_srli_epi32(w[i / 16], 2 * (i % 16));
  if (i < 30) return _mm512_srli_epi32(w[i / 10], 3 * (i % 10 / 2) + 16 * (i & 1));
  return _mm512_srli_epi32(last_codes(w), 16 * (i & 1));
}

/* The table for an index whose code starts at bit `first` of its 5 bits: entry i is that of the code
   in i >> first. */
INLINE __m512i fixed_table_of(const struct tiles *a, const int bits, const int first) {
  static const int16_t by_upper_bits[32] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                            0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  int64_t four;
  if (bits == 4) return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)a->fixed_table));
  if (bits == 3) return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)a->fixed_table));
  memcpy(&four, a->fixed_table, 8);
  __m512i table = _mm512_set1_epi64(four);
  return first ? _mm512_permutexvar_epi16(_mm512_loadu_si512(by_upper_bits), table) : table;
}

/* Why one tile at a time: of two, read in turns, this CPU's prefetchers keep up less well (Zen 4: 23
   GB/s instead of 28). Sums in flight, since vpdpwssd takes 4 cycles, come from chains. */
INLINE void fixed(const struct tiles *a, float *sums, const int bits, const int tokens) {
  const int chains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
  const int pairs = bits == 3 ? 5 : bits == 4 ? 4 : 8; /* lookups of a vector */
  const __m512i tables[2] = {fixed_table_of(a, bits, 0), fixed_table_of(a, bits, bits == 2 ? 2 : 0)};
  const int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  const uint8_t *p = a->codes;
  __m512 scales = _mm512_setzero_ps();
  int64_t next = 0, group = 0;
  for (int m = 0; m < tokens; m++) _mm512_storeu_ps(sums + m * TILE, _mm512_setzero_ps());
  for (int64_t b = 0, k = 0; b < blocks; b++) {
    const int64_t last = k + a->block < a->padded_K ? k + a->block : a->padded_K;
    if (k == next) {
      scales = load_scales(a, group++);
      next += a->group;
    }
    __m512i sum[8][4];
    for (int m = 0; m < tokens; m++)
      for (int c = 0; c < chains; c++) sum[m][c] = _mm512_setzero_si512();
    for (; k < last; k += UNIT, p += 64 * bits) {
      const int16_t *x = a->fixed_x + k * tokens;
      __m512i w[4];
#pragma GCC unroll 4
      for (int v = 0; v < bits; v++) {
        w[v] = _mm512_loadu_si512(p + 64 * v);
        __asm__("" : "+v"(w[v])); /* else it is loaded again for each shift */
        fetch_codes(p + 64 * v);
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) { /* codes 2i, 2i + 1; of 2 bits 16v + j, 16v + 8 + j */
        __m512i index = bits == 3 && i == 15 ? last_codes(w) : w[i / pairs];
        const int j = i % pairs;
        if (bits == 2)
          index = j > 1 ? _mm512_srli_epi16(index, 4 * (j / 2)) : index;
        else if (j && !(bits == 3 && i == 15))
          index = _mm512_srli_epi16(index, bits * j);
        __m512i values = _mm512_permutexvar_epi16(index, tables[bits == 2 ? j & 1 : 0]);
#pragma GCC unroll 8
        for (int m = 0; m < tokens; m++) {
          int32_t pair;
          memcpy(&pair, x + m * UNIT + 2 * i, 4);
          __m512i *s = &sum[m][i % chains];
          *s = _mm512_dpwssd_epi32(*s, values, _mm512_set1_epi32(pair));
        }
      }
    }
    for (int m = 0; m < tokens; m++) {
      __m512i s = sum[m][0];
      for (int c = 1; c < chains; c++) s = _mm512_add_epi32(s, sum[m][c]);
      __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(s), _mm512_set1_ps(a->x_unit[m * blocks + b]));
      __m512 total = _mm512_loadu_ps(sums + m * TILE); /* in memory: registers are for sum */
      _mm512_storeu_ps(sums + m * TILE, _mm512_add_ps(total, _mm512_mul_ps(part, scales)));
    }
  }
}

INLINE void exact(const struct tiles *a, float *sums, const int bits, const int tokens) {
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m512 table = _mm512_loadu_ps(entries);
  const uint8_t *p = a->codes;
  __m512 sum[8][2], scales = _mm512_setzero_ps();
  for (int m = 0; m < tokens; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < a->padded_K; k += UNIT, p += 64 * bits) {
    const float *x = a->x + k;
    __m512i w[4];
    if (k % a->group == 0) scales = load_scales(a, k / a->group);
#pragma GCC unroll 4
    for (int v = 0; v < bits; v++) {
      w[v] = _mm512_loadu_si512(p + 64 * v);
      fetch_codes(p + 64 * v);
    }
#pragma GCC unroll 32
    for (int i = 0; i < UNIT; i++) {
      __m512 value = _mm512_permutexvar_ps(code_of(w, bits, i), table);
      __m512 weight = _mm512_mul_ps(value, scales);
#pragma GCC unroll 8
      for (int m = 0; m < tokens; m++)
        sum[m][i & 1] =
            _mm512_fmadd_ps(weight, _mm512_set1_ps(x[m * a->padded_K + i]), sum[m][i & 1]);
    }
  }
  for (int m = 0; m < tokens; m++)
    _mm512_storeu_ps(sums + m * TILE, _mm512_add_ps(sum[m][0], sum[m][1]));
}

INLINE void dense(const struct tiles *a, int64_t k, float out[UNIT][TILE], const int bits) {
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m512 table = _mm512_loadu_ps(entries), scales = load_scales(a, k / a->group);
  const uint8_t *p = a->codes + (size_t)k * 2 * bits;
  __m512i w[4];
  for (int v = 0; v < bits; v++) w[v] = _mm512_loadu_si512(p + 64 * v);
#pragma GCC unroll 32
  for (int i = 0; i < UNIT; i++)
    _mm512_storeu_ps(out[i], _mm512_mul_ps(_mm512_permutexvar_ps(code_of(w, bits, i), table), scales));
}

/* Turn 16 x 16 words: word c of v[r] becomes word r of v[c]. */
INLINE void turn(__m512i v[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) /* v[i + c]: words 4q + c of vectors i .. i + 3, q a quarter */
    for (int h = 0; h < 2; h++) {
      v[i + 2 * h] = _mm512_unpacklo_epi64(w[i + h], w[i + 2 + h]);
      v[i + 2 * h + 1] = _mm512_unpackhi_epi64(w[i + h], w[i + 2 + h]);
    }
  for (int c = 0; c < 4; c++) {
    __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    __m512i d = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xDD), e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xDD);
    w[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    w[8 + c] = _mm512_shuffle_i32x4(a, b, 0xDD);
    w[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    w[12 + c] = _mm512_shuffle_i32x4(d, e, 0xDD);
  }
  for (int i = 0; i < 16; i++) v[i] = w[i];
}

/* entry * scale of a row, rounded to 16 bits; weights are no NaN, so rounding to bf16 is an addition. */
INLINE __m256i half_table(__m512 table, float scale, int type) {
  __m512 values = _mm512_mul_ps(table, _mm512_set1_ps(scale));
  if (type == F16) return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512i u = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
}

/* Four units at a time: their words are turned, so that a vector holds those of a row, and each unit
   of it becomes 32 codes by a permutation of half words and a shift. A table of the row's products
   with its scale, made once for a group, turns them into weights. */
INLINE void halves(const struct tiles *a, int rows, int type, uint16_t *out, const int bits) {
  uint16_t half[32], shift[32], tables[4][TILE][16];
  float entries[16], scales[TILE];
  for (int k = 0; k < UNIT; k++) {
    const int codes = bits == 4 ? 8 : bits == 3 ? 10 : 16, j = k % codes; /* of a word */
    half[k] = (uint16_t)(bits == 2 ? 2 * (k / codes) + j / 8 : 2 * (k / codes) + (k & 1));
    shift[k] = (uint16_t)(bits == 2 ? 2 * (j % 8) : k == 30 || k == 31 ? (bits == 3 ? 0 : 12) : bits * (j / 2));
  }
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m512i shifts = _mm512_loadu_si512(shift), first = _mm512_loadu_si512(half);
  const __m512 table = _mm512_loadu_ps(entries);
  const uint8_t *p = a->codes;
  int64_t next = 0, group = 0;
  int slot = 3;
  for (int64_t k = 0; k < a->padded_K; k += 4 * UNIT) {
    const int units = a->padded_K - k < 4 * UNIT ? (int)(a->padded_K - k) / UNIT : 4;
    __m512i v[16];
    int slots[4];
    for (int u = 0; u < units; u++, p += 64 * bits) {
      for (int i = 0; i < 4; i++)
        v[4 * u + i] = i < bits ? _mm512_loadu_si512(p + 64 * i) : _mm512_setzero_si512();
      if (bits == 3) v[4 * u + 3] = last_codes(v + 4 * u);
      if (k + u * UNIT == next) {
        slot = (slot + 1) % 4;
        next += a->group;
        _mm512_storeu_ps(scales, load_scales(a, group++));
        for (int r = 0; r < rows; r++)
          _mm256_storeu_si256((__m256i *)tables[slot][r], half_table(table, scales[r], type));
      }
      slots[u] = slot;
    }
    for (int i = 4 * units; i < 16; i++) v[i] = _mm512_setzero_si512();
    turn(v);
    for (int r = 0; r < rows; r++)
      for (int u = 0; u < units; u++) {
        const int64_t at = k + u * UNIT, left = a->K - at;
        __m512i index = _mm512_permutexvar_epi16(_mm512_add_epi16(first, _mm512_set1_epi16((short)(8 * u))), v[r]);
        __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)tables[slots[u]][r]));
        values = _mm512_permutexvar_epi16(_mm512_srlv_epi16(index, shifts), values);
        _mm512_mask_storeu_epi16(out + r * a->K + at, left >= UNIT ? ~0u : (1u << left) - 1, values);
      }
  }
}

static void any_halves(const struct tiles *a, int rows, int type, uint16_t *out) {
  if (a->num_bits == 4) halves(a, rows, type, out, 4);
  else if (a->num_bits == 3) halves(a, rows, type, out, 3);
  else halves(a, rows, type, out, 2);
}

#define WIDTH 16
#define F16_AT(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#include "variant.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

static int usable(void) {
  const uint32_t f = 1u << 16, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
  return (features(LEAF7_B) & (f | bw | vl)) == (f | bw | vl) && features(LEAF7_C) & vnni && system_saves(0xE6);
}

const struct variant flute_avx512 = {.name = "avx512", .usable = usable, .max_tokens = MOST_TOKENS, .order = BY_HALVES,
    .fixed = any_fixed, .exact = any_exact, .dense = any_dense, .token = any_token, .nearest = any_nearest,
    .halves = any_halves, .row = any_row, .steps = &all_steps};
#else
typedef int not_empty;
#endif
