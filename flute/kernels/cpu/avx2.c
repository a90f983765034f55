/* One tile by AVX2, half of its rows at a time. A byte shuffle looks 16 bytes up, so a table of 16-bit
   integers is two of bytes, of low and of high halves, put together by an unpacking:

       4 bits   low nibbles of a row's word are codes 0 4 1 5 of 8, high ones 2 6 3 7
       2 bits   a nibble is two codes; low ones are pairs 0 2 4 6 of 8, high ones 1 3 5 7
       3 bits   of a half word's five codes the first four make two pairs of bytes; the fifth ones and
                the last codes of the unit make two more

   The activations are in that order too (BY_BYTES), so a vector of words meets a broadcast of four.
   Unpacked vectors hold rows 0 1 | 4 5 and 2 3 | 6 7; a horizontal addition at the end of a block puts
   rows in order. */
#include "lut.h"
#ifdef FLUTE_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>


INLINE __m256 load_scales(const struct tiles *a, int64_t group, int half) {
  const uint8_t *p = a->scales + (size_t)(group * TILE + 8 * half) * element_bytes(a->scale_type);
  if (a->scale_type == F32) return _mm256_loadu_ps((const float *)p);
  __m128i h = _mm_loadu_si128((const __m128i *)p);
  if (a->scale_type == F16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

INLINE __m256i last_codes(const __m256i w[4]) {
  __m256i one = _mm256_srli_epi16(w[0], 15);
  __m256i two = _mm256_and_si256(_mm256_srli_epi16(w[1], 14), _mm256_set1_epi16(2));
  __m256i four = _mm256_and_si256(_mm256_srli_epi16(w[2], 13), _mm256_set1_epi16(4));
  return _mm256_or_si256(_mm256_or_si256(one, two), four);
}

/* Entry of code i of each row's unit. */
INLINE __m256 value_of(const __m256i w[4], const int bits, const int i, __m256 low, __m256 high) {
  __m256i index;
  if (bits == 4) index = _mm256_srli_epi32(w[i / 8], 4 * (i % 8 / 2) + 16 * (i & 1));
  else if (bits == 2) index = _mm256_srli_epi32(w[i / 16], 2 * (i % 16));
  else if (i < 30) index = _mm256_srli_epi32(w[i / 10], 3 * (i % 10 / 2) + 16 * (i & 1));
  else index = _mm256_srli_epi32(last_codes(w), 16 * (i & 1));
  __m256 value = _mm256_permutevar8x32_ps(low, index);
  if (bits != 4) return value;
  /* Bit 3 of the code chooses; it is moved to where a blend looks. */
  return _mm256_blendv_ps(value, _mm256_permutevar8x32_ps(high, index),
                          _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

/* A sum as it is now: else gcc adds products to one another first, keeps them all, and so spills. */
#define IN_TURN(sum) __asm__("" : "+x"(sum))

/* Tables of bytes, twice each: low, high; of 2 bits of the first code of a pair, then of the second. */
INLINE void byte_tables(const struct tiles *a, int bits, __m256i tables[4]) {
  uint8_t bytes[4][16] = {{0}};
  for (int i = 0; i < 16; i++)
    for (int t = 0; t < 4; t++) {
      int code = bits == 4 ? i : bits == 3 ? i & 7 : t < 2 ? i & 3 : i >> 2;
      bytes[t][i] = (uint8_t)((uint16_t)a->fixed_table[code] >> 8 * (t & 1));
    }
  for (int t = 0; t < 4; t++)
    tables[t] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[t]));
}

/* Codes of 3 bits as bytes, two of each half word: i < 6: codes 2h and 2h + 1 of vector i / 2, h = i & 1;
   i = 6, 7: the fifth ones of vectors 0 and 1, and of vector 2 beside the last codes, w[3]. */
INLINE __m256i pairs_of(const __m256i w[4], const int i) {
  __m256i low, high;
  if (i < 6) {
    low = i & 1 ? _mm256_srli_epi16(w[i / 2], 6) : w[i / 2];
    high = i & 1 ? _mm256_srli_epi16(w[i / 2], 1) : _mm256_slli_epi16(w[i / 2], 5);
  } else {
    low = _mm256_srli_epi16(w[i == 6 ? 0 : 2], 12);
    high = i == 6 ? _mm256_srli_epi16(w[1], 4) : _mm256_slli_epi16(w[3], 8);
  }
  const __m256i both = _mm256_blendv_epi8(low, high, _mm256_set1_epi16((short)0xFF00));
  return _mm256_and_si256(both, _mm256_set1_epi8(7));
}

INLINE void fixed(const struct tiles *a, float *sums, const int bits, const int tokens) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  __m256i tables[4];
  byte_tables(a, bits, tables);
  __m256 total[2][4];
  for (int i = 0; i < 2 * tokens; i++) total[i / tokens][i % tokens] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; b++) {
    int64_t first = b * a->block, last = first + a->block;
    if (last > a->padded_K) last = a->padded_K;
    for (int half = 0; half < 2; half++) {
      __m256i sum[4][2];
      for (int m = 0; m < tokens; m++) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
      for (int64_t k = first; k < last; k += UNIT) {
        const uint8_t *p = a->codes + (size_t)k * 2 * bits + 32 * half;
        const int16_t *x = a->fixed_x + k * tokens;
        __m256i w[4];
#pragma GCC unroll 4
        for (int v = 0; v < bits; v++) {
          w[v] = _mm256_loadu_si256((const __m256i *)(p + 64 * v));
          if (!half) fetch_codes(p + 64 * v);
        }
        if (bits == 3) w[3] = last_codes(w);
        const int planes = bits == 2 ? 2 : 1, lookups = 8 / planes; /* planes: codes of a nibble */
#pragma GCC unroll 8
        for (int i = 0; i < lookups; i++) { /* nibbles i & 1 of vector i / 2, or pairs */
          __m256i index = i & 1 ? _mm256_srli_epi16(w[i / 2], 4) : w[i / 2];
          index = bits == 3 ? pairs_of(w, i) : _mm256_and_si256(index, nibble);
#pragma GCC unroll 2
          for (int c = 0; c < planes; c++) {
            __m256i low = _mm256_shuffle_epi8(tables[2 * c], index);
            __m256i high = _mm256_shuffle_epi8(tables[2 * c + 1], index);
            __m256i one = _mm256_unpacklo_epi8(low, high), two = _mm256_unpackhi_epi8(low, high);
#pragma GCC unroll 4
            for (int m = 0; m < tokens; m++) {
              int64_t four;
              memcpy(&four, x + m * UNIT + 4 * (planes * i + c), 8);
              __m256i xs = _mm256_set1_epi64x(four);
              sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(one, xs));
              sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(two, xs));
              IN_TURN(sum[m][0]);
              IN_TURN(sum[m][1]);
            }
          }
        }
      }
      __m256 scales = load_scales(a, first / a->group, half);
      for (int m = 0; m < tokens; m++) {
        __m256i s = _mm256_hadd_epi32(sum[m][0], sum[m][1]);
        __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(s), _mm256_set1_ps(a->x_unit[m * blocks + b]));
        total[half][m] = _mm256_add_ps(total[half][m], _mm256_mul_ps(part, scales));
      }
    }
  }
  for (int half = 0; half < 2; half++)
    for (int m = 0; m < tokens; m++) _mm256_storeu_ps(sums + m * TILE + 8 * half, total[half][m]);
}

