/* Rows of a dense weight times tokens, for the variant whose file includes this. A row is read once, in
   32 columns at a time; products of column i go to part i of 32 sums, and the parts are added in one
   order, so results are the same for all variants.

   Of bf16, a word of 32 bits holds columns 2i and 2i + 1: a shift and a mask make fp32 of them, which is
   half of the instructions of widening each. So x has even columns first there (lut.h, dense_x).

   Why nothing is fetched ahead: one thread of a Zen 4 reads bf16 at 25 to 27 GB/s so and at 22 to 27 with
   codes' distances (32,000 x 2,048 in large pages, other work on the machine, 2026-11). */

#define ROW_PARTS (DENSE_UNIT / WIDTH)
#define ROW_TOKENS (WIDTH == 16 ? 4 : WIDTH == 8 ? 2 : 1) /* whose sums the registers hold */

/* Part p of 32 columns of a row, in the order of x. */
INLINE vec columns(const char *row, const int p, const int type) {
  const int half = ROW_PARTS / 2;
  if (type == F32) return vec_at((const float *)row + p * WIDTH);
  if (type == F16) {
    vec out;
#ifdef F16_AT
    const __auto_type of = F16_AT(row + p * 2 * WIDTH);
    memcpy(&out, &of, sizeof out);
#else
    float of[WIDTH];
    widen(row, p * WIDTH, WIDTH, of, F16);
    memcpy(&out, of, sizeof out);
#endif
    return out;
  }
  bits pairs;
  memcpy(&pairs, row + (size_t)(p % half) * sizeof pairs, sizeof pairs);
  return (vec)(p < half ? pairs << 16 : pairs & 0xFFFF0000);
}

/* Why all loops are unrolled: else sums are kept in memory, and written there 32 columns after 32. */
INLINE void multiply_row_by(const struct dense_rows *a, const char *row, const char *rest, int64_t first,
                            float *sums, const int type, const int tokens) {
  const float *x = a->x + first * DENSE_UNIT;
  const int64_t whole = a->K / DENSE_UNIT * DENSE_UNIT;
  vec sum[ROW_TOKENS][ROW_PARTS];
#pragma GCC unroll 4
  for (int m = 0; m < tokens; m++)
#pragma GCC unroll 8
    for (int p = 0; p < ROW_PARTS; p++) sum[m][p] = (vec){0};
  for (int64_t k = 0; k < a->K; k += DENSE_UNIT, x += a->M * DENSE_UNIT) {
    const char *from = k < whole ? row + (size_t)k * element_bytes(type) : rest;
#pragma GCC unroll 8
    for (int p = 0; p < ROW_PARTS; p++) {
      const vec w = columns(from, p, type);
#pragma GCC unroll 4
      for (int m = 0; m < tokens; m++) sum[m][p] += w * vec_at(x + m * DENSE_UNIT + p * WIDTH);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < tokens; m++) {
    vec parts[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) parts[p] = sum[m][p] + sum[m][PARTS + p];
    add_rows(parts, 1, sums + first + m);
  }
}

INLINE void multiply_rows(const struct dense_rows *a, const char *row, float *sums, const int type) {
  const int64_t whole = a->K / DENSE_UNIT * DENSE_UNIT;
  const size_t bytes = element_bytes(type);
  ALIGNED char rest[DENSE_UNIT * 4] = {0}; /* the last columns, then zeros */
  memcpy(rest, row + (size_t)whole * bytes, (size_t)(a->K - whole) * bytes);
  int64_t m = 0;
  for (; m + ROW_TOKENS <= a->M; m += ROW_TOKENS) multiply_row_by(a, row, rest, m, sums, type, ROW_TOKENS);
  if (ROW_TOKENS > 2 && m + 2 <= a->M) {
    multiply_row_by(a, row, rest, m, sums, type, 2);
    m += 2;
  }
  if (ROW_TOKENS > 1 && m < a->M) multiply_row_by(a, row, rest, m, sums, type, 1);
}

static void any_row(const struct dense_rows *a, const char *row, float *sums) {
  const int type = a->type;
  BY_TYPE(multiply_rows(a, row, sums, T))
}
