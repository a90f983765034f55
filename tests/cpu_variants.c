/* Random problems by every variant that this CPU runs: bits equal to plain C's, and close to sums in
   double of the dequantised weight. Without Python, so that an emulated CPU can run it. */
#include "lut.h"

#include <stdio.h>
#include <stdlib.h>

const char *flute_variant_name(int i);
int flute_variant_usable(int i);
int flute_multiply(const struct weight *weights, const struct result *results, int count,
                   const struct tokens *t, int variant, int exact, parallel_fn run);
int flute_order(const struct weight *stored, uint8_t *codes, void *scales, int64_t bytes, int exact,
                parallel_fn run);
int flute_dequantise(const struct weight *w, int64_t first, int64_t last, int type, void *out, int variant,
                     parallel_fn run);
int flute_serial(int64_t first, int64_t last, int64_t grain, range_fn run, void *context);

enum { N = 21, ROWS = 32 };
enum tables { ONE, PER_ROW, RANGES };
static int problems, failures, variants;

static uint32_t draw(void) {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (uint32_t)(state >> 16);
}

static float uniform(void) { return (float)(draw() % 20001) / 10000.0f - 1; }

static void fill(float *values, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] = uniform();
}

/* By each variant, against the last one's bits (plain C) and against `dense`. */
static void check(const struct weight *w, const struct tokens *t, const float *dense, int exact) {
  static const double tolerance[] = {[F32] = 6e-4, [BF16] = 8e-3, [F16] = 1.5e-3};
  const size_t bytes = (size_t)(t->M * N) * element_bytes(t->x_type);
  char *outs = calloc((size_t)variants, bytes), *last = outs + (size_t)(variants - 1) * bytes;
  for (int v = variants - 1; v >= 0; v--) {
    char *out = outs + (size_t)v * bytes;
    const struct result result = {NULL, out, F32};
    double error = 0, norm = 0;
    if (!flute_variant_usable(v)) continue;
    int failed = flute_multiply(w, &result, 1, t, v, exact, flute_serial);
    for (int64_t m = 0; m < t->M; m++)
      for (int64_t n = 0; n < N; n++) {
        double sum = 0, got = load(out, m * N + n, t->x_type);
        for (int64_t k = 0; k < w->K; k++)
          sum += (double)load(t->x, m * w->K + k, t->x_type) * dense[n * w->K + k];
        error += (sum - got) * (sum - got);
        norm += sum * sum;
      }
    failed |= error > tolerance[t->x_type] * tolerance[t->x_type] * norm;
    failed |= !exact && memcmp(out, last, bytes) != 0;
    problems++;
    failures += failed;
    if (failed)
      printf("%s: bits %d group %d tables %d x_type %d M %d exact %d\n", flute_variant_name(v), w->num_bits,
             (int)w->group, (int)w->num_tables, t->x_type, (int)t->M, exact);
  }
  free(outs);
}

static void problem(int bits, int64_t K, int64_t group, enum tables tables) {
  static const int64_t ends[] = {16, N};
  const int64_t count = tables == ONE ? 1 : tables == PER_ROW ? N : 2, words = (K * bits + 31) / 32;
  const int64_t bytes = HEADER + (tables == PER_ROW ? N : ROWS) * (padded(K) / UNIT) * 4 * bits;
  uint32_t *codes = malloc((size_t)(N * words) * 4);
  float *scales = malloc((size_t)(N * K / group) * 4), *entries = malloc((size_t)count * 64);
  float *ordered_scales = calloc((size_t)(ROWS * K / group), 4), *dense = malloc((size_t)(N * K) * 4);
  uint8_t *ordered = malloc((size_t)bytes);
  const uint32_t used = K * bits % 32 ? (1u << K * bits % 32) - 1 : ~0u;
  for (int64_t i = 0; i < N * words; i++) codes[i] = draw() & (i % words == words - 1 ? used : ~0u);
  fill(scales, N * K / group);
  fill(entries, count * 16);
  struct weight w = {.codes = (uint8_t *)codes, .scales = scales, .tables = entries,
                     .ends = tables == RANGES ? ends : NULL, .N = N, .K = K, .group = group,
                     .num_tables = count, .num_bits = bits, .scale_type = F32, .by_rows = tables == PER_ROW};
  failures += flute_order(&w, ordered, ordered_scales, bytes, 0, flute_serial);
  w.codes = ordered;
  w.scales = ordered_scales;
  for (int type = F32; type <= F16; type++) {
    char *x = malloc((size_t)(11 * K) * 4);
    for (int64_t i = 0; i < 11 * K; i++) store(x, i, type, uniform());
    failures += flute_dequantise(&w, 0, N, F32, dense, variants - 1, flute_serial);
    for (int64_t M = 1; M <= 11; M++) {
      const struct tokens t = {x, M, K, type};
      for (int exact = 0; exact < 2; exact++) check(&w, &t, dense, exact);
    }
    free(x);
  }
  free(codes), free(scales), free(entries), free(ordered_scales), free(dense), free(ordered);
}

int main(void) {
  while (flute_variant_name(variants)) variants++;
  for (int v = 0; v < variants; v++)
    if (flute_variant_usable(v)) printf("%s ", flute_variant_name(v));
  for (int bits = 2; bits <= 4; bits++)
    for (enum tables tables = ONE; tables <= RANGES; tables++) {
      for (int64_t group = 32; group <= 256; group *= 2) problem(bits, 256, group, tables);
      problem(bits, 77, 77, tables);
    }
  printf("%d products, %d failures\n", problems, failures);
  return failures != 0;
}