INLINE void exact(const struct tiles *a, float *sums, const int bits, const int tokens) {
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m256 low = _mm256_loadu_ps(entries), high = _mm256_loadu_ps(entries + 8);
  for (int half = 0; half < 2; half++) {
    __m256 sum[4][2], scales = _mm256_setzero_ps();
    for (int m = 0; m < tokens; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < a->padded_K; k += UNIT) {
      const uint8_t *p = a->codes + (size_t)k * 2 * bits + 32 * half;
      const float *x = a->x + k;
      __m256i w[4];
      if (k % a->group == 0) scales = load_scales(a, k / a->group, half);
#pragma GCC unroll 4
      for (int v = 0; v < bits; v++) w[v] = _mm256_loadu_si256((const __m256i *)(p + 64 * v));
#pragma GCC unroll 32
      for (int i = 0; i < UNIT; i++) {
        __m256 weight = _mm256_mul_ps(value_of(w, bits, i, low, high), scales);
#pragma GCC unroll 4
        for (int m = 0; m < tokens; m++)
          sum[m][i & 1] =
              _mm256_fmadd_ps(weight, _mm256_set1_ps(x[m * a->padded_K + i]), sum[m][i & 1]);
      }
    }
    for (int m = 0; m < tokens; m++)
      _mm256_storeu_ps(sums + m * TILE + 8 * half, _mm256_add_ps(sum[m][0], sum[m][1]));
  }
}

INLINE void dense(const struct tiles *a, int64_t k, float out[UNIT][TILE], const int bits) {
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m256 low = _mm256_loadu_ps(entries), high = _mm256_loadu_ps(entries + 8);
  for (int half = 0; half < 2; half++) {
    const uint8_t *p = a->codes + (size_t)k * 2 * bits + 32 * half;
    const __m256 scales = load_scales(a, k / a->group, half);
    __m256i w[4];
    for (int v = 0; v < bits; v++) w[v] = _mm256_loadu_si256((const __m256i *)(p + 64 * v));
#pragma GCC unroll 32
    for (int i = 0; i < UNIT; i++)
      _mm256_storeu_ps(out[i] + 8 * half, _mm256_mul_ps(value_of(w, bits, i, low, high), scales));
  }
}

#define MOST_TOKENS 4
#define WIDTH 8
#define F16_AT(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#include "variant.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

static int usable(void) {
  const uint32_t fma = 1u << 12, avx = 1u << 28, f16c = 1u << 29, avx2 = 1u << 5;
  return (features(LEAF1_C) & (fma | avx | f16c)) == (fma | avx | f16c) && features(LEAF7_B) & avx2 &&
         system_saves(0x06);
}

const struct variant flute_avx2 = {.name = "avx2", .usable = usable, .max_tokens = MOST_TOKENS, .order = BY_BYTES_AND_PAIRS,
    .fixed = any_fixed, .exact = any_exact, .dense = any_dense, .token = any_token, .nearest = any_nearest,
    .halves = NULL, .row = any_row, .steps = &all_steps};
#else
typedef int not_empty;
#endif
