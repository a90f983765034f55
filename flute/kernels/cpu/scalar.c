/* One tile in plain C: for CPUs without a variant of their own, and what variants are tested by. */
#include "lut.h"

static void unit_codes(const struct tiles *a, int64_t unit, int row, uint8_t codes[UNIT]) {
  uint32_t words[4];
  const uint8_t *p = a->codes + (size_t)unit * 64 * a->num_bits + 4 * row;
  for (int v = 0; v < a->num_bits; v++) memcpy(words + v, p + 64 * v, 4);
  unpack_unit(words, a->num_bits, codes);
}

static void fixed(const struct tiles *a, float *sums, int bits, int tokens) {
  int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  (void)bits;
  for (int r = 0; r < TILE; r++) {
    float *sum = sums + r;
    for (int m = 0; m < tokens; m++) sum[m * TILE] = 0;
    for (int64_t b = 0; b < blocks; b++) {
      int64_t first = b * a->block, last = first + a->block;
      int32_t total[MAX_TOKENS] = {0};
      if (last > a->padded_K) last = a->padded_K;
      for (int64_t k = first; k < last; k += UNIT) {
        uint8_t codes[UNIT];
        unit_codes(a, k / UNIT, r, codes);
        for (int i = 0; i < UNIT; i++)
          for (int m = 0; m < tokens; m++)
            total[m] += (int32_t)a->fixed_table[codes[i]] * a->fixed_x[k * tokens + m * UNIT + i];
      }
      float scale = load(a->scales, first / a->group * TILE + r, a->scale_type);
      for (int m = 0; m < tokens; m++) {
        float part = (float)total[m] * a->x_unit[m * blocks + b];
        sum[m * TILE] = sum[m * TILE] + part * scale;
      }
    }
  }
}

static void exact(const struct tiles *a, float *sums, int bits, int tokens) {
  (void)bits;
  for (int r = 0; r < TILE; r++) {
    float total[MAX_TOKENS][2] = {{0}};
    for (int64_t k = 0; k < a->padded_K; k += UNIT) {
      uint8_t codes[UNIT];
      unit_codes(a, k / UNIT, r, codes);
      float scale = load(a->scales, k / a->group * TILE + r, a->scale_type);
      for (int i = 0; i < UNIT; i++) {
        float w = a->table[codes[i]] * scale;
        for (int m = 0; m < tokens; m++) {
          float part = w * a->x[m * a->padded_K + k + i];
          total[m][i & 1] += part;
        }
      }
    }
    for (int m = 0; m < tokens; m++) sums[m * TILE + r] = total[m][0] + total[m][1];
  }
}

static void dense(const struct tiles *a, int64_t k, float out[UNIT][TILE], int bits) {
  (void)bits;
  for (int r = 0; r < TILE; r++) {
    uint8_t codes[UNIT];
    float scale = load(a->scales, k / a->group * TILE + r, a->scale_type);
    unit_codes(a, k / UNIT, r, codes);
    for (int i = 0; i < UNIT; i++) out[i][r] = a->table[codes[i]] * scale;
  }
}

static int always(void) { return 1; }

#define MOST_TOKENS MAX_TOKENS
#define WIDTH 4
#include "variant.h"

const struct variant flute_scalar = {.name = "scalar", .usable = always, .max_tokens = MOST_TOKENS, .order = AS_CODES,
    .fixed = any_fixed, .exact = any_exact, .dense = any_dense, .token = any_token, .nearest = any_nearest,
    .halves = NULL, .row = any_row, .steps = &all_steps};
