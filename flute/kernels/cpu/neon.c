/* One tile by NEON, four rows at a time. Lookups as in avx2.c: tables of low and of high bytes, zipped
   into 16-bit integers; three bits have both in one table. Four of 4 and 2 bits are codes of one row,
   so a sum has a vector per row until the end of its block. */
#include "lut.h"
#ifdef FLUTE_ARM
#include <arm_neon.h>

INLINE float32x4_t load_scales(const struct tiles *a, int64_t group, int quarter) {
  const uint8_t *p = a->scales + (size_t)(group * TILE + 4 * quarter) * element_bytes(a->scale_type);
  if (a->scale_type == F32) return vld1q_f32((const float *)p);
  uint16x4_t h = vld1_u16((const uint16_t *)p);
  if (a->scale_type == F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
  return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

INLINE void byte_tables(const struct tiles *a, int bits, uint8x16_t tables[4]) {
  uint8_t bytes[4][16];
  for (int i = 0; i < 16; i++)
    for (int t = 0; t < 4; t++) {
      int code = bits == 4 ? i : bits == 3 ? i & 7 : t < 2 ? i & 3 : i >> 2;
      int high = bits == 3 ? i >> 3 : t & 1;
      bytes[t][i] = (uint8_t)((uint16_t)a->fixed_table[code] >> 8 * high);
    }
  for (int t = 0; t < 4; t++) tables[t] = vld1q_u8(bytes[t]);
}

INLINE uint16x8_t last_codes(const uint8x16_t w[4]) {
  uint16x8_t one = vshrq_n_u16(vreinterpretq_u16_u8(w[0]), 15);
  uint16x8_t two = vandq_u16(vshrq_n_u16(vreinterpretq_u16_u8(w[1]), 14), vdupq_n_u16(2));
  uint16x8_t four = vandq_u16(vshrq_n_u16(vreinterpretq_u16_u8(w[2]), 13), vdupq_n_u16(4));
  return vorrq_u16(vorrq_u16(one, two), four);
}

INLINE void fixed(const struct tiles *a, float *sums, const int bits, const int tokens) {
  const int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  uint8x16_t tables[4];
  byte_tables(a, bits, tables);
  float32x4_t total[4][4];
  for (int i = 0; i < 4 * tokens; i++) total[i / tokens][i % tokens] = vdupq_n_f32(0);
  for (int64_t b = 0; b < blocks; b++) {
    int64_t first = b * a->block, last = first + a->block;
    if (last > a->padded_K) last = a->padded_K;
    for (int quarter = 0; quarter < 4; quarter++) {
      int32x4_t sum[4][4];
      for (int m = 0; m < tokens; m++)
        for (int r = 0; r < 4; r++) sum[m][r] = vdupq_n_s32(0);
      for (int64_t k = first; k < last; k += UNIT) {
        const uint8_t *p = a->codes + (size_t)k * 2 * bits + 16 * quarter;
        const int16_t *x = a->fixed_x + k * tokens;
        uint8x16_t w[4];
        for (int v = 0; v < bits; v++) w[v] = vld1q_u8(p + 64 * v);
        if (bits == 3) {
          for (int i = 0; i < 16; i++) {
            uint16x8_t code = i == 15 ? last_codes(w)
                                      : vshlq_u16(vreinterpretq_u16_u8(w[i / 5]),
                                                  vdupq_n_s16((int16_t)(-3 * (i % 5))));
            code = vandq_u16(code, vdupq_n_u16(7));
            code = vorrq_u16(vorrq_u16(code, vshlq_n_u16(code, 8)), vdupq_n_u16(0x0800));
            int16x8_t values =
                vreinterpretq_s16_u8(vqtbl1q_u8(tables[0], vreinterpretq_u8_u16(code)));
            for (int m = 0; m < tokens; m++) {
              int32_t pair;
              memcpy(&pair, x + m * UNIT + 2 * i, 4);
              int16x4_t xs = vreinterpret_s16_s32(vdup_n_s32(pair));
              sum[m][0] = vmlal_s16(sum[m][0], vget_low_s16(values), xs);
              sum[m][1] = vmlal_s16(sum[m][1], vget_high_s16(values), xs);
            }
          }
          continue;
        }
        const int planes = bits == 2 ? 2 : 1;
        for (int i = 0; i < 2 * bits; i++) {
          uint8x16_t index = i & 1 ? vshrq_n_u8(w[i / 2], 4) : vandq_u8(w[i / 2], vdupq_n_u8(15));
          for (int c = 0; c < planes; c++) {
            uint8x16_t low = vqtbl1q_u8(tables[2 * c], index);
            uint8x16_t high = vqtbl1q_u8(tables[2 * c + 1], index);
            int16x8_t one = vreinterpretq_s16_u8(vzip1q_u8(low, high));
            int16x8_t two = vreinterpretq_s16_u8(vzip2q_u8(low, high));
            for (int m = 0; m < tokens; m++) {
              int16x4_t xs = vld1_s16(x + m * UNIT + 4 * (planes * i + c));
              sum[m][0] = vmlal_s16(sum[m][0], vget_low_s16(one), xs);
              sum[m][1] = vmlal_s16(sum[m][1], vget_high_s16(one), xs);
              sum[m][2] = vmlal_s16(sum[m][2], vget_low_s16(two), xs);
              sum[m][3] = vmlal_s16(sum[m][3], vget_high_s16(two), xs);
            }
          }
        }
      }
      float32x4_t scales = load_scales(a, first / a->group, quarter);
      for (int m = 0; m < tokens; m++) {
        int32x4_t s = vpaddq_s32(sum[m][0], sum[m][1]);
        if (bits != 3) s = vpaddq_s32(s, vpaddq_s32(sum[m][2], sum[m][3]));
        float32x4_t part = vmulq_n_f32(vcvtq_f32_s32(s), a->x_unit[m * blocks + b]);
        total[quarter][m] = vaddq_f32(total[quarter][m], vmulq_f32(part, scales));
      }
    }
  }
  for (int quarter = 0; quarter < 4; quarter++)
    for (int m = 0; m < tokens; m++) vst1q_f32(sums + m * TILE + 4 * quarter, total[quarter][m]);
}

INLINE void exact(const struct tiles *a, float *sums, const int bits, const int tokens) {
  (void)bits;
  flute_scalar.exact(a, tokens, sums);
}

INLINE void dense(const struct tiles *a, int64_t k, float out[UNIT][TILE], const int bits) {
  (void)bits;
  flute_scalar.dense(a, k, out);
}

#define MOST_TOKENS 4
#define WIDTH 4
#define F16_AT(p) vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)(p))))
#include "variant.h"

static int usable(void) { return 1; }

const struct variant flute_neon = {.name = "neon", .usable = usable, .max_tokens = MOST_TOKENS, .order = BY_BYTES,
    .fixed = any_fixed, .exact = any_exact, .dense = any_dense, .token = any_token, .nearest = any_nearest,
    .halves = NULL, .row = any_row, .steps = &all_steps};
#else
typedef int not_empty;
#endif
