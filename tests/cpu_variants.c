/* Random problems by every variant that this CPU runs: bits equal to plain C's, and close to sums in
   double of the dequantised weight. Without Python, so that an emulated CPU can run it. */
#include "block.h"

#include <math.h>
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
int flute_dense(const struct dense_weight *w, const struct result *r, const struct tokens *t, int variant,
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

enum { DIM = 48, HEADS = 6, GROUPS = 2, WIDE = 592, LENGTH = 37, OUT = HEADS * DIM + 3 * WIDE + DIM };

/* Sum of the squared errors of attention and of gates over that of their values, in double. */
static double step_error(const struct block *b, const struct step *s, const void *x, const void *y, const void *out) {
  const int type = b->type;
  double error = 0, norm = 0, e, p[LENGTH];
  for (int h = 0; h < HEADS; h++) {
    const int64_t at = h / (HEADS / GROUPS) * LENGTH * DIM;
    double total = 0;
    for (int t = 0; t < LENGTH; t++) {
      p[t] = 0;
      for (int i = 0; i < DIM; i++)
        p[t] += (double)load(s->q, h * DIM + i, type) * load(s->keys.data, at + t * DIM + i, type);
      p[t] = s->mask_kind == BOOLEAN && !((const uint8_t *)s->mask)[t] ? 0 : exp(p[t] * b->scaling);
      total += p[t];
    }
    for (int i = 0; i < DIM; i++) {
      double sum = 0;
      for (int t = 0; t < LENGTH; t++) sum += p[t] / total * load(s->values.data, at + t * DIM + i, type);
      e = sum - load(out, h * DIM + i, type);
      error += e * e;
      norm += sum * sum;
    }
  }
  for (int i = 0; i < WIDE; i++) {
    const double v = load(x, i, type), gated = v / (1 + exp(-v)) * load(y, i, type);
    e = gated - load(out, HEADS * DIM + i, type);
    error += e * e;
    norm += gated * gated;
  }
  return error / norm;
}

/* The steps of a decoder block: they begin at odd addresses, and results lie where operands did. */
static void steps_of_a_block(int type, enum mask_kind kind) {
  static const double tolerance[] = {[F32] = 1e-6, [BF16] = 5e-3, [F16] = 6e-4};
  const size_t bytes = element_bytes(type), half = (size_t)GROUPS * LENGTH * DIM;
  const struct block b = {.heads = HEADS, .groups = GROUPS, .dim = DIM, .scaling = 0.7f, .type = type};
  float *scratch = malloc((size_t)attend_floats(&b, LENGTH) * sizeof *scratch);
  char *past = malloc(2 * half * bytes), *x = malloc(2 * WIDE * 4 + 1), *first = malloc(2 * OUT * 4), *y;
  uint8_t mask[LENGTH];
  x += 1;
  y = x + WIDE * bytes;
  for (size_t i = 0; i < 2 * half; i++) store(past, (int64_t)i, type, 3 * uniform());
  for (int i = 0; i < 2 * WIDE; i++) store(x, i, type, 9 * uniform());
  for (int t = 0; t < LENGTH; t++) mask[t] = draw() % 3 != 0;
  const struct step s = {.q = x, .M = 1, .keys = {past, {0, LENGTH * DIM, DIM}},
                         .values = {past + half * bytes, {0, LENGTH * DIM, DIM}},
                         .length = LENGTH, .mask = mask, .mask_kind = kind};
  const struct norm norm = {y, 1e-5f};
  for (int v = variants - 1; v >= 0; v--) {
    if (!flute_variant_usable(v)) continue;
    const struct steps *steps = flute_variants[v]->steps;
    char *out = v == variants - 1 ? first : first + OUT * bytes, *gated = out + HEADS * DIM * bytes;
    char *normed = gated + WIDE * bytes, *sum = normed + WIDE * bytes, *head = sum + WIDE * bytes;
    for (int64_t g = 0; g < GROUPS; g++) steps->attend(&b, &s, 0, g, scratch, out);
    memcpy(gated, x, WIDE * bytes);
    steps->gate(gated, y, gated, WIDE, type);
    steps->norm(&norm, x, normed, WIDE, type);
    memcpy(sum, x, WIDE * bytes);
    steps->add(sum, y, sum, WIDE, type);
    memcpy(head, x, DIM * bytes);
    steps->rotate(head, y, y + DIM * bytes, DIM, type);
    const double error = step_error(&b, &s, x, y, out);
    const int failed = memcmp(out, first, OUT * bytes) != 0 || !(error <= tolerance[type] * tolerance[type]);
    problems++;
    failures += failed;
    if (failed) printf("%s: steps of type %d, mask %d, error %g\n", flute_variant_name(v), type, kind, sqrt(error));
  }
  free(scratch), free(past), free(x - 1), free(first);
}

/* A dense weight at an odd address, rows of which do not end with whole units, with a bias. */
static void dense_products(int type, int64_t K) {
  static const double tolerance[] = {[F32] = 1e-6, [BF16] = 5e-3, [F16] = 6e-4};
  const size_t bytes = element_bytes(type), size = MAX_TOKENS * N * bytes;
  char *data = malloc((size_t)(N * K) * bytes + 1), *x = malloc((size_t)(MAX_TOKENS * (K + 3)) * bytes);
  char *outs = calloc((size_t)variants, size);
  float bias[N];
  data += 1;
  for (int64_t i = 0; i < N * K; i++) store(data, i, type, uniform());
  for (int64_t i = 0; i < MAX_TOKENS * (K + 3); i++) store(x, i, type, uniform());
  fill(bias, N);
  const struct dense_weight w = {data, N, K, type};
  for (int64_t M = 1; M <= MAX_TOKENS; M++) {
    const struct tokens t = {x, M, K + 3, type};
    for (int v = variants - 1; v >= 0; v--) {
      char *out = outs + (size_t)v * size;
      const struct result r = {bias, out, F32};
      double error = 0, norm = 0;
      if (!flute_variant_usable(v)) continue;
      int failed = flute_dense(&w, &r, &t, v, flute_serial);
      for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
          double sum = bias[n], got = load(out, m * N + n, type);
          for (int64_t k = 0; k < K; k++)
            sum += (double)load(x, m * (K + 3) + k, type) * load(data, n * K + k, type);
          error += (sum - got) * (sum - got);
          norm += sum * sum;
        }
      failed |= !(error <= tolerance[type] * tolerance[type] * norm);
      failed |= memcmp(out, outs + (size_t)(variants - 1) * size, (size_t)(M * N) * bytes) != 0;
      problems++;
      failures += failed;
      if (failed) printf("%s: dense, type %d K %d M %d\n", flute_variant_name(v), type, (int)K, (int)M);
    }
  }
  free(data - 1), free(x), free(outs);
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
  for (int type = F32; type <= F16; type++)
    for (enum mask_kind kind = NO_MASK; kind <= BOOLEAN; kind++) steps_of_a_block(type, kind);
  for (int type = F32; type <= F16; type++) {
    dense_products(type, 5);
    dense_products(type, 96);
    dense_products(type, 333);
  }
  printf("%d problems, %d failures\n", problems, failures);
  return failures != 0;
}
