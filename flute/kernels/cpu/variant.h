/* The end of a variant's file, compiled for its instructions. Of a file that includes it are

       fixed(a, sums, bits, tokens), exact(a, sums, bits, tokens), dense(a, k, out, bits)
       MOST_TOKENS    it takes in one pass: 4 or 8
       WIDTH          floats of a vector
       F16_AT(p)      as many of fp16 from p on, if there are instructions for it

   in which bits and tokens are constants once inlined. It defines all_steps (steps.h) and any_row
   (rows.h) besides. */
#include <math.h>

#define INSTANCES(NAME, BITS)                                                  \
  static void NAME##BITS(const struct tiles *a, int tokens, float *sums) {     \
    if (tokens == 1) NAME(a, sums, BITS, 1);                                   \
    else if (tokens == 2) NAME(a, sums, BITS, 2);                              \
    else if (tokens == 4) NAME(a, sums, BITS, 4);                              \
    else NAME(a, sums, BITS, MOST_TOKENS);                                     \
  }
INSTANCES(fixed, 2)
INSTANCES(fixed, 3)
INSTANCES(fixed, 4)
INSTANCES(exact, 2)
INSTANCES(exact, 3)
INSTANCES(exact, 4)

static void any_fixed(const struct tiles *a, int tokens, float *sums) {
  (a->num_bits == 4 ? fixed4 : a->num_bits == 3 ? fixed3 : fixed2)(a, tokens, sums);
}

static void any_exact(const struct tiles *a, int tokens, float *sums) {
  (a->num_bits == 4 ? exact4 : a->num_bits == 3 ? exact3 : exact2)(a, tokens, sums);
}

static void any_dense(const struct tiles *a, int64_t k, float out[UNIT][TILE]) {
  if (a->num_bits == 4) dense(a, k, out, 4);
  else if (a->num_bits == 3) dense(a, k, out, 3);
  else dense(a, k, out, 2);
}

/* Sixteen sums as one, in an order that vectors can take. */
INLINE float add_all(float v[16]) {
  for (int width = 8; width; width /= 2)
    for (int j = 0; j < width; j++) v[j] += v[j + width];
  return v[0];
}

static int any_token(const struct tiles *a, const void *from, int type, float *x, int16_t *fixed,
                     float *unit) {
  const float limit = (float)(TABLE_LIMIT * BUDGET / a->block);
  double lost = 0, norm = 0;
  int fits = 1;
  if (type == F32) memcpy(x, from, (size_t)a->K * 4);
  else if (type == BF16)
    for (int64_t k = 0; k < a->K; k++) x[k] = load(from, k, BF16);
  else
    for (int64_t k = 0; k < a->K; k++) x[k] = load(from, k, F16);
  for (int64_t first = 0, b = 0; first < a->padded_K; first += a->block, b++) {
    int64_t length = a->padded_K - first < a->block ? a->padded_K - first : a->block;
    const float *in = x + first;
    int32_t bits[16] = {0}, largest_bits = 0;
    for (int64_t i = 0; i < length; i += 16)
      for (int j = 0; j < 16; j++) {
        int32_t now;
        memcpy(&now, in + i + j, 4);
        now &= 0x7FFFFFFF;
        bits[j] = now > bits[j] ? now : bits[j];
      }
    for (int j = 0; j < 16; j++) largest_bits = bits[j] > largest_bits ? bits[j] : largest_bits;
    float largest = from_bits((uint32_t)largest_bits);
    unit[b] = 0;
    if (largest == 0) continue; /* fixed is zero already */
    if (!(largest >= 0x1p-90f && largest <= 0x1p100f)) { fits = 0; continue; } /* NaN too */
    float inverse = limit / largest, errors[16] = {0}, squares[16] = {0};
    unit[b] = largest / limit;
    for (int64_t i = 0; i < length; i += 16)
      for (int j = 0; j < 16; j++) {
        float v = in[i + j] * inverse, q = (v + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds */
        fixed[first + i + j] = (int16_t)q;
        errors[j] += (v - q) * (v - q);
        squares[j] += v * v;
      }
    double u = unit[b];
    lost += u * u * add_all(errors);
    norm += u * u * add_all(squares);
  }
  return fits && lost <= TOKEN_TOLERANCE * TOKEN_TOLERANCE * norm;
}

static void any_nearest(const float *weight, int64_t length, float divisor, const float *bounds,
                        const uint8_t *order, int entries, uint8_t *codes) {
  for (int64_t first = 0; first < length; first += 32) {
    const int now = length - first < 32 ? (int)(length - first) : 32;
    float value[32] = {0};
    int32_t rank[32] = {0};
    for (int i = 0; i < now; i++) value[i] = weight[first + i] / divisor;
    for (int b = 0; b < entries - 1; b++)
      for (int i = 0; i < 32; i++) rank[i] += value[i] > bounds[b];
    for (int i = 0; i < now; i++) codes[first + i] = order[rank[i]];
  }
}

#include "steps.h"
#include "rows.h"
