/* One tile by AVX-512 with VNNI. Lane r of a vector is row r; a lookup is one permutation of words,
   vpermw (2 bits: vpermd of pairs), and vpdpwssd multiplies two codes by two activations a lane.

   vpermw looks at the low 5 bits of an index and vpermd at 4, so a table repeated over all its 32
   entries (pairs: 16) needs no masking. */
#include "lut.h"
#ifdef FLUTE_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif
#include <immintrin.h>

#define AHEAD 2048 /* bytes: how far codes are fetched before they are read */

INLINE __m512 load_scales(const struct tiles *a, int tile, int64_t group) {
  const uint8_t *p = a->scales + tile * a->scale_bytes + (size_t)group * TILE * element_bytes(a->scale_type);
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

INLINE __m512i fixed_table_of(const struct tiles *a, int bits) {
  int16_t entries[32];
  for (int i = 0; i < 32; i++)
    entries[i] = a->fixed_table[bits == 2 ? (i & 1 ? i / 2 >> 2 : i / 2 & 3) : i & ((1 << bits) - 1)];
  return _mm512_loadu_si512(entries);
}

INLINE void fixed(const struct tiles *a, float *sums, const int bits, const int tokens, const int T) {
  const int chains = tokens <= 2 ? 2 : 1; /* vpdpwssd takes 4 cycles or more: sums in flight */
  const int pairs = bits == 3 ? 5 : bits == 4 ? 4 : 8; /* lookups of a vector */
  const __m512i table = fixed_table_of(a, bits);
  const int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  __m512 total[2][8];
  for (int i = 0; i < T * tokens; i++) total[i / tokens][i % tokens] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++) {
    int64_t first = b * a->block, last = first + a->block;
    if (last > a->padded_K) last = a->padded_K;
    __m512i sum[2][8][2];
    for (int t = 0; t < T; t++)
      for (int m = 0; m < tokens; m++) sum[t][m][0] = sum[t][m][1] = _mm512_setzero_si512();
    for (int64_t k = first; k < last; k += UNIT) {
      const int16_t *x = a->fixed_x + k;
      for (int t = 0; t < T; t++) {
        const uint8_t *p = a->codes + t * a->code_bytes + (size_t)k * 2 * bits;
        __m512i w[4];
#pragma GCC unroll 4
        for (int v = 0; v < bits; v++) {
          w[v] = _mm512_loadu_si512(p + 64 * v);
          _mm_prefetch((const char *)p + 64 * v + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) { /* codes 2i, 2i + 1 */
          __m512i index = bits == 3 && i == 15 ? last_codes(w) : w[i / pairs];
          const int j = i % pairs;
          if (bits == 2)
            index = j ? _mm512_srli_epi32(index, 4 * j) : index;
          else if (j && !(bits == 3 && i == 15))
            index = _mm512_srli_epi16(index, bits * j);
          __m512i values = bits == 2 ? _mm512_permutexvar_epi32(index, table)
                                     : _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 8
          for (int m = 0; m < tokens; m++) {
            int32_t pair;
            memcpy(&pair, x + m * a->padded_K + 2 * i, 4);
            __m512i *s = &sum[t][m][i % chains];
            *s = _mm512_dpwssd_epi32(*s, values, _mm512_set1_epi32(pair));
          }
        }
      }
    }
    for (int t = 0; t < T; t++) {
      __m512 scales = load_scales(a, t, first / a->group);
      for (int m = 0; m < tokens; m++) {
        __m512i s = chains == 2 ? _mm512_add_epi32(sum[t][m][0], sum[t][m][1]) : sum[t][m][0];
        __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(s), _mm512_set1_ps(a->x_unit[m * blocks + b]));
        total[t][m] = _mm512_add_ps(total[t][m], _mm512_mul_ps(part, scales));
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < tokens; m++) _mm512_storeu_ps(sums + (t * tokens + m) * TILE, total[t][m]);
}

INLINE void exact(const struct tiles *a, float *sums, const int bits, const int tokens, const int T) {
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m512 table = _mm512_loadu_ps(entries);
  __m512 sum[2][8][2], scales[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int t = 0; t < T; t++)
    for (int m = 0; m < tokens; m++) sum[t][m][0] = sum[t][m][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < a->padded_K; k += UNIT) {
    const float *x = a->x + k;
    for (int t = 0; t < T; t++) {
      const uint8_t *p = a->codes + t * a->code_bytes + (size_t)k * 2 * bits;
      __m512i w[4];
      if (k % a->group == 0) scales[t] = load_scales(a, t, k / a->group);
#pragma GCC unroll 4
      for (int v = 0; v < bits; v++) {
        w[v] = _mm512_loadu_si512(p + 64 * v);
        _mm_prefetch((const char *)p + 64 * v + AHEAD, _MM_HINT_T0);
      }
#pragma GCC unroll 32
      for (int i = 0; i < UNIT; i++) {
        __m512 value = _mm512_permutexvar_ps(code_of(w, bits, i), table);
        __m512 weight = _mm512_mul_ps(value, scales[t]);
#pragma GCC unroll 8
        for (int m = 0; m < tokens; m++)
          sum[t][m][i & 1] =
              _mm512_fmadd_ps(weight, _mm512_set1_ps(x[m * a->padded_K + i]), sum[t][m][i & 1]);
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < tokens; m++)
      _mm512_storeu_ps(sums + (t * tokens + m) * TILE, _mm512_add_ps(sum[t][m][0], sum[t][m][1]));
}

INLINE void dense(const struct tiles *a, int64_t k, float out[UNIT][TILE], const int bits) {
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = a->table[i & ((1 << bits) - 1)];
  const __m512 table = _mm512_loadu_ps(entries), scales = load_scales(a, 0, k / a->group);
  const uint8_t *p = a->codes + (size_t)k * 2 * bits;
  __m512i w[4];
  for (int v = 0; v < bits; v++) w[v] = _mm512_loadu_si512(p + 64 * v);
#pragma GCC unroll 32
  for (int i = 0; i < UNIT; i++)
    _mm512_storeu_ps(out[i], _mm512_mul_ps(_mm512_permutexvar_ps(code_of(w, bits, i), table), scales));
}

/* Two tiles at a time for few tokens, to have more sums in flight; results are the same. */
#define VARIANT(NAME, BITS)                                                             \
  static void NAME##BITS(const struct tiles *a, int num_tiles, int tokens, float *sums) { \
    if (num_tiles == 2 && tokens == 1) { NAME(a, sums, BITS, 1, 2); return; }           \
    if (num_tiles == 2 && tokens == 2) { NAME(a, sums, BITS, 2, 2); return; }           \
    struct tiles one = *a;                                                              \
    for (int t = 0; t < num_tiles; t++, sums += tokens * TILE) {                        \
      if (tokens == 1) NAME(&one, sums, BITS, 1, 1);                                    \
      else if (tokens == 2) NAME(&one, sums, BITS, 2, 1);                               \
      else if (tokens == 4) NAME(&one, sums, BITS, 4, 1);                               \
      else NAME(&one, sums, BITS, 8, 1);                                                \
      one.codes += a->code_bytes;                                                       \
      one.scales += a->scale_bytes;                                                     \
    }                                                                                   \
  }
VARIANT(fixed, 2)
VARIANT(fixed, 3)
VARIANT(fixed, 4)
VARIANT(exact, 2)
VARIANT(exact, 3)
VARIANT(exact, 4)

static void any_fixed(const struct tiles *a, int num_tiles, int tokens, float *sums) {
  (a->num_bits == 4 ? fixed4 : a->num_bits == 3 ? fixed3 : fixed2)(a, num_tiles, tokens, sums);
}

static void any_exact(const struct tiles *a, int num_tiles, int tokens, float *sums) {
  (a->num_bits == 4 ? exact4 : a->num_bits == 3 ? exact3 : exact2)(a, num_tiles, tokens, sums);
}

static void any_dense(const struct tiles *a, int64_t k, float out[UNIT][TILE]) {
  if (a->num_bits == 4) dense(a, k, out, 4);
  else if (a->num_bits == 3) dense(a, k, out, 3);
  else dense(a, k, out, 2);
}

#ifdef __clang__
#pragma clang attribute pop
#endif

static int usable(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

const struct variant flute_avx512 = {"avx512", usable, 8, 0, any_fixed, any_exact, any_dense};
#else
typedef int not_empty;
#endif
